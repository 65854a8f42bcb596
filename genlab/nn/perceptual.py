"""Shift-tolerant LPIPS (Ghildyal & Liu, arXiv 2207.13686): AlexNet with blurred downsampling, weights from a wheel.

The weights come inside the PyPI package `stlpips-pytorch` and are read from its files; its code is not run.
The number is not LPIPS: don't compare it with published LPIPS figures. The first layer and the blur behind it
are one convolution here, which differs from the package at the image's border only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# in, out, kernel, stride, padding
_CONVS = [
    (3, 64, 13, 2, 0),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
]
_NAMES = ["slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13"]


def _blur_down(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Halve the resolution behind a binomial 3x3 filter (two box filters), with two pixels of reflection."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(x_BCHW, (2, 2, 2, 2), mode="reflect"), 2, stride=1), 2)


class PerceptualDistance(nn.Module):
    """Distance of two batches of images (B, 3, H, W) in [-1, 1], H and W at least 32: (B,), 0 where equal."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *, pretrained: bool = True) -> None:
        """Args: pretrained: load the packaged weights; otherwise they are random (tests)."""
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, p) for i, o, k, s, p in _CONVS)
        self.weigh = nn.ParameterList(torch.rand(o) for _, o, *_ in _CONVS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        if pretrained:
            self._load()
        self.requires_grad_(False).eval()

    def _load(self) -> None:
        package = importlib.util.find_spec("stlpips_pytorch")
        if package is None or not package.submodule_search_locations:
            raise FileNotFoundError("the perceptual loss needs its weights: `pip install stlpips-pytorch==0.0.2`")
        root = Path(next(iter(package.submodule_search_locations)))
        state = torch.load(root / "weights/vST0.0/alex_shift_tolerant.pth", map_location="cpu", weights_only=True)
        for i, (conv, name) in enumerate(zip(self.convs, _NAMES, strict=True)):
            weight = state[f"net.{name}.weight"]
            if i == 0:  # fold the blur that follows the first layer into it: a fourth of the work
                tap = torch.tensor([0.25, 0.5, 0.25])
                blur = (tap[:, None] * tap)[None, None]
                weight = F.conv2d(weight.flatten(0, 1)[:, None], blur, padding=2).reshape(64, 3, 13, 13)
            conv.load_state_dict({"weight": weight, "bias": state[f"net.{name}.bias"]})
            self.weigh[i].data = state[f"lin{i}.model.1.weight"].flatten()

    def features(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps, each position scaled to unit length."""
        x = F.pad((x_BCHW - self.shift) / self.scale, (4, 4, 4, 4), mode="replicate")
        maps = []
        for i, conv in enumerate(self.convs):
            if i in (1, 2):
                x = _blur_down(F.max_pool2d(x, 3, stride=1))
            x = F.relu(conv(x))
            maps.append(F.normalize(x, dim=1, eps=1e-10))
        return maps

    def forward(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> torch.Tensor:
        """The distance of each pair: (B,)."""
        total = torch.zeros(len(x_BCHW), device=x_BCHW.device)
        for a, b, w in zip(self.features(x_BCHW), self.features(y_BCHW), self.weigh, strict=True):
            total = total + torch.einsum("bchw,c->b", (a - b) ** 2, w) / a.shape[2:].numel()
        return total
