"""Adaptive projected guidance: classifier-free guidance without its burn (Sadat et al., arXiv 2410.02416, alg. 1)."""

from __future__ import annotations

import torch

from genlab.config import config


@config
class APGConfig:
    """What is done to the difference of the conditional and the unconditional prediction, before it is scaled."""

    momentum: float = -0.5
    """Share of the last step's difference that is added; negative pushes away from it."""
    threshold: float = 2.5
    """Largest norm of the difference, over a whole image; 0 sets no limit."""
    eta: float = 0.0
    """Weight of its part parallel to the conditional prediction, which makes colours burn."""


class APG:
    """The guidance of one trajectory; it remembers, so make a new one for each."""

    def __init__(self, config: APGConfig) -> None:
        """Args: config: its three constants."""
        self.config = config
        self.average: torch.Tensor | None = None

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction (B, ...); norms and projections are a row's."""
        c = self.config
        difference = cond - uncond
        if self.average is not None:
            difference = difference + c.momentum * self.average
        self.average = difference
        flat, axis = difference.flatten(1).double(), cond.flatten(1).double()
        if c.threshold > 0:
            flat = flat * (c.threshold / flat.norm(dim=1, keepdim=True)).clamp(max=1)
        axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-12)
        parallel = (flat * axis).sum(1, keepdim=True) * axis
        update = flat - parallel + c.eta * parallel
        return cond + (scale - 1) * update.view_as(cond).to(cond)
