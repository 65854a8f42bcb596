"""Verify and accept, once for all samplers: turn a draft from q into a draw from p that is often the draft itself.

A draft x ~ q is accepted with probability min(1, p(x) / q(x)); else the place gets a draw from the residual, the
normalised positive part of p - q. What comes out follows p exactly, and no rule keeps the draft more often
(maximal coupling; Leviathan et al., arXiv 2211.17192, theorem 1). `docs/exactness.md` has the proofs.

The residual is drawn in closed form where there is one: from the table of a single categorical head, or by
reflection where two Gaussians share their covariance. Elsewhere by rejection: propose y ~ p, keep it with
probability (1 - q(y) / p(y))+. That takes one proposal a *verified* place on average (probability Z of a rejection,
times 1 / Z proposals), with a heavy tail; the number of trials is reported and never capped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.noise import Noise

Distribution = Categorical | Gaussian | GaussianMixture
Heads = Literal["joint", "each"]

_BLOCK = 1 << 21  # numbers a block of trials may hold
_TRIALS = 8  # the first block's
_HOPELESS = 1 << 33  # trials: at so low a rate of success p and q are equal but for rounding


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of a batch of drafts."""

    accepted: torch.Tensor
    """Which drafts stand, (B, G)."""
    replacement: torch.Tensor
    """The event to use, like the draft: the draft itself where it stands, else a draw from the residual. Places that
    were not asked for keep their draft."""
    trials: torch.Tensor
    """Proposals the residual took, (B, G): 0 where none was needed, 1 for a closed form."""
    log_accept: torch.Tensor
    """Log of the probability with which the draft is accepted, (B, G), float64."""

    @property
    def leading(self) -> torch.Tensor:
        """How many drafts stand before each row's first rejection, (B,)."""
        return self.accepted.long().cumprod(1).sum(1)


class _CategoricalTable:
    """Look-ups at flat places (b, g); a table with one row serves every row."""

    def __init__(self, d: Categorical) -> None:
        self.log_BGKV = d.log_probs
        self.K = self.log_BGKV.shape[2]

    @cached_property
    def cdf_BGKV(self) -> torch.Tensor:
        return self.log_BGKV.exp().cumsum(-1)

    def _at(self, b: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B, G = self.log_BGKV.shape[:2]
        k = torch.arange(self.K, device=b.device)
        return (b if B > 1 else b * 0)[:, None, None], (g if G > 1 else g * 0)[:, None, None], k

    def heads(self, b: torch.Tensor, g: torch.Tensor, x_NTK: torch.Tensor) -> torch.Tensor:
        """Log-probability of each head's id, (N, T, K)."""
        index = (*self._at(b, g), x_NTK)
        return self.log_BGKV[index]

    def log_prob(self, b: torch.Tensor, g: torch.Tensor, x_NTK: torch.Tensor) -> torch.Tensor:
        return self.heads(b, g, x_NTK).sum(-1)

    def draw(self, b: torch.Tensor, g: torch.Tensor, noise: Noise, trials: int) -> torch.Tensor:
        return invert(self.cdf_BGKV, self._at(b, g), noise.uniform(trials, self.K)[:, 0])


class _GaussianTable:
    """A coordinate without spread is a point: it says yes (0) or no (-inf)."""

    def __init__(self, d: Gaussian) -> None:
        if d.mix is not None:
            raise ValueError("only diagonal Gaussians can be verified; this one mixes its coordinates")
        mean, std = d.mean.double(), d.std.double().expand_as(d.mean)
        self.mean, self.std = mean, std

    def _at(self, b: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, G = self.mean.shape[:2]
        at = (b if B > 1 else b * 0), (g if G > 1 else g * 0)
        return self.mean[at][:, None], self.std[at][:, None]

    def log_prob(self, b: torch.Tensor, g: torch.Tensor, x_NTC: torch.Tensor) -> torch.Tensor:
        mean, std = self._at(b, g)
        x = x_NTC.double()
        z = (x - mean) / std
        density = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
        point = torch.where(x == mean, 0.0, -math.inf)
        return torch.where(std == 0, point, density).sum(-1)

    def draw(self, b: torch.Tensor, g: torch.Tensor, noise: Noise, trials: int) -> torch.Tensor:
        mean, std = self._at(b, g)
        return mean + std * noise.normal(trials, mean.shape[-1])[:, 0]


class _MixtureTable:
    def __init__(self, d: GaussianMixture) -> None:
        self.log_BGM = d.logits_BGM.double().log_softmax(-1)
        self.mean, self.std = d.mean_BGMC.double(), d.std_BGMC.double().expand_as(d.mean_BGMC)
        if bool((self.std <= 0).any()):
            raise ValueError("a mixture's component of standard deviation 0 has no density: give each a spread")
        self.cdf_BG1M = self.log_BGM.exp().cumsum(-1)[:, :, None]

    def _at(self, b: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, G = self.log_BGM.shape[:2]
        return (b if B > 1 else b * 0), (g if G > 1 else g * 0)

    def log_prob(self, b: torch.Tensor, g: torch.Tensor, x_NTC: torch.Tensor) -> torch.Tensor:
        at = self._at(b, g)
        each = Gaussian(self.mean[at][:, None], self.std[at][:, None]).log_prob(x_NTC.double()[:, :, None])
        return (self.log_BGM[at][:, None] + each).logsumexp(-1)

    def draw(self, b: torch.Tensor, g: torch.Tensor, noise: Noise, trials: int) -> torch.Tensor:
        b, g = (i[:, None, None] for i in self._at(b, g))
        component = noise.at(purpose=f"{noise.purpose}/component").uniform(trials, 1)[:, 0]
        m = invert(self.cdf_BG1M, (b, g, torch.zeros_like(b)), component)
        mean, std = self.mean[b, g, m][:, :, 0], self.std[b, g, m][:, :, 0]
        return mean + std * noise.normal(trials, mean.shape[-1])[:, 0]


_TABLES: dict[type, Any] = {Categorical: _CategoricalTable, Gaussian: _GaussianTable, GaussianMixture: _MixtureTable}


def invert(cdf: torch.Tensor, at: tuple[torch.Tensor, ...], u: torch.Tensor) -> torch.Tensor:
    """Ids at the places u in (0, 1) of cumulative tables: the first id whose cumulative mass is above u * total.

    Args:
        cdf: cumulative masses (..., V), unnormalised.
        at: indices of cdf's leading axes that broadcast to u; a table may serve many draws, and is not copied.
        u: places.
    """
    V = cdf.shape[-1]
    last = (*at, torch.full((), V - 1, device=cdf.device))
    u = u * cdf[last]
    low = torch.zeros_like(u, dtype=torch.long)
    high = torch.full_like(low, V - 1)
    for _ in range(max(1, V - 1).bit_length()):
        middle = (low + high) // 2
        index = (*at, middle)
        right = cdf[index] <= u
        low, high = torch.where(right & (low < high), middle + 1, low), torch.where(right, high, middle)
    return low


def noise_at(noise: Noise, b: torch.Tensor, g: torch.Tensor, B: int, G: int) -> Noise:
    """The noise of single places (b, g) out of (B, G): draws get the shape (N, 1, *shape).

    Raises:
        ValueError: if several places of a row would share their noise.
    """

    def pick(x: int | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(x, device=b.device).expand(B, G)[b, g][:, None]

    if G > 1 and all(getattr(x, "shape", (1,))[-1:] in ((), (1,)) for x in (noise.position, noise.step)):
        raise ValueError(f"{G} places a row need noise of as many positions or steps: noise.at(position=...)")
    return Noise(noise.seeds_B[b], pick(noise.position), pick(noise.step), noise.purpose)


def verify(
    p: Distribution,
    q: Distribution,
    draft: torch.Tensor,
    noise: Noise,
    *,
    heads: Heads = "joint",
    in_order: bool = False,
    where: torch.Tensor | None = None,
) -> Verdict:
    """Accept drafts, or replace them, such that every place follows p.

    A Gaussian's coordinates of standard deviation 0 are points, and must be so in p and q alike: there a draft
    stands only if both means are equal to the bit. Where just one of the two is a point they can never agree
    (mutually singular), which is a mistake of the set-up: refused.

    Args:
        p: the target, over (B, G) places or one row for all.
        q: what the draft was drawn from: the same class and sizes, after the same temperature, top-k and top-p.
        draft: ids (B, G, K) or vectors (B, G, C), drawn from q independently of the noise given here.
        noise: fresh noise: position (G,) or (B, G), and the step, say which. A rejection trial adds a purpose of its
            own, so nothing is ever used twice.
        heads: several categorical heads. `joint`: one test of the whole token, the residual of the product by
            rejection. `each`: every head is tested on its own (heads are independent, so this is the sequential rule
            too); closed form, accepts less often.
        in_order: places of a row follow one another, and only the first rejection's replacement is wanted.
        where: (B, G), the places that count; others are neither accepted nor replaced.

    Raises:
        ValueError: if p and q don't go together, or q gives a draft no probability.
    """
    kind = type(p)
    if kind is not type(q) or kind not in _TABLES:
        raise ValueError(f"can't verify a draft of {type(q).__name__} against {kind.__name__}: need two of {_names()}")
    B, G = draft.shape[:2]
    P, Q = _TABLES[kind](p), _TABLES[kind](q)
    if kind is Gaussian:
        _same_points(P, Q)
    where = torch.ones(B, G, dtype=torch.bool, device=draft.device) if where is None else where
    b, g = where.nonzero(as_tuple=True)
    x = draft[b, g][:, None]
    head = noise_at(noise.at(purpose=f"{noise.purpose}/accept"), b, g, B, G)
    each = kind is Categorical and (heads == "each" or P.K == 1)
    if each:
        lp, lq = P.heads(b, g, x)[:, 0], Q.heads(b, g, x)[:, 0]
        stands = head.uniform(P.K)[:, 0].log() < lp - lq
    else:
        lp, lq = P.log_prob(b, g, x), Q.log_prob(b, g, x)
        stands = head.uniform(1)[:, 0].log() < lp - lq
    if bool((lp.isnan() | lq.isnan()).any()):
        raise ValueError("a draft or its density isn't a number: broken weights, or an overflow in low precision")
    if bool(lq.isneginf().any()):
        i = int(lq.isneginf().any(-1).nonzero()[0, 0])
        raise ValueError(
            f"the draft at row {int(b[i])}, place {int(g[i])} has probability 0 under q: q must be the distribution "
            "it was drawn from (apply temperature, top-k and top-p before drawing)"
        )
    log_accept = torch.zeros(B, G, dtype=torch.float64, device=draft.device).fill_(-math.inf)
    log_accept[b, g] = (lp - lq).clamp(max=0).sum(-1)
    accepted = torch.zeros_like(where)
    accepted[b, g] = stands.all(-1)
    open_ = where & ~accepted
    if in_order:
        open_ &= open_.long().cumsum(1) == 1
    replacement, trials = draft.clone(), torch.zeros(B, G, dtype=torch.long, device=draft.device)
    keep = open_[b, g]
    b, g = b[keep], g[keep]
    if len(b):
        again = noise_at(noise.at(purpose=f"{noise.purpose}/residual"), b, g, B, G)
        x, stands = x[keep], stands[keep]
        if each:
            y = torch.where(stands, x[:, 0], _residual(P, Q, b, g, again))
            n = torch.ones_like(b)
        elif kind is Gaussian:
            y, n = _gaussian_residual(P, Q, b, g, x, again)
        else:
            y, n = _reject(P, Q, b, g, again)
        replacement[b, g], trials[b, g] = y.to(draft), n
    return Verdict(accepted, replacement, trials, log_accept)


def couple(p_old: Distribution, token: torch.Tensor, p_new: Distribution, noise: Noise) -> torch.Tensor:
    """Carry a draw from p_old over to p_new, changing it as seldom as can be (accept, or residual): like `token`.

    The result follows p_new, which becomes its recorded q: what keeps drafts of consecutive Jacobi iterations alike.
    """
    return verify(p_new, p_old, token, noise, heads="each").replacement


def gumbel_draw(p: Categorical, noise: Noise) -> torch.Tensor:
    """The id with the largest log p + Gumbel noise, (B, G, K): a draw from p.

    With the same noise and another p it is likely the same id, and never depends on any draft: Gumbel coupling.
    """
    return (p.log_probs + noise.gumbel(*p.logits_BGKV.shape[2:])).argmax(-1)


def _names() -> str:
    return ", ".join(k.__name__ for k in _TABLES)


def _same_points(P: _GaussianTable, Q: _GaussianTable) -> None:
    if bool(((P.std > 0) != (Q.std > 0)).any()):
        raise ValueError(
            "one of the two Gaussians is a point (standard deviation 0) where the other has a density, so that no "
            "draft can ever be accepted: stop drafting before the noiseless step, or give it a small variance in both"
        )


def _residual(
    P: _CategoricalTable, Q: _CategoricalTable, b: torch.Tensor, g: torch.Tensor, noise: Noise
) -> torch.Tensor:
    """Each head's (p - q)+, by its table: (N, K). Tables of fewer places than are asked for are subtracted once."""
    log_p, log_q = P.log_BGKV, Q.log_BGKV
    if log_p.shape[:2] == log_q.shape[:2] and log_p.shape[0] * log_p.shape[1] > len(b):
        log_p, log_q = (x[b if len(x) > 1 else b * 0, g if x.shape[1] > 1 else g * 0][:, None] for x in (log_p, log_q))
        b, g = torch.arange(len(b), device=b.device), g * 0
    p = log_p.exp()
    mass = (p - log_q.exp()).clamp(min=0)
    # equal but for rounding: such a rejection has probability 0 in real arithmetic, and p is as good
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, p)
    B, G = mass.shape[:2]
    at = (b if B > 1 else b * 0)[:, None], (g if G > 1 else g * 0)[:, None], torch.arange(P.K, device=b.device)
    return invert(mass.cumsum(-1), at, noise.uniform(P.K)[:, 0])


def _gaussian_residual(
    P: _GaussianTable, Q: _GaussianTable, b: torch.Tensor, g: torch.Tensor, x_N1C: torch.Tensor, noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reflection where the covariances are equal (Bou-Rabee et al., arXiv 1805.00452, 2.1.1), rejection elsewhere."""
    (pm, ps), (qm, qs) = (tuple(v[:, 0] for v in table._at(b, g)) for table in (P, Q))
    spread = ps > 0
    mirror = ((ps == qs) & (spread | (pm == qm))).all(-1)
    std = torch.where(spread, ps, 1.0)
    shift = torch.where(spread, (qm - pm) / std, 0.0)
    axis = shift / shift.norm(dim=-1, keepdim=True)
    z = torch.where(spread, (x_N1C[:, 0].double() - qm) / std, 0.0)
    y = pm + ps * (z - 2 * (z * axis).sum(-1, keepdim=True) * axis)
    trials = torch.ones_like(b)
    if not bool(mirror.all()):
        rest = (~mirror).nonzero()[:, 0]
        y[rest], trials[rest] = _reject(P, Q, b[rest], g[rest], noise.rows(rest))
    return y, trials


def _reject(P: Any, Q: Any, b: torch.Tensor, g: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose from p, keep with (1 - q / p)+: events (N, ·) and the number of proposals (N,).

    A block of trials at a time, twice as many every time: few places stay open for long, and what a block costs is its
    being there, not its size.
    """
    found: torch.Tensor | None = None
    trials, before, block, i = torch.zeros_like(b), 0, _TRIALS, 0
    left = torch.arange(len(b), device=b.device)
    while len(left):
        if before > _HOPELESS:
            raise RuntimeError(f"no proposal kept in {before} trials: p and q are equal but for rounding")
        here, bl, gl = noise.rows(left), b[left], g[left]
        y = P.draw(bl, gl, here.at(purpose=f"{noise.purpose}/{i}"), block)
        u = here.at(purpose=f"{noise.purpose}/keep{i}").uniform(block)[:, 0]
        keep = u < -torch.expm1(Q.log_prob(bl, gl, y) - P.log_prob(bl, gl, y))
        if found is None:
            found = torch.empty(len(b), y.shape[-1], dtype=y.dtype, device=y.device)
        done, first = keep.any(1), keep.int().argmax(1)
        found[left[done]] = y[done, first[done]]
        trials[left[done]] = before + first[done] + 1
        before, left, i = before + block, left[~done], i + 1
        size = max(1, len(left)) * y.shape[-1]
        block = max(1, min(2 * block, _BLOCK // size))
    assert found is not None
    return found, trials


def draw(d: Distribution, noise: Noise) -> torch.Tensor:
    """Events (B, G, ·) of any distribution that can be verified; one row of it serves all B rows of the noise.

    Raises:
        ValueError: if it can't be verified.
    """
    if type(d) not in _TABLES:
        raise ValueError(f"can't draw from {type(d).__name__} here: need one of {_names()}")
    shapes = {"Categorical": "logits_BGKV", "Gaussian": "mean", "GaussianMixture": "logits_BGM"}
    B, G = len(noise.seeds_B), getattr(d, shapes[type(d).__name__]).shape[1]
    b, g = (i.flatten() for i in torch.meshgrid(torch.arange(B), torch.arange(G), indexing="ij"))
    b, g = b.to(noise.seeds_B.device), g.to(noise.seeds_B.device)
    return _TABLES[type(d)](d).draw(b, g, noise_at(noise, b, g, B, G), 1)[:, 0].unflatten(0, (B, G))
