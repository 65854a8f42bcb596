"""Features of a frozen network as alignment targets (REPA, Yu et al., arXiv 2410.06940)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.nn.lite0 import load_lite0
from genlab.tokens import Tokens, TokenSpec
from tokenizers_img.base import Tokenizer

LITE0 = "efficientnet-lite0"


class FrozenFeatures(Tokenizer):
    """Images to a raster of features of a frozen timm model: a tokenizer that only encodes, so its cache serves."""

    kind = "frozen_features"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, *, side: int, image_size: int, pretrained: bool = True) -> None:
        """Load the network.

        Args:
            name: `efficientnet-lite0`, or a timm model's, whose weights come from the Hub or its cache.
            side: of the raster.
            image_size: of the images it will be given.
            pretrained: False leaves a timm model's weights random (tests).
        """
        import timm

        super().__init__({"name": name, "side": side})
        options: dict[str, Any] = {"dynamic_img_size": True} if "vit" in name.split("_") else {}
        net: Any = load_lite0() if name == LITE0 else timm.create_model(name, pretrained=pretrained, **options)
        cfg = net.pretrained_cfg
        self.net = net.eval().requires_grad_(False)
        reduction = net.feature_info[-1]["reduction"] if hasattr(net, "feature_info") else 16
        self.size = reduction * side
        while self.size < image_size:
            self.size *= 2
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None])
        self.side, self.image_size, self.dim = side, image_size, int(net.num_features)

    @property
    def spec(self) -> TokenSpec:
        """A raster of features."""
        size = (self.image_size, self.image_size)
        return TokenSpec(kind="continuous", grid=(self.side, self.side), dim=self.dim, image_size=size)

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Features (B, side^2, F) of images in [-1, 1], pooled to the raster."""
        x = F.interpolate(self.check_images(images), self.size, mode="bicubic", align_corners=False)
        y = self.net.forward_features(((x + 1) / 2 - self.mean) / self.std)
        if y.ndim == 3:  # a vision transformer: class and register tokens in front
            y = y[:, getattr(self.net, "num_prefix_tokens", 1) :]
            y = rearrange(y, "b (h w) c -> b c h w", h=round(y.shape[1] ** 0.5))
        y = F.adaptive_avg_pool2d(y, self.side)
        return Tokens(rearrange(y, "b c h w -> b (h w) c").float(), self.spec)


def projector(dim: int, out: int, hidden: int = 0) -> nn.Sequential:
    """Three layers, as the paper's: (..., dim) to (..., out)."""
    hidden = hidden or 2 * dim
    layers = [nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)]
    return nn.Sequential(*layers)
