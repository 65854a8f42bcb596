"""Tests of draws against a law that is known exactly: p-values, and the smallest difference each could have seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize, stats

from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.noise import Noise
from samplers.verify import Distribution, Verdict, draw, verify

POWER = 0.99


@dataclass(frozen=True)
class Check:
    """One test: the hypothesis is that the draws follow the law."""

    name: str
    kind: Literal["cells", "ks", "mean", "covariance", "share", "equal", "energy"]
    n: int
    """Draws."""
    statistic: float
    """Chi-square statistic, or the largest distance of cumulative distributions (ks)."""
    df: int
    """Degrees of freedom, where it has some."""
    p: float
    null: tuple[float, float, float] | None = None
    """Energy: skew, mean and standard deviation of the statistic where there is no difference."""

    def critical(self, alpha: float) -> float:
        """The statistic above which the hypothesis is refused."""
        if self.kind == "ks":
            return _ks_critical(alpha) / math.sqrt(self.n)
        if self.null is not None:
            return float(stats.pearson3.isf(alpha, *self.null))
        return float(stats.chi2.isf(alpha, self.df))

    def smallest(self, alpha: float) -> float:
        """The smallest difference that is seen with probability `POWER` whatever its shape.

        Of total variation (cells, share), of cumulative distributions (ks), in standard deviations (mean), as the
        Frobenius norm of the whitened covariance's error (covariance); energy: a distance, in units of the mean one,
        that clears the critical one by as much as its spread without a difference allows.
        """
        if self.kind == "equal":
            return 0.0
        if self.kind == "ks":  # Dvoretzky-Kiefer-Wolfowitz with Massart's constant
            return self.critical(alpha) + math.sqrt(math.log(2 / (1 - POWER)) / (2 * self.n))
        if self.null is not None:
            return self.critical(alpha) + float(stats.norm.isf(1 - POWER)) * self.null[2]
        if self.df == 0:
            return math.nan
        noncentrality = _noncentrality(self.df, alpha)
        scale = {"cells": 0.25, "share": 0.25, "mean": 1.0, "covariance": 2.0}[
            self.kind
        ]  # TV <= sqrt(chi2 distance) / 2
        return math.sqrt(scale * noncentrality / self.n)

    def power(self, alpha: float) -> float:
        """A lower bound (99 % confident) of the probability that another run of this very sampler is refused."""
        if self.kind == "equal" or self.df == 0:
            return float(self.p < alpha)
        if self.p >= alpha:  # not even this run was
            return 0.0
        if self.kind == "ks":
            least = self.statistic - math.sqrt(math.log(2 / 0.01) / (2 * self.n))
            gap = max(0.0, least - self.critical(alpha))
            return max(0.0, 1 - 2 * math.exp(-2 * self.n * gap**2))
        if math.isinf(self.statistic):
            return 1.0
        if stats.chi2.cdf(self.statistic, self.df) <= 0.99:
            return 0.0
        least = _solve(lambda x: 0.99 - stats.ncx2.cdf(self.statistic, self.df, x))
        return float(stats.ncx2.sf(self.critical(alpha), self.df, least))


@lru_cache(maxsize=1024)
def _ks_critical(alpha: float) -> float:
    return float(stats.kstwobign.isf(alpha))


@lru_cache(maxsize=1024)
def _noncentrality(df: int, alpha: float) -> float:
    """Of the chi-square law that exceeds the critical value with probability `POWER`."""
    critical = float(stats.chi2.isf(alpha, df))
    return _solve(lambda x: stats.ncx2.sf(critical, df, x) - POWER)


def _solve(f: Callable[[float], float]) -> float:
    top = 1.0
    while f(top) < 0:
        top *= 2
    return float(optimize.brentq(f, 1e-9, top))


def check_cells(name: str, counts: np.ndarray, law: np.ndarray, kind: Literal["cells", "share"] = "cells") -> Check:
    """Chi-square of counts against probabilities; cells expecting fewer than 5 are merged; an impossible id: p = 0."""
    n, expected = int(counts.sum()), law * counts.sum()
    if counts[law == 0].sum() > 0:
        return Check(name, kind, n, math.inf, 1, 0.0)
    large = expected >= 5
    observed, wanted = counts[large], expected[large]
    rest = expected[~large].sum()
    if rest > 0:
        if rest >= 5 or not len(wanted):
            observed, wanted = np.append(observed, counts[~large].sum()), np.append(wanted, rest)
        else:  # too little for a cell of its own: the least of the others takes it
            least = wanted.argmin()
            observed, wanted = observed.copy(), wanted.copy()
            observed[least] += counts[~large].sum()
            wanted[least] += rest
    statistic, df = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    return Check(name, kind, n, statistic, df, float(stats.chi2.sf(statistic, df)) if df else 1.0)


def check_ks(name: str, x: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> Check:
    """Kolmogorov-Smirnov of draws against a cumulative distribution."""
    n, u = len(x), np.sort(cdf(x))
    grid = np.arange(n + 1) / n
    distance = float(max((grid[1:] - u).max(), (u - grid[:-1]).max()))
    return Check(name, "ks", n, distance, 0, float(stats.kstwobign.sf(distance * math.sqrt(n))))


def check_normal(
    name: str, x_ND: torch.Tensor, mean_D: torch.Tensor, cov_DD: torch.Tensor, seed: int = 0
) -> list[Check]:
    """Draws against a Gaussian: mean, covariance, and Kolmogorov-Smirnov on projections (whitened: all axes alike)."""
    root = torch.linalg.cholesky(cov_DD)
    y = torch.linalg.solve_triangular(root, (x_ND.double() - mean_D).T, upper=False).T
    n, d = y.shape
    mean = float(n * y.mean(0).square().sum())
    second = (y.T @ y).numpy()  # the mean is known: diagonals are chi-square, exactly
    upper = np.triu_indices(d, 1)
    diagonal = np.sqrt(2 * n) * (np.sqrt(np.diag(second) / n) - np.sqrt(1 - 1 / (2 * n)))  # Fisher: nearly normal
    spread = float((second[upper] ** 2).sum() / n + (diagonal**2).sum())
    df = d * (d + 1) // 2
    checks = [
        Check(f"{name}: mean", "mean", n, mean, d, float(stats.chi2.sf(mean, d))),
        Check(f"{name}: covariance", "covariance", n, spread, df, float(stats.chi2.sf(spread, df))),
    ]
    axes = [torch.nn.functional.one_hot(torch.tensor(i), d).double() for i in sorted({0, d - 1})]
    axes += list(Noise(torch.tensor([seed]), purpose="axes").normal(2, d)[0]) if d > 1 else []
    for i, axis in enumerate(axes):
        checks.append(check_ks(f"{name}: projection {i}", (y @ (axis / axis.norm())).numpy(), stats.norm.cdf))
    return checks


def top_cells(p: Categorical, cells: int = 256) -> list[torch.Tensor]:
    """For each head, which cell an id falls into, (V,): its likeliest ids one each, the others together."""
    K, V = p.logits_BGKV.shape[2:]
    top = min(V, max(2, int(cells ** (1 / K))))
    maps = []
    for probs in p.probs[0, 0]:
        order = probs.argsort(descending=True)
        maps.append(torch.empty_like(order).scatter(0, order, torch.arange(V)).clamp(max=top - 1))
    return maps


def check_event(name: str, p: Distribution, event: torch.Tensor) -> list[Check]:
    """Draws (n, ·) against one place's distribution."""
    if isinstance(p, Categorical):
        code, law = torch.zeros(len(event), dtype=torch.long), torch.ones(1, dtype=torch.float64)
        for k, cell in enumerate(top_cells(p)):
            size = int(cell.max()) + 1
            head = torch.zeros(size, dtype=torch.float64).index_add(0, cell, p.probs[0, 0, k])
            code, law = code * size + cell[event[:, k]], (law[:, None] * head).flatten()
        return [check_cells(name, torch.bincount(code, minlength=len(law)).numpy(), law.numpy())]
    if isinstance(p, Gaussian):
        mean, std = p.mean[0, 0].double(), p.std.expand_as(p.mean)[0, 0].double()
        free = std > 0
        checks = check_normal(name, event[:, free], mean[free], torch.diag(std[free] ** 2)) if bool(free.any()) else []
        stuck = bool((event[:, ~free].double() == mean[~free]).all())
        return (
            [*checks, Check(f"{name}: points", "equal", len(event), 0.0, 0, float(stuck))] if not free.all() else checks
        )
    C, checks = event.shape[-1], []
    weights = p.logits_BGM[0, 0].double().softmax(-1).numpy()
    axes = [*torch.eye(C, dtype=torch.float64)[:1], *Noise(torch.tensor([0]), purpose="axes").normal(2, C)[0]]
    for i, axis in enumerate(axes):
        centre = (p.mean_BGMC[0, 0].double() @ axis).numpy()
        width = (p.std_BGMC.expand_as(p.mean_BGMC)[0, 0].double() ** 2 @ axis**2).sqrt().numpy()
        cdf = lambda x, m=centre, s=width: stats.norm.cdf((x[:, None] - m) / s) @ weights  # noqa: E731
        checks.append(check_ks(f"{name}: projection {i}", (event.double() @ axis).numpy(), cdf))
    return checks


def log_ratio(p: Distribution, q: Distribution, x: torch.Tensor, heads: str = "joint") -> torch.Tensor:
    """Log p / q of n events (n, ·) at one place, (n, 1); with heads `each`, of every head, (n, K)."""
    if isinstance(p, Categorical) and isinstance(q, Categorical):
        lp, lq = (d.log_probs[0, 0][torch.arange(x.shape[-1]), x] for d in (p, q))  # (n, K)
        return lp - lq if heads == "each" else lp.sum(-1, keepdim=True) - lq.sum(-1, keepdim=True)
    if isinstance(p, Gaussian) and isinstance(q, Gaussian):
        free = p.std.expand_as(p.mean)[0, 0] > 0
        a, b = (Gaussian(d.mean[0, 0, free].double(), d.std.expand_as(d.mean)[0, 0, free].double()) for d in (p, q))
        y = x[:, free].double()
        if bool((p.mean[0, 0, ~free] != q.mean[0, 0, ~free]).any()):
            return torch.full_like(y[:, :1], -math.inf)
        return (a.log_prob(y) - b.log_prob(y))[:, None]
    assert isinstance(p, GaussianMixture)
    assert isinstance(q, GaussianMixture)
    return (p.log_prob(x[None])[0] - q.log_prob(x[None])[0])[:, None]


def log_accept(p: Distribution, q: Distribution, x: torch.Tensor, heads: str = "joint") -> torch.Tensor:
    """Log of the right probability of accepting each of n drafts (n, ·) at one place, (n,): sum of min(0, log p / q).

    It is computed here from the two distributions, not asked of the verifier.
    """
    return log_ratio(p, q, x, heads).clamp(max=0).sum(-1)


def check_share(name: str, accepted: torch.Tensor, chance: torch.Tensor) -> Check:
    """How many drafts were accepted, against what their chances (n,) add up to.

    Given the drafts, the number is a sum of independent coins whose chances are known: its variance is the sum of
    a (1 - a), which is at most, and for close distributions far below, that of a share of unknown drafts.
    """
    n, excess = len(accepted), float(accepted.double().sum() - chance.sum())
    variance = float((chance * (1 - chance)).sum())
    if variance < 1e-3:
        return Check(name, "share", n, 0.0, 1, 1.0) if abs(excess) < 0.5 else Check(name, "share", n, math.inf, 1, 0.0)
    return Check(name, "share", n, excess**2 / variance, 1, float(stats.chi2.sf(excess**2 / variance, 1)))


def replay_pairs(
    pairs: list[tuple[Distribution, Distribution]],
    rule: Callable[..., Verdict] = verify,
    n: int = 100_000,
    seed: int = 0,
    **options: Any,
) -> list[Check]:
    """Draw from q and verify against p, n times a pair; what comes out must follow p. No model is called.

    Each draft must be accepted with probability min(1, p / q), no more and no less.

    Args:
        pairs: (p, q) of single places, each over (1, 1, ·): recorded while sampling, or made up.
        rule: the verifier.
        n: replays a pair.
        seed: of the noise.
        options: passed on to the rule.
    """
    checks, noise = [], Noise(torch.arange(n) + seed * n)
    for i, (p, q) in enumerate(pairs):
        here = noise.at(position=i)
        draft = draw(q, here.at(purpose="replay"))
        verdict = rule(p, q, draft, here.at(purpose="verify"), **options)
        name = f"{type(p).__name__} pair {i}"
        checks += check_event(name, p, verdict.replacement[:, 0])
        chance = log_accept(p, q, draft[:, 0], options.get("heads", "joint")).exp()
        checks.append(check_share(f"{name}: acceptance", verdict.accepted[:, 0], chance))
        if options.get("heads", "joint") == "joint" and bool(chance.isfinite().all()) and bool((chance > 0).any()):
            # what comes instead of a draft is of the residual, which has no mass where q exceeds p
            new = verdict.replacement[~verdict.accepted[:, 0], 0]
            inside = bool((log_ratio(p, q, new) > -1e-9).all())
            checks.append(Check(f"{name}: residual's support", "equal", len(new), 0.0, 0, float(inside)))
    return checks


class Recorder:
    """A verifier that remembers pairs (p, q) of single places it was asked about, and answers as the one inside."""

    def __init__(self, rule: Callable[..., Verdict], most: int = 64, each: int = 1) -> None:
        """Args: rule: the verifier. most: pairs to remember. each: of one call, at most."""
        self.rule, self.most, self.each, self.calls = rule, most, each, 0
        self.pairs: list[tuple[Distribution, Distribution]] = []
        self.heads = "joint"

    def __call__(self, p: Distribution, q: Distribution, draft: torch.Tensor, noise: Noise, **options: Any) -> Verdict:
        """Verify, and remember."""
        where = options.get("where")
        places = (torch.ones(draft.shape[:2], dtype=torch.bool) if where is None else where).nonzero()
        for i in range(min(self.each, len(places), self.most - len(self.pairs))):
            b, g = places[((self.calls + i) * 7919) % len(places)].tolist()
            self.pairs.append((place(p, b, g), place(q, b, g)))
        self.calls, self.heads = self.calls + 1, options.get("heads", "joint")
        return self.rule(p, q, draft, noise, **options)

    def telling(self, most: int = 1, seed: int = 0) -> list[tuple[Distribution, Distribution]]:
        """The pairs where a fault would show best.

        A draft that is taken always, or never, looks the same under a rule that accepts too often; and a plain draw
        from p in a rejected draft's place shows where the residual has no mass. Both are p's mass where q exceeds it,
        which is worth the more the more is rejected.
        """
        scored = []
        for i, (p, q) in enumerate(self.pairs):
            x = draw(q, Noise(torch.arange(256), position=i, purpose=f"telling{seed}"))[:, 0]
            chance = log_accept(p, q, x, self.heads).exp()
            if 1e-3 < float(chance.mean()) < 1 - 1e-3:
                scored.append((-float(chance[chance < 1].sum() * (1 - chance.mean())), i))
        return [self.pairs[i] for _, i in sorted(scored)[:most]]


def place(d: Distribution, b: int, g: int) -> Distribution:
    """One place of a distribution over (B, G), as a distribution over (1, 1)."""

    def pick(t: torch.Tensor, like: int | None = None) -> torch.Tensor:
        return t[b % t.shape[0], g % t.shape[1]][None, None].clone()

    if isinstance(d, Categorical):
        return Categorical(pick(d.logits_BGKV))
    if isinstance(d, Gaussian):
        return Gaussian(pick(d.mean), pick(d.std.expand_as(d.mean)))
    return GaussianMixture(pick(d.logits_BGM), pick(d.mean_BGMC), pick(d.std_BGMC.expand_as(d.mean_BGMC)))


def check_same_cells(name: str, x: np.ndarray, y: np.ndarray, most: int = 64) -> Check:
    """Chi-square of two samples of ids: are they draws from one law? Rare ids share a cell."""
    ids, code = np.unique(np.concatenate([x, y]), return_inverse=True)
    counts = np.stack([np.bincount(c, minlength=len(ids)) for c in (code[: len(x)], code[len(x) :])])
    order = np.argsort(-counts.sum(0), kind="stable")
    kept = order[: most - 1][counts.sum(0)[order[: most - 1]] >= 10]
    rest = np.setdiff1d(order, kept)
    table = np.concatenate([counts[:, kept], counts[:, rest].sum(1, keepdims=True)], 1)
    table = table[:, table.sum(0) > 0]
    wanted = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    df = table.shape[1] - 1
    statistic = float(((table - wanted) ** 2 / wanted).sum())
    # two samples tell as much as one of harmonic size against a known law
    n = int(len(x) * len(y) / (len(x) + len(y)))
    return Check(name, "cells", n, statistic, df, float(stats.chi2.sf(statistic, df)) if df else 1.0)


def check_energy(name: str, distance_MM: torch.Tensor, n: int, permutations: int = 499, seed: int = 0) -> Check:
    """Energy distance of the first n things from the others, given all their distances, by permutation.

    Beyond the permutations' own resolution the p-value is the tail of a Pearson type III law with their first three
    moments. The statistic is in units of the mean distance.

    Source: Székely and Rizzo, Energy statistics, J. Stat. Plan. Inference 143 (2013).
    """
    M, scale = len(distance_MM), float(distance_MM.mean())
    keys = Noise(torch.arange(permutations) + seed * permutations, purpose="energy").uniform(M)
    first = torch.zeros(permutations + 1, M, dtype=distance_MM.dtype)
    first[0, :n] = 1.0
    first[1:].scatter_(1, keys.argsort(1)[:, :n], 1.0)
    a, b = first / n, (1 - first) / (M - n)
    weight = a - b
    energy = (-(weight @ distance_MM) * weight).sum(1).double().numpy() / scale
    observed, null = float(energy[0]), energy[1:]
    above = int((null >= observed).sum())
    mean, std, skew = null.mean(), null.std(), float(stats.skew(null))
    p = (1 + above) / (permutations + 1)
    if above == 0:
        p = min(p, float(stats.pearson3.sf(observed, skew, mean, std)))
    return Check(name, "energy", n, observed, 0, p, (skew, float(mean), float(std)))
