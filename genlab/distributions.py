"""What a generator predicts for its next tokens. Samplers speak to these, never to one paper's model.

Axes: B rows, G positions of the group that is predicted, K sub-token heads, V vocabulary, C channels. A
distribution is sampled with a `Noise` whose `position` is the group's absolute positions, (G,) or (B, G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from genlab.noise import Noise

PART = 2**20
"""Logits that are worked on in float64 at a time: few enough to stay in a CPU's cache, too many for a GPU to mind."""


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
    check: Callable[[], None] | None = None
    """Called before drawing: a generator's refusal of a distribution that its state has moved on from. To draw from
    such a one on purpose, wrap its logits anew."""
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
            ValueError: for a negative tau, or logits that aren't numbers (found here, where every sampler passes).
        """
        if tau < 0:
            raise ValueError(f"temperature must not be negative, got {tau}")
        if not bool(self.logits_BGKV.amax(-1).isfinite().all()):
            raise ValueError("the model's logits aren't numbers: broken weights, or an overflow in low precision")
        if tau == 1:
            return self
        if tau == 0:
            best = F.one_hot(self.logits_BGKV.argmax(-1), self.logits_BGKV.shape[-1]).bool()
            return replace(self, logits_BGKV=torch.where(best, 0.0, -torch.inf))
        return replace(self, logits_BGKV=self.logits_BGKV / tau)

    def top_k(self, k: int) -> Categorical:
        """Keep the k likeliest ids of each head, and those equal to the last kept; 0 keeps all.

        Raises:
            ValueError: for a negative k.
        """
        if k < 0:
            raise ValueError(f"top_k must not be negative, got {k}")
        if k == 0 or k >= self.logits_BGKV.shape[-1]:
            return self
        least = self.logits_BGKV.topk(k, -1).values[..., -1:]
        return replace(self, logits_BGKV=self.logits_BGKV.masked_fill(self.logits_BGKV < least, -torch.inf))

    def top_p(self, p: float) -> Categorical:
        """Keep each head's smallest set of ids whose mass reaches p (nucleus); 1 keeps all.

        Raises:
            ValueError: for p outside (0, 1].
        """
        if not 0 < p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {p}")
        if p == 1:
            return self
        probs, V = self.probs, self.logits_BGKV.shape[-1]
        top = probs.topk(min(V, 64), dim=-1).values  # mostly enough, and five times as fast as sorting 1,024 ids
        if bool((top.sum(-1) < p).any()):
            top = probs.sort(dim=-1, descending=True).values
        n = (top.cumsum(-1) - top < p).sum(-1, keepdim=True)  # the id that crosses p stays
        least = top.gather(-1, (n - 1).clamp_min(0))
        more, equal = probs > least, probs == least
        keep = more | equal & (equal.cumsum(-1) <= n - more.sum(-1, keepdim=True))  # of equals, the first
        return replace(self, logits_BGKV=self.logits_BGKV.masked_fill(~keep, -torch.inf))

    def sample(self, noise: Noise) -> torch.Tensor:
        """Ids (B, G, K), by inverting the cumulative distribution: one uniform a head."""
        return self.pick(noise.uniform(self.logits_BGKV.shape[2]))

    def pick(self, u_BGK: torch.Tensor) -> torch.Tensor:
        """The ids (B, G, K) at these places of the cumulative distribution, in (0, 1)."""
        if self.check is not None:
            self.check()
        B, G, K, V = self.logits_BGKV.shape
        if u_BGK.shape[-2:] != (G, K) or u_BGK.shape[0] not in (1, B) or u_BGK.ndim != 3:
            raise ValueError(
                f"a Categorical over {(B, G, K)} heads can't be drawn with numbers of shape {tuple(u_BGK.shape)}: "
                "give the noise the group's positions, (G,) or (B, G)"
            )
        rows, ids = max(1, PART // V), []
        u_N = u_BGK.expand(B, G, K).reshape(-1)
        for logits, u in zip(self.logits_BGKV.flatten(0, 2).split(rows), u_N.split(rows), strict=True):
            cdf = logits.double().softmax(-1).cumsum(-1)
            ids.append(torch.searchsorted(cdf, u[:, None].to(cdf) * cdf[:, -1:], right=True))
        return torch.cat(ids).clamp(max=V - 1).view(B, G, K)

    def log_prob(self, ids_BGK: torch.Tensor) -> torch.Tensor:
        """Log-probability of ids, summed over heads: (B, G)."""
        chosen = self.logits_BGKV.gather(-1, ids_BGK[..., None])[..., 0].double()
        parts = self.logits_BGKV.flatten(0, 2).split(max(1, PART // self.logits_BGKV.shape[-1]))
        whole = torch.cat([logits.double().logsumexp(-1) for logits in parts])
        return (chosen - whole.view_as(chosen)).sum(-1)

    @property
    def entropy(self) -> torch.Tensor:
        """Of all heads together, nats, (B, G)."""
        log_p = self.log_probs
        return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum((-1, -2))

    def mode(self) -> torch.Tensor:
        """The likeliest id of each head: (B, G, K)."""
        return self.logits_BGKV.argmax(-1)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A diagonal Gaussian over (..., C); where std is 0 it is a point, without a density.

    With `mix`, a linear map, it is the law of mean + mix(z), z white noise: correlated, without `log_prob`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    mix: Callable[[torch.Tensor], torch.Tensor] | None = None

    def at(self, z: torch.Tensor) -> torch.Tensor:
        """The point that standard normal noise z leads to."""
        return self.mean + (self.std * z if self.mix is None else self.mix(z))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, summed over the last axis."""
        assert self.mix is None, "a correlated Gaussian has no log_prob here"
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

    def temperature(self, tau: float) -> GaussianMixture:
        """Draw components by the tau-th root of their weights; 0 takes the likeliest. Their Gaussians stay.

        Raises:
            ValueError: for a negative temperature.
        """
        if tau < 0:
            raise ValueError(f"temperature must not be negative, got {tau}")
        if tau:
            return replace(self, logits_BGM=self.logits_BGM / tau)
        likeliest = F.one_hot(self.logits_BGM.argmax(-1), self.logits_BGM.shape[-1]).bool()
        return replace(self, logits_BGM=torch.zeros_like(self.logits_BGM).masked_fill(~likeliest, -torch.inf))

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
class LowRankMixture:
    """A mixture of M isotropic Gaussians over x = size y, its means m_v + P_v a + shift (in units of y) of low rank.

    With P_v of rank R no tensor of size positions x M x C is ever made (CLaM-TTS, arXiv 2404.02781, section 4.2).
    Leading dimensions are any, usually (B, G).

    Args:
        logits_BGM: of the components.
        a_BGR: a; R may be 0.
        shift_BGC: shift.
        log_std_BGM: deviations, (B, G, 1) where all components share one.
        size_BG1: size.
        mean_TMC: m, one or more tables of it.
        low_rank_MCR: P.
        table_BG: which of the tables holds; None where there is one.
        in_cell: a draw is moved towards its component's m until no other m of its table is nearer.
    """

    logits_BGM: torch.Tensor
    a_BGR: torch.Tensor
    shift_BGC: torch.Tensor
    log_std_BGM: torch.Tensor
    size_BG1: torch.Tensor
    mean_TMC: torch.Tensor
    low_rank_MCR: torch.Tensor
    table_BG: torch.Tensor | None = None
    in_cell: bool = False
    has_density = True

    def scale_deviation(self, factor: float) -> LowRankMixture:
        """Multiply every component's deviation; 0 leaves its mean.

        Raises:
            ValueError: for a negative factor.
        """
        if factor < 0:
            raise ValueError(f"the factor of the deviation must not be negative, got {factor}")
        if factor == 1:
            return self
        return replace(self, log_std_BGM=self.log_std_BGM + (math.log(factor) if factor else -math.inf))

    def mean(self, v: torch.Tensor) -> torch.Tensor:
        """The mean (..., C) of one component (...) each, in units of y."""
        moved = torch.einsum("...cr,...r->...c", self.low_rank_MCR[v], self.a_BGR)
        return self._own_mean(v) + moved + self.shift_BGC

    def _own_mean(self, v: torch.Tensor) -> torch.Tensor:
        return self.mean_TMC[0 if self.table_BG is None else self.table_BG, v]

    def _log_std(self, v: torch.Tensor) -> torch.Tensor:
        every = self.log_std_BGM.shape[-1] == 1
        return self.log_std_BGM if every else self.log_std_BGM.gather(-1, v[..., None])

    @property
    def _square(self) -> torch.Tensor:
        """|m|^2 of each row's table, (..., M), or (M,) where there is one."""
        square = self.mean_TMC.square().sum(-1)
        return square[0] if self.table_BG is None else square[self.table_BG]

    def _with_means(self, x: torch.Tensor, m_TCM: torch.Tensor) -> torch.Tensor:
        """Products of x (..., C) with each row's table (T, C, M): (..., M)."""
        if self.table_BG is None:
            return x @ m_TCM[0]
        out = x.new_empty(*x.shape[:-1], m_TCM.shape[-1])
        for t, m_CM in enumerate(m_TCM):
            here = self.table_BG == t
            out[here] = x[here] @ m_CM
        return out

    def sample(self, noise: Noise) -> torch.Tensor:
        """A component, then its normal: (B, G, C)."""
        drawn = Categorical(self.logits_BGM[:, :, None]).sample(noise.at(purpose=f"{noise.purpose}/component"))
        v, C = drawn[..., 0], self.mean_TMC.shape[-1]
        y = self.mean(v) + self._log_std(v).exp() * noise.normal(C).to(self.mean_TMC)
        return self.size_BG1 * (self._into_cell(y, v) if self.in_cell else y)

    def _into_cell(self, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The point m_v + t r, r = y - m_v, with the largest t <= 1 at which no other mean is nearer than m_v."""
        m, own = self.mean_TMC, self._own_mean(v)
        r = y - own
        own_m, r_m = self._with_means(own, m.mT), self._with_means(r, m.mT)
        away = self._square + own.square().sum(-1, keepdim=True) - 2 * own_m  # |m_v - m_u|^2
        towards = 2 * (r_m - (r * own).sum(-1, keepdim=True))  # 2 r . (m_u - m_v)
        t = torch.where(towards > 1e-9, away.clamp_min(0) / towards.clamp_min(1e-9), torch.inf)
        t = t.scatter(-1, v[..., None], torch.inf).amin(-1, keepdim=True)
        return own + torch.where(t < 1, 0.999 * t, 1.0) * r

    def component_log_prob(self, x_BGC: torch.Tensor) -> torch.Tensor:
        """Log-density of each component (B, G, M)."""
        u, P, m = x_BGC / self.size_BG1 - self.shift_BGC, self.low_rank_MCR, self.mean_TMC
        square = u.square().sum(-1, keepdim=True) - 2 * self._with_means(u, m.mT) + self._square
        M, C, R = P.shape
        if R:
            seen = (u @ P.transpose(0, 1).reshape(C, M * R)).unflatten(-1, (M, R))  # P_v^T u
            crossed = torch.einsum("mcr,tmc->trm", P, m)
            cross = (seen @ self.a_BGR[..., None])[..., 0] - self._with_means(self.a_BGR, crossed)
            outer = (self.a_BGR[..., None] * self.a_BGR[..., None, :]).flatten(-2)
            moved = outer @ torch.einsum("mcr,mcs->rsm", P, P).flatten(0, 1)  # |P_v a|^2
            square = square - 2 * cross + moved
        distance = square.clamp_min(0) * (-2 * self.log_std_BGM).exp()
        return -0.5 * distance - C * (self.log_std_BGM + self.size_BG1.log() + 0.5 * math.log(2 * math.pi))

    def log_prob(self, x_BGC: torch.Tensor) -> torch.Tensor:
        """Log-density (B, G), of draws that are moved nowhere."""
        return (self.logits_BGM.log_softmax(-1) + self.component_log_prob(x_BGC)).logsumexp(-1)

    @property
    def entropy_bound(self) -> torch.Tensor:
        """Entropy of component and point together, nats (B, G): the mixture's where components lie apart, else more."""
        C, least = self.mean_TMC.shape[-1], torch.finfo(self.logits_BGM.dtype).min
        log_pi = self.logits_BGM.log_softmax(-1).clamp_min(least)  # where top-p cut, 0 log 0 is 0
        each = C * (self.log_std_BGM + 0.5 * math.log(2 * math.pi * math.e)) - log_pi
        return (log_pi.exp() * each).sum(-1) + C * self.size_BG1[..., 0].log()


@dataclass(frozen=True, eq=False)
class Chain:
    """A Markov chain of Gaussian transitions, x_0 (the start) to x_S (the event); its end has no density.

    Args:
        start: the distribution of x_0, over (B, G, C).
        transition: (x, step) to the Gaussian of the next x. x is (*lead, B, G, C); step is an int or integers
            of shape (*lead,), (*lead, B) or (*lead, B, G).
        steps: S.
        hold: (x, step, the Gaussian of `transition` there) to a transition that holds what the network said there: a
            draft of the later steps, without the last, that evaluates nothing. None: it isn't known how.
    """

    start: Gaussian
    transition: Callable[[torch.Tensor, int | torch.Tensor], Gaussian]
    steps: int
    hold: Callable[[torch.Tensor, torch.Tensor, Gaussian], Callable[[torch.Tensor, torch.Tensor], Gaussian]] | None = (
        None
    )
    has_density = False

    def path(self, noise: Noise) -> torch.Tensor:
        """The whole path, (S + 1, B, G, C); its noise is `start` and `step` number i."""
        B, G, C = self.start.mean.shape
        x = self.start.at(noise.at(purpose="start").normal(C).to(self.start.mean))
        path, z = [x], self._step_noise(noise, B, G, C)
        for i in range(self.steps):
            p = self.transition(x, i)
            x = p.at(z(i).to(x)) if bool((p.std != 0).any()) else p.mean
            path.append(x)
        return torch.stack(path)

    def _step_noise(self, noise: Noise, B: int, G: int, C: int) -> Callable[[int], torch.Tensor]:
        """The noise of step i, (B, G, C): many steps at a time, where drawing each by itself would cost the most."""
        many = max(1, min(self.steps, (1 << 18) // (B * G * C)))
        held: dict[int, torch.Tensor] = {}
        place = torch.atleast_2d(torch.as_tensor(noise.position, device=noise.seeds_B.device))

        def at(i: int) -> torch.Tensor:
            if i not in held:
                held.clear()
                steps = torch.arange(i, min(i + many, self.steps), device=place.device)
                position, step = place.repeat(1, len(steps)), steps.repeat_interleave(place.shape[1])
                z = noise.at(position, step, "step").normal(C).unflatten(1, (len(steps), -1))
                held.update(zip(steps.tolist(), z.unbind(1), strict=True))
            return held[i]

        return at

    def sample(self, noise: Noise) -> torch.Tensor:
        """The chain's end (B, G, C)."""
        return self.path(noise)[-1]

    def temperature(self, tau: float) -> Chain:
        """Multiply every step's noise by tau (MAR's temperature); the start keeps its own.

        Raises:
            ValueError: for a negative tau.
        """
        if tau < 0:
            raise ValueError(f"temperature must not be negative, got {tau}")

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            p = self.transition(x, step)
            return Gaussian(p.mean, p.std * tau)

        def hold(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Callable[[torch.Tensor, torch.Tensor], Gaussian]:
            assert self.hold is not None
            held = self.hold(x, step, Gaussian(p.mean, p.std / tau))
            return lambda x, step: Gaussian((q := held(x, step)).mean, q.std * tau)

        known = self.hold is not None and tau > 0
        return self if tau == 1 else Chain(self.start, transition, self.steps, hold if known else None)

    def last_std(self, std: float) -> Chain:
        """Give the last step this standard deviation; where it is noiseless, its event has no density.

        Raises:
            ValueError: for a negative std.
        """
        if std < 0:
            raise ValueError(f"a standard deviation must not be negative, got {std}")

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            p = self.transition(x, step)
            last = torch.as_tensor(step, device=x.device) == self.steps - 1
            return Gaussian(p.mean, torch.where(along(last, x), std, p.std))

        def hold(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Callable[[torch.Tensor, torch.Tensor], Gaussian]:
            assert self.hold is not None
            held = self.hold(x, step, p)

            def later(x: torch.Tensor, step: torch.Tensor) -> Gaussian:
                q = held(x, step)
                return Gaussian(q.mean, torch.where(along(step == self.steps - 1, x), std, q.std))

            return later

        return Chain(self.start, transition, self.steps, None if self.hold is None else hold)

    def select(self, others: Sequence[Chain], index_BJ: torch.Tensor) -> Chain:
        """Chains of one position each, self first, as one of J positions: position j of row b is number index_BJ[b, j].

        All have the same steps. `DiffusionChain` does it in one evaluation, this general one in one each.
        """
        parts: list[Chain] = [self, *others]
        B, J = index_BJ.shape

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            at = along(torch.as_tensor(step, device=x.device), x)
            at = at.expand(*x.shape[:-1], 1)[..., 0] if at.ndim else at.expand(x.shape[:-1])
            front, at = x.movedim(-2, 0)[..., None, :], at.movedim(-1, 0)[..., None]  # (J, *lead, B, 1, C)
            each = [part.transition(front, at) for part in parts]

            def pick(values: list[torch.Tensor]) -> torch.Tensor:
                stacked = torch.stack([v.expand_as(front)[..., 0, :].movedim(0, -2) for v in values])
                index = index_BJ[..., None].expand(stacked.shape[1:])[None]
                return stacked.gather(0, index)[0]

            return Gaussian(pick([p.mean for p in each]), pick([p.std for p in each]))

        start = Gaussian(self.start.mean.expand(B, J, -1), self.start.std.expand(B, J, -1))
        return Chain(start, transition, self.steps, self.hold)


class JointChain(Chain):
    """A chain whose transition looks at all positions at once, so that they stand at one step; `step` is an int."""


def along(step: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Steps of shape (), (*lead,), (*lead, B) or (*lead, B, G), shaped to broadcast with x (*lead, B, G, C)."""
    if step.ndim not in (0, x.ndim - 3, x.ndim - 2, x.ndim - 1):
        raise ValueError(
            f"steps {tuple(step.shape)} don't go with x {tuple(x.shape)}: give (*lead,), (*lead, B) or (*lead, B, G)"
        )
    return step[(...,) + (None,) * (x.ndim - step.ndim)] if step.ndim else step


@dataclass(frozen=True, eq=False)
class Flow:
    """A velocity field v(x, t) that carries noise at t = 1 to data at t = 0, x_t = (1 - t) x + t eps.

    A stage of a longer flow covers times `begin` to `end` and brings its own start; the grids of times that
    `chain` and `integrate` take run from 1 to 0 all the same, and are stretched over that interval.

    Args:
        velocity: (x (B, G, C), t) to d x / d t, guidance included.
        shape: (B, G, C).
        device: where x lives.
        begin: the time of the start.
        end: the time of the event.
        source: the start's distribution; None: a standard normal.
        eps: (x, v, t) to -t times the score, for paths other than the one above; on that one it is the expected noise.
        method: the integrator that its generator recommends.
        steps: and how many steps.
        prepare: is told the times that velocity will be asked for, as soon as they are known.
    """

    velocity: Callable[[torch.Tensor, float], torch.Tensor]
    shape: tuple[int, int, int]
    device: torch.device
    begin: float = 1.0
    end: float = 0.0
    source: Gaussian | None = None
    eps: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = lambda x, v, t: (1 - t) * v + x
    method: Literal["euler-maruyama", "euler", "heun"] = "euler-maruyama"
    steps: int = 25
    prepare: Callable[[list[float]], None] = lambda times: None
    has_density = False

    @property
    def start(self) -> Gaussian:
        """The distribution of x at `begin`, float64."""
        if self.source is not None:
            return self.source
        zero = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        return Gaussian(zero, torch.ones_like(zero[..., :1]))

    def _grid(self, times: list[float]) -> list[float]:
        """The times of this flow's own interval, which it is told to prepare for."""
        if (self.begin, self.end) != (1, 0):
            times = [self.end + (self.begin - self.end) * u for u in times]
        self.prepare(times[:-1])
        return times

    def chain(self, times: list[float], diffusion: Callable[[float], float] = lambda t: 2 * t) -> Chain:
        """The stochastic form, stepped by Euler-Maruyama over `times` (1 … 0); a step that ends at t = 0 is noiseless.

        The reverse SDE with diffusion w: dx = (v - w s / 2) dt + sqrt(w) dW, whose score is s = -E[eps | x] / t
        with E[eps | x] = (1 - t) v + x; any w >= 0 has the marginals of the flow. xAR takes w = 2t.
        """
        times = self._grid(times)

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            i = int(step)
            t, dt = times[i], times[i + 1] - times[i]
            w = diffusion(t)
            v = self.velocity(x, t).double()
            drift = v + 0.5 * w * self.eps(x, v, t) / t
            std = (w * -dt) ** 0.5 if times[i + 1] > 0 else 0.0
            return Gaussian(x + dt * drift, torch.full_like(x[..., :1], std))

        return Chain(self.start, transition, len(times) - 1)

    def integrate(self, noise: Noise, times: list[float], *, heun: bool = False) -> torch.Tensor:
        """Solve the ODE over `times` (1 … 0) by Euler's or Heun's method: the event, float64 (B, G, C)."""
        times = self._grid(times)
        x = self.start.at(noise.at(purpose="start").normal(self.shape[-1]))
        for t, s in zip(times[:-1], times[1:], strict=True):
            v = self.velocity(x, t).double()
            y = x + (s - t) * v
            if heun and s > 0:  # at t = 0 the velocity is not trained
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
