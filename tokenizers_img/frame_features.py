"""What a frozen image network sees in frames: the raw material of video tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from genlab.nn.lite0 import load_lite0

LITE0 = "efficientnet-lite0"


class FrameFeatures:
    """Frames (N, 3, H, W) in [-1, 1] to features (N, side^2, F) of a frozen network; no part of a checkpoint."""

    def __init__(self, name: str, *, size: int, levels: tuple[int, ...], side: int, pretrained: bool = True) -> None:
        """Name the network; it is loaded when it is first used.

        Args:
            name: the packaged `efficientnet-lite0`, or a timm model, whose weights come from the Hub or its cache.
            size: side that frames are brought to.
            levels: whose feature maps are taken, finer ones folded into channels; none: the last one. A vision
                transformer has one: the patches of its last block, before its last norm.
            side: of the grid of places.
            pretrained: False leaves a timm model's weights random (tests).
        """
        self.name, self.size, self.levels, self.side, self.pretrained = name, size, levels, side, pretrained

    @cached_property
    def network(self) -> Any:
        """The network, frozen."""
        import timm

        if self.name == LITE0:
            return load_lite0()
        return timm.create_model(self.name, pretrained=self.pretrained).eval().requires_grad_(False)

    @cached_property
    def channels(self) -> int:
        """F."""
        blank = torch.zeros(1, 3, self.size, self.size, device=next(self.network.parameters()).device)
        return self(blank).shape[-1]

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, side^2, F).

        Raises:
            ValueError: where a map doesn't fold to the grid.
        """
        net, frames = self.network.to(frames.device), frames.float()  # as the network's weights
        cfg = net.pretrained_cfg
        mean, std = (frames.new_tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
        x = frames if frames.shape[-1] == self.size else F.interpolate(frames, self.size, mode="bicubic")
        levels = list(self.levels) or 1
        maps = net.forward_intermediates(((x + 1) / 2 - mean) / std, indices=levels, intermediates_only=True)
        folded = []
        for m in maps:
            if m.shape[-1] % self.side:
                raise ValueError(
                    f"a {m.shape[-1]}x{m.shape[-1]} map of {self.name} doesn't fold to {self.side}x{self.side} places"
                )
            folded.append(F.pixel_unshuffle(m, m.shape[-1] // self.side))
        return rearrange(torch.cat(folded, 1), "n c h w -> n (h w) c").float()
