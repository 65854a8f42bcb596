"""Codes of several scales to one map, as a next-scale generator reads them (VAR, arXiv 2404.02905, algorithm 2)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class ScaleCodes(nn.Module):
    """A frozen copy of a multi-scale tokenizer's codebook and smoothing convolutions phi.

    Parameter names are those of `MSVQ.quantiser`, so that a state dict of one loads into the other. A codebook
    that nobody has loaded yet is NaN.
    """

    def __init__(
        self, *, codes: int, dim: int, scales: tuple[tuple[int, int], ...], phis: int, phi_ratio: float
    ) -> None:
        """Make an empty one.

        Args:
            codes: codebook size V.
            dim: channels C of a code.
            scales: (h, w) of every map, coarse to fine; the last is the size of the whole.
            phis: how many convolutions the scales share; 0 leaves them out.
            phi_ratio: phi(x) = (1 - ratio) x + ratio conv(x).
        """
        super().__init__()
        self.scales, self.phi_ratio = scales, phi_ratio
        self.codebook = nn.Parameter(torch.full((codes, dim), torch.nan))
        self.phis = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(phis))
        self.requires_grad_(False)
        # VAR's rule: the phi whose tick is nearest to the scale's place between 0 and 1
        margin = 1 / (3 if phis == 4 else 2) / max(phis, 1)
        ticks, last = np.linspace(margin, 1 - margin, max(phis, 1)), max(len(scales) - 1, 1)
        self.phi_of = [int(np.abs(ticks - s / last).argmin()) for s in range(len(scales))]

    def contribution(self, ids_Bl: torch.Tensor, scale: int) -> torch.Tensor:
        """What one scale's ids add to the whole map: (B, C, H, W)."""
        h, w = self.scales[scale]
        x = rearrange(self.codebook[ids_Bl], "b (h w) c -> b c h w", h=h, w=w)
        x = F.interpolate(x, size=self.scales[-1], mode="bicubic")
        if not self.phis:
            return x
        return (1 - self.phi_ratio) * x + self.phi_ratio * self.phis[self.phi_of[scale]](x)

    def pool(self, f_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
        """The whole map averaged down to a scale, one vector a place: (B, h w, C)."""
        return rearrange(F.interpolate(f_BCHW, size=self.scales[scale], mode="area"), "b c h w -> b (h w) c")
