"""FSQ: every channel of a code rounded to a few levels (Mentzer et al., arXiv 2309.15505).

No codebook is learned, and still it can be under-used: channels that hug the middle leave outer levels empty, and
channels that move together leave combinations empty. Two remedies, both only in training:

- `noise`: a share of the values gets uniform noise of one level's width in place of rounding (Parker et al.,
  arXiv 2411.19842, sec. 3.2): gradients without the straight-through bias, and a decoder that neighbours don't startle.
- `spread`: the entropy of each channel's mean soft assignment to its levels, to be maximised (the entropy term of
  MAGVIT-v2, Yu et al., arXiv 2310.05737, a channel at a time as BSQ, Zhao et al., arXiv 2406.07548, does for bits).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from genlab.tokens import Tokens

from .usage import codebook_usage, perplexity

EPS = 1e-3  # the tanh reaches a little beyond the outermost levels


class FSQ(nn.Module):
    """Vectors of len(levels) channels to ids below the levels' product; the first channel is least significant."""

    levels: torch.Tensor
    basis: torch.Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        """Args: levels: of each channel. Raises: ValueError: for fewer than two of any, or a product above 2^31."""
        super().__init__()
        if not levels or min(levels) < 2 or math.prod(levels) > 2**31:
            raise ValueError(f"FSQ needs two or more levels a channel, 2^31 codes at most, got {levels}")
        self.vocab, self.sizes = math.prod(levels), levels
        # exact integers, not persistent: no checkpoint holds them
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = torch.tensor([1, *levels[:-1]]).cumprod(0)
        self.register_buffer("basis", basis, persistent=False)

    def bound(self, z: torch.Tensor) -> torch.Tensor:
        """Squash (..., C) to just beyond the levels, which are the integers -(L // 2) … (L - 1) // 2; float32."""
        half = (self.levels - 1) * (1 + EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (z.float() + (offset / half).atanh()).tanh() * half - offset

    def forward(
        self, z: torch.Tensor, noise: torch.Tensor | None = None, share: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes in about [-1, 1] with straight-through gradients, and ids, of vectors (..., C).

        Args:
            z: the vectors.
            noise: uniforms in (0, 1), two a value, (..., C, 2): where they are to be perturbed in place of rounded.
            share: of the values that are.
        """
        x = self.bound(z)
        rounded = x.round()
        y = x + (rounded - x).detach()
        if noise is not None and share > 0:
            y = torch.where(noise[..., 0] < share, x + (noise[..., 1].to(x) - 0.5), y)
        return y / (self.levels // 2), self.to_ids(rounded.detach())

    def to_ids(self, rounded: torch.Tensor) -> torch.Tensor:
        """Rounded levels (..., C) to ids (...)."""
        return ((rounded.long() + self.levels // 2) * self.basis).sum(-1)

    def digits(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (...) to each channel's level, 0 … L - 1, (..., C)."""
        return ids[..., None] // self.basis % self.levels

    def codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (...) to codes (..., C), float32."""
        half = self.levels // 2
        return (self.digits(ids) - half).float() / half

    def spread(self, z: torch.Tensor) -> torch.Tensor:
        """Entropy of each channel's mean soft assignment, over its largest value, mean of channels: 0 … 1.

        A value between two levels belongs to both, by its distance to each.
        """
        x = self.bound(z).reshape(-1, len(self.levels))
        total = x.new_zeros(())
        for i, n in enumerate(self.sizes):
            level = torch.arange(n, device=x.device) - n // 2
            share = (1 - (x[:, i, None] - level).abs()).clamp_min(0)
            # an empty level's entropy has an infinite slope
            p = (share / share.sum(-1, keepdim=True).clamp_min(1e-6)).mean(0).clamp_min(1e-6)
            total = total + torch.special.entr(p).sum() / math.log(n)
        return total / len(self.levels)


def fsq_usage(fsq: FSQ, batches: list[Tokens]) -> dict[str, Any]:
    """How much of the codebook images use: whole codes, and by channel and by position.

    Args:
        fsq: the quantiser.
        batches: tokens of many images.

    Returns:
        what `codebook_usage` says; `channels`: of each, the share of images' values at each level and its entropy
        over the largest possible; `positions`: of each, the perplexity of its codes.
    """
    ids_NL = torch.cat([t.values for t in batches]).cpu()
    digits = FSQ(tuple(fsq.levels.tolist())).digits(ids_NL).flatten(0, 1)
    channels = []
    for i, n in enumerate(fsq.levels.tolist()):
        p = torch.bincount(digits[:, i], minlength=n).double() / len(digits)
        channels.append({"shares": p.tolist(), "entropy": float(torch.special.entr(p).sum() / math.log(n))})
    positions = [float(perplexity(torch.unique(column, return_counts=True)[1])) for column in ids_NL.unbind(1)]
    return {**codebook_usage(batches), "channels": channels, "positions": positions}


def describe_usage(usage: dict[str, Any]) -> list[str]:
    """What `fsq_usage` says of the channels, for people: a line a channel."""
    return [
        f"channel {i}: levels {' '.join(f'{share:.2f}' for share in channel['shares'])}, "
        f"entropy {channel['entropy']:.2f}"
        for i, channel in enumerate(usage["channels"])
    ]
