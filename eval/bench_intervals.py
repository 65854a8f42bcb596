"""Do the intervals cover? Simulate: `python -m eval.bench_intervals`.

Two known distributions are sampled again and again. An interval covers where it holds the mean of the figure over
all repetitions (for `fd_infinity` the distance of the distributions themselves, in closed form). A row says which
share does, and how wide the standard errors are beside the deviation that the repetitions show (1 is right; more is
cautious).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from .frechet import frechet_distance, frechet_with_error
from .inception_score import inception_score, students_reach
from .infinity import frechet_infinity
from .kernels import discrepancy, gaussian
from .manifold import manifolds
from .statistics import Statistics, statistics_of

Estimate = tuple[float, float]


def _frechet(x: np.ndarray, y: np.ndarray) -> Estimate:
    out = frechet_with_error(statistics_of(x), statistics_of(y), tiles=lambda: [x], reference_tiles=lambda: [y])
    assert out.standard_error is not None
    return out.value, out.standard_error


def _kernel(x: np.ndarray, y: np.ndarray) -> Estimate:
    out = discrepancy(x, y)
    return out.unbiased, out.standard_error


def _cmmd(x: np.ndarray, y: np.ndarray) -> Estimate:
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    out = discrepancy(x, y, gaussian)
    return out.biased, out.standard_error


def _score(x: np.ndarray, y: np.ndarray) -> Estimate:
    scores = inception_score((2.0 * x).astype(np.float32), splits=10)[2]
    return float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(10))


def _manifold(name: str) -> Callable[[np.ndarray, np.ndarray], Estimate]:
    def estimate(x: np.ndarray, y: np.ndarray) -> Estimate:
        out = manifolds(x, y)
        return getattr(out, name), out.standard_errors[name]

    return estimate


def coverage(sets: int = 400, dim: int = 32, sizes: tuple[int, ...] = (400, 40), level: float = 0.95) -> Any:
    """Coverage of every interval at some numbers of images a side, more and fewer than dimensions.

    Args:
        sets: repetitions.
        dim: feature dimension.
        sizes: images a side.
        level: of the intervals.
    """
    rng = np.random.default_rng(0)
    scales = np.arange(1, dim + 1) ** -0.5
    other = scales * np.exp(0.3 * rng.standard_normal(dim))
    shift = 0.2 * scales
    exact = Statistics(mean_D=shift, cov_DD=np.diag(other**2))
    truth = frechet_distance(Statistics(mean_D=np.zeros(dim), cov_DD=np.diag(scales**2)), exact)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    estimates: dict[str, Callable[[np.ndarray, np.ndarray], Estimate]] = {
        "fid": _frechet, "kid": _kernel, "cmmd": _cmmd, "is": _score,
        **{name: _manifold(name) for name in ("precision", "recall", "density", "coverage")},
    }  # fmt: skip
    rows = []
    for n in sizes:
        values: dict[str, list[Estimate]] = {name: [] for name in estimates}
        if n // 4 > dim:
            values["fd_infinity"] = []
        for _ in range(sets):
            x = rng.standard_normal((n, dim)) * scales
            y = rng.standard_normal((n, dim)) * other + shift
            for name, function in estimates.items():
                values[name].append(function(x, y))
            if "fd_infinity" in values:
                out = frechet_infinity(x, exact)
                values["fd_infinity"].append((out.value, out.standard_error))
        for name, pairs in values.items():
            value, error = np.array(pairs).T
            centre = truth if name == "fd_infinity" else value.mean()
            reach = students_reach(z, 10) if name == "is" else z
            rows.append(
                {
                    "figure": name, "n": n, "covered": float((np.abs(value - centre) <= reach * error).mean()),
                    "error_over_deviation": float(error.mean() / value.std(ddof=1)), "mean": float(value.mean()),
                }
            )  # fmt: skip
    return {"level": level, "sets": sets, "dim": dim, "rows": rows}


def main() -> None:
    """Command line."""
    import tyro

    out = tyro.cli(coverage, description=__doc__)
    print(f"{'figure':<12} {'n':>6} {'covered':>8} {'error/deviation':>16}")
    for row in out["rows"]:
        print(f"{row['figure']:<12} {row['n']:>6} {row['covered']:>8.1%} {row['error_over_deviation']:>16.2f}")
    print(json.dumps({key: out[key] for key in ("level", "sets", "dim")}))


if __name__ == "__main__":
    main()
