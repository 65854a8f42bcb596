"""A head that predicts a mixture of diagonal Gaussians of each continuous token (Divot, arXiv 2412.04432, §3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genlab.distributions import GaussianMixture

LEAST_VARIANCE = 1e-5
"""Variances are kept above it."""


def split_mixture(params: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's output as the parameters of mixtures.

    Args:
        params: (B, N, 2 K C + K): means, variances before softplus, logits.
        components: K.

    Returns:
        means (B, N, K, C), variances (B, N, K, C), logits (B, N, K).

    Raises:
        ValueError: if the last axis isn't that of K components.
    """
    C, rest = divmod(params.shape[-1] - components, 2 * components)
    if rest or C < 1:
        raise ValueError(f"{params.shape[-1]} numbers a token are no mixture of {components} Gaussians: need 2KC + K")
    means, raw, logits = params.split([components * C, components * C, components], -1)
    variances = F.softplus(raw).clamp(min=LEAST_VARIANCE)
    return means.unflatten(-1, (components, C)), variances.unflatten(-1, (components, C)), logits


def mixture_of(params: torch.Tensor, components: int) -> GaussianMixture:
    """The distribution that a head's output (B, N, 2 K C + K) stands for."""
    means, variances, logits = split_mixture(params.float(), components)
    return GaussianMixture(logits_BGM=logits, mean_BGMC=means, std_BGMC=variances.sqrt())


def mixture_loss(params: torch.Tensor, target_BNC: torch.Tensor, components: int) -> torch.Tensor:
    """Negative log-likelihood a channel: the mean over tokens, divided by C, in nats."""
    return -mixture_of(params, components).log_prob(target_BNC.float()).mean() / target_BNC.shape[-1]
