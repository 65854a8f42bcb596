"""Diffusion by v-prediction on a schedule whose last step is pure noise (Lin et al., arXiv 2305.08891).

x_t = a_t x_0 + s_t eps, a_t^2 + s_t^2 = 1; the network predicts v = a_t eps - s_t x_0 (arXiv 2202.00512).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from genlab.noise import Noise

STEPS = 1000


def signal_levels(first: float = 0.00085, last: float = 0.012) -> torch.Tensor:
    """a_t, (1000,) float64: latent diffusion's betas, even in their root, rescaled to a_999 = 0 (algorithm 1 there)."""
    betas = torch.linspace(first**0.5, last**0.5, STEPS, dtype=torch.float64).square()
    a = (1 - betas).cumprod(0).sqrt()
    return (a - a[-1]) * a[0] / (a[0] - a[-1])


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """Bring a guided prediction (B, ...) to the conditional one's standard deviation, by `share` (section 3.4)."""
    axes = tuple(range(1, guided.ndim))
    # a network that says 0 everywhere, as before its training, is brought to nothing
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-12)
    return guided * (share * factor + 1 - share)


def ddim(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: Noise,
    shape: tuple[int, ...],
    *,
    steps: int,
    eta: float = 0.0,
) -> torch.Tensor:
    """Samples (B, *shape) from noise (DDIM, arXiv 2010.02502, eq. 12), first step t = 999.

    Args:
        velocity: (x, t (B,)) to v.
        noise: one seed a row.
        shape: of a sample.
        steps: evaluations, 1 to 1000.
        eta: share of DDPM's noise that is added again; 0 is deterministic.

    Raises:
        ValueError: for another number of steps.
    """
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps must be 1 to {STEPS}, got {steps}")
    a = signal_levels()
    times = [round(STEPS - i * STEPS / steps) - 1 for i in range(steps)]
    x = noise.at(purpose="noise").normal(*shape).float()
    for i, t in enumerate(times):
        now = float(a[t])
        then = float(a[times[i + 1]]) if i + 1 < steps else 1.0
        v = velocity(x, torch.full((len(x),), t, device=x.device)).float()
        s = (1 - now**2) ** 0.5
        x0, eps = now * x - s * v, now * v + s * x
        sigma = eta * ((1 - then**2) / (1 - now**2) * (1 - (now / then) ** 2)) ** 0.5
        x = then * x0 + max(0.0, 1 - then**2 - sigma**2) ** 0.5 * eps
        if sigma:
            x = x + sigma * noise.at(purpose="step", step=i).normal(*shape).to(x)
    return x
