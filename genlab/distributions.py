"""What a generator predicts for its next tokens. Samplers speak to these, never to one paper's model.

Axes: B rows, G positions of the group that is predicted, K sub-token heads, V vocabulary, C channels. A
distribution is sampled with a `Noise` whose `position` is the group's absolute positions, (G,) or (B, G).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from genlab.noise import Noise


@runtime_checkable
class TokenDistribution(Protocol):
    """The distribution of one group of tokens; `log_prob` exists where `has_density`."""

    has_density: bool

    def sample(self, noise: Noise) -> torch.Tensor:
        """Draw the group's event: ids (B, G, K) or vectors (B, G, C)."""
        ...


@dataclass(frozen=True, eq=False)
class Categorical:
    """K independent categorical heads a position: one product distribution over (V,)*K.

    `temperature`, `top_k` and `top_p` return new distributions. Apply them once, before anything compares
    p with q. Probabilities are float64.
    """

    logits_BGKV: torch.Tensor
    has_density = True

    def __post_init__(self) -> None:
        if self.logits_BGKV.ndim != 4:
            raise ValueError(f"Categorical needs logits (B, G, K, V), got {tuple(self.logits_BGKV.shape)}")

    @property
    def log_probs(self) -> torch.Tensor:
        """Normalised log-probabilities, float64, (B, G, K, V)."""
        return self.logits_BGKV.double().log_softmax(-1)

    @property
    def probs(self) -> torch.Tensor:
        """Probabilities, float64, (B, G, K, V)."""
        return self.logits_BGKV.double().softmax(-1)

    def temperature(self, tau: float) -> Categorical:
        """Divide the logits by tau; 0 puts all mass on the largest (the first of equals).

        Raises:
            ValueError: for a negative tau.
        """
        if tau < 0:
            raise ValueError(f"temperature must not be negative, got {tau}")
        if tau == 1:
            return self
        if tau == 0:
            best = F.one_hot(self.logits_BGKV.argmax(-1), self.logits_BGKV.shape[-1]).bool()
            return Categorical(torch.where(best, 0.0, -torch.inf))
        return Categorical(self.logits_BGKV / tau)

    def top_k(self, k: int) -> Categorical:
        """Keep the k likeliest ids of each head, and those equal to the last kept; 0 keeps all."""
        if k <= 0 or k >= self.logits_BGKV.shape[-1]:
            return self
        least = self.logits_BGKV.topk(k, -1).values[..., -1:]
        return Categorical(self.logits_BGKV.masked_fill(self.logits_BGKV < least, -torch.inf))

    def top_p(self, p: float) -> Categorical:
        """Keep each head's smallest set of ids whose mass reaches p (nucleus); 1 keeps all.

        Raises:
            ValueError: for p outside (0, 1].
        """
        if not 0 < p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {p}")
        if p == 1:
            return self
        probs, order = self.probs.sort(-1, descending=True, stable=True)
        drop = probs.cumsum(-1) - probs >= p  # the id that crosses p stays
        return Categorical(self.logits_BGKV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf))

    def sample(self, noise: Noise) -> torch.Tensor:
        """Ids (B, G, K), by inverting the cumulative distribution: one uniform a head."""
        K, V = self.logits_BGKV.shape[2:]
        cdf = self.probs.cumsum(-1)
        u = noise.uniform(K)[..., None].to(cdf) * cdf[..., -1:]
        ids = torch.searchsorted(cdf, u.expand(*cdf.shape[:-1], 1).contiguous(), right=True)[..., 0]
        return ids.clamp(max=V - 1)

    def log_prob(self, ids_BGK: torch.Tensor) -> torch.Tensor:
        """Log-probability of ids, summed over heads: (B, G)."""
        return self.log_probs.gather(-1, ids_BGK[..., None])[..., 0].sum(-1)

    def mode(self) -> torch.Tensor:
        """The likeliest id of each head: (B, G, K)."""
        return self.logits_BGKV.argmax(-1)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A diagonal Gaussian over (..., C); where std is 0 it is a point, without a density."""

    mean: torch.Tensor
    std: torch.Tensor

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, summed over the last axis."""
        z = (x - self.mean) / self.std
        return (-0.5 * z**2 - self.std.log() - 0.9189385332046727).sum(-1)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of M diagonal Gaussians a position."""

    logits_BGM: torch.Tensor
    mean_BGMC: torch.Tensor
    std_BGMC: torch.Tensor
    has_density = True

    def scale_variance(self, factor: float) -> GaussianMixture:
        """Multiply every component's variance (Divot samples with 0.1).

        Raises:
            ValueError: for a factor that isn't positive.
        """
        if factor <= 0:
            raise ValueError(f"the variance factor must be positive, got {factor}")
        return replace(self, std_BGMC=self.std_BGMC * factor**0.5)

    def sample(self, noise: Noise) -> torch.Tensor:
        """A component, then its normal: (B, G, C)."""
        m = Categorical(self.logits_BGM[:, :, None]).sample(noise.at(purpose=f"{noise.purpose}/component"))
        C = self.mean_BGMC.shape[-1]
        index = m[..., None].expand(-1, -1, 1, C)
        mean, std = (x.gather(2, index)[:, :, 0] for x in (self.mean_BGMC, self.std_BGMC))
        return mean + std * noise.normal(C).to(mean)

    def log_prob(self, x_BGC: torch.Tensor) -> torch.Tensor:
        """Log-density (B, G)."""
        each = Gaussian(self.mean_BGMC, self.std_BGMC).log_prob(x_BGC[:, :, None])
        return (self.logits_BGM.log_softmax(-1) + each).logsumexp(-1)


@dataclass(frozen=True, eq=False)
class Chain:
    """A Markov chain of Gaussian transitions, x_0 (the start) to x_S (the event); its end has no density.

    Args:
        start: the distribution of x_0, over (B, G, C).
        transition: (x, step) to the Gaussian of the next x. x is (*lead, B, G, C); step is an int or integers
            of shape (*lead,) or (*lead, B).
        steps: S.
    """

    start: Gaussian
    transition: Callable[[torch.Tensor, int | torch.Tensor], Gaussian]
    steps: int
    has_density = False

    def path(self, noise: Noise) -> torch.Tensor:
        """The whole path, (S + 1, B, G, C); its noise is `start` and `step` number i."""
        C = self.start.mean.shape[-1]
        x = self.start.mean + self.start.std * noise.at(purpose="start").normal(C).to(self.start.mean)
        path = [x]
        for i in range(self.steps):
            p = self.transition(x, i)
            x = p.mean
            if bool((p.std != 0).any()):
                x = x + p.std * noise.at(step=i, purpose="step").normal(C).to(x)
            path.append(x)
        return torch.stack(path)

    def sample(self, noise: Noise) -> torch.Tensor:
        """The chain's end (B, G, C)."""
        return self.path(noise)[-1]


@dataclass(frozen=True, eq=False)
class Flow:
    """A velocity field v(x, t) that carries noise at t = 1 to data at t = 0, x_t = (1 - t) x + t eps.

    Args:
        velocity: (x (B, G, C), t) to d x / d t, guidance included.
        shape: (B, G, C).
        device: where x lives.
    """

    velocity: Callable[[torch.Tensor, float], torch.Tensor]
    shape: tuple[int, int, int]
    device: torch.device
    has_density = False

    def start(self, noise: Noise) -> torch.Tensor:
        """X at t = 1, float64."""
        return noise.at(purpose="start").normal(self.shape[-1])

    def chain(self, times: list[float], diffusion: Callable[[float], float] = lambda t: 2 * t) -> Chain:
        """The stochastic form, stepped by Euler-Maruyama over `times` (1 … 0); the step that ends at 0 is noiseless.

        The reverse SDE with diffusion w: dx = (v - w s / 2) dt + sqrt(w) dW, whose score is
        s = -((1 - t) v + x) / t; any w >= 0 has the marginals of the flow. xAR takes w = 2t.
        """
        B, G, C = self.shape
        zero = torch.zeros(self.shape, dtype=torch.float64, device=self.device)

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            i = int(step)
            t, dt = times[i], times[i + 1] - times[i]
            w = diffusion(t)
            v = self.velocity(x, t).double()
            drift = v + 0.5 * w * ((1 - t) * v + x) / t
            std = (w * -dt) ** 0.5 if times[i + 1] > 0 else 0.0
            return Gaussian(x + dt * drift, torch.full_like(x[..., :1], std))

        return Chain(Gaussian(zero, torch.ones_like(zero[..., :1])), transition, len(times) - 1)

    def integrate(self, noise: Noise, times: list[float], *, heun: bool = False) -> torch.Tensor:
        """Solve the ODE over `times` (1 … 0) by Euler's or Heun's method: the event, float64 (B, G, C)."""
        x = self.start(noise)
        for t, s in zip(times[:-1], times[1:], strict=True):
            v = self.velocity(x, t).double()
            y = x + (s - t) * v
            if heun and s > 0:
                y = x + (s - t) * 0.5 * (v + self.velocity(y, s).double())
            x = y
        return x

    def sample(self, noise: Noise) -> torch.Tensor:
        """25 Heun steps; a sampler that wants others calls `integrate` or `chain`."""
        return self.integrate(noise, [1 - i / 25 for i in range(26)], heun=True)


@dataclass(frozen=True, eq=False)
class Deterministic:
    """A map from noise to the event, as a distilled student gives (Distilled Decoding, arXiv 2412.17153).

    Args:
        decide: (noise values (B, G, C)) to the event.
        channels: C.
    """

    decide: Callable[[torch.Tensor], torch.Tensor]
    channels: int
    has_density = False

    def sample(self, noise: Noise) -> torch.Tensor:
        """Draw the noise at its absolute positions, and map it."""
        return self.decide(noise.at(purpose="start").normal(self.channels))
