"""Tests of draws against a law that is known exactly: p-values, and the smallest difference each could have seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize, stats

from genlab.distributions import Categorical, Gaussian
from genlab.noise import Noise
from samplers.verify import Distribution, Verdict, draw, verify

POWER = 0.99


@dataclass(frozen=True)
class Check:
    """One test: the hypothesis is that the draws follow the law."""

    name: str
    kind: Literal["cells", "ks", "mean", "covariance", "share", "equal"]
    n: int
    """Draws."""
    statistic: float
    """Chi-square statistic, or the largest distance of cumulative distributions (ks)."""
    df: int
    """Degrees of freedom, where it has some."""
    p: float

    def critical(self, alpha: float) -> float:
        """The statistic above which the hypothesis is refused."""
        if self.kind == "ks":
            return float(stats.kstwobign.isf(alpha)) / math.sqrt(self.n)
        return float(stats.chi2.isf(alpha, self.df))

    def smallest(self, alpha: float) -> float:
        """The smallest difference that is seen with probability `POWER` whatever its shape.

        Of total variation (cells, share), of cumulative distributions (ks), in standard deviations (mean), as the
        Frobenius norm of the whitened covariance's error (covariance).
        """
        if self.kind == "equal":
            return 0.0
        if self.kind == "ks":  # Dvoretzky-Kiefer-Wolfowitz with Massart's constant
            return self.critical(alpha) + math.sqrt(math.log(2 / (1 - POWER)) / (2 * self.n))
        if self.df == 0:
            return math.nan
        noncentrality = _solve(lambda x: stats.ncx2.sf(self.critical(alpha), self.df, x) - POWER)
        scale = {"cells": 0.25, "share": 0.25, "mean": 1.0, "covariance": 2.0}[
            self.kind
        ]  # TV <= sqrt(chi2 distance) / 2
        return math.sqrt(scale * noncentrality / self.n)

    def power(self, alpha: float) -> float:
        """A lower bound (99 % confident) of the probability that another run of this very sampler is refused."""
        if self.kind == "equal" or self.df == 0:
            return float(self.p < alpha)
        if self.kind == "ks":
            least = self.statistic - math.sqrt(math.log(2 / 0.01) / (2 * self.n))
            gap = max(0.0, least - self.critical(alpha))
            return max(0.0, 1 - 2 * math.exp(-2 * self.n * gap**2))
        if stats.chi2.cdf(self.statistic, self.df) <= 0.99:
            return 0.0
        least = _solve(lambda x: 0.99 - stats.ncx2.cdf(self.statistic, self.df, x))
        return float(stats.ncx2.sf(self.critical(alpha), self.df, least))


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


def replay_pairs(
    pairs: list[tuple[Distribution, Distribution]],
    rule: Callable[..., Verdict] = verify,
    n: int = 100_000,
    seed: int = 0,
    **options: Any,
) -> list[Check]:
    """Draw from q and verify against p, n times a pair; what comes out must follow p. No model is called.

    A single categorical head's rate of acceptance must be the largest there is, sum min(p, q).

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
        if isinstance(p, Categorical) and isinstance(q, Categorical) and p.logits_BGKV.shape[2] == 1:
            rate, hits = float(torch.minimum(p.probs, q.probs).sum()), int(verdict.accepted.sum())
            law = np.array([rate, max(0.0, 1 - rate)])
            law[law < 1e-12] = 0.0
            checks.append(check_cells(f"{name}: acceptance", np.array([hits, n - hits]), law / law.sum(), "share"))
    return checks
