"""Fréchet distance extrapolated to infinitely many images (FID∞, arXiv 1911.07023), with an interval.

A Fréchet distance from N images is too large by about b/N. Here the images are cut into 1, 2 and 4 disjoint
blocks, the distances of a level averaged, and a line in 1/N fitted through the levels; its value at 1/N = 0
is the figure. Blocks of a level use every image once, so the first-order sampling error is the same at each
level and goes into the intercept unchanged: it is the influence function's at full N. What the split into
blocks adds is measured by repeating it. (Chong and Forsyth draw 15 overlapping subsets of at least 5,000
images; their line has the same intercept in expectation, but its regression error says nothing about the
images' sampling.)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .frechet import FrechetResult, _distance, _root, frechet_with_error
from .statistics import Statistics, statistics_of

LEVELS = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """A Fréchet distance at infinite N."""

    value: float
    """The intercept."""
    standard_error: float
    """Sampling error of the images and of the blocks."""
    slope: float
    """Bias times N."""
    sizes: tuple[int, ...]
    """Images in a block of each level."""
    distances: tuple[float, ...]
    """Mean distance of each level."""
    full: FrechetResult
    """The distance at full N."""


def frechet_infinity(
    x_ND: np.ndarray,
    reference: Statistics,
    *,
    reference_tiles=None,
    repeats: int = 3,
    seed: int = 0,
    full: FrechetResult | None = None,
) -> Extrapolation:
    """Extrapolate the Fréchet distance of features against fixed statistics to infinite N.

    The reference stays as it is: where it is a sample too, its own bias of about b'/M remains.

    Args:
        x_ND: generated features, in image order.
        reference: the reference's statistics.
        reference_tiles: the reference's features, where its sampling error is to be added.
        repeats: how many times the images are cut into blocks.
        seed: of the cuts.
        full: the distance at full N, if it is known already.

    Raises:
        ValueError: fewer than 8 images.
    """
    x = x_ND
    n = len(x)
    if n < 8:
        raise ValueError(f"an extrapolation in N needs at least 8 images, got {n}")
    if full is None:
        full = frechet_with_error(
            statistics_of(np.asarray(x)), reference, tiles=lambda: [np.asarray(x)], reference_tiles=reference_tiles
        )
    root = _root(reference.cov_DD)
    rng = np.random.default_rng(seed)
    lines, levels = [], []
    design = np.stack([np.ones(len(LEVELS)), np.array(LEVELS) / n], axis=1)
    for _ in range(repeats):
        order = rng.permutation(n)
        means = [full.value]
        for blocks in LEVELS[1:]:
            cut = np.array_split(order, blocks)
            means.append(float(np.mean([_against(x, np.sort(part), reference, root) for part in cut])))
        levels.append(means)
        lines.append(np.linalg.lstsq(design, np.array(means), rcond=None)[0])
    intercepts = np.array(lines)[:, 0]
    noise = intercepts.std(ddof=1) / np.sqrt(repeats) if repeats > 1 else 0.0
    assert full.standard_error is not None
    return Extrapolation(
        value=float(intercepts.mean()),
        standard_error=float(np.hypot(full.standard_error, noise)),
        slope=float(np.array(lines)[:, 1].mean()),
        sizes=tuple(n // blocks for blocks in LEVELS),
        distances=tuple(float(v) for v in np.mean(levels, axis=0)),
        full=full,
    )


def _against(x_ND: np.ndarray, rows: np.ndarray, reference: Statistics, root: np.ndarray) -> float:
    """Fréchet distance of some rows, with the reference's root computed once for all blocks.

    The features may be mapped from disk: rows come in by parts, at most as many as there are dimensions at once.
    """
    dim = x_ND.shape[1]
    a = statistics_of(x_ND[rows[i : i + dim]] for i in range(0, len(rows), dim))
    if len(rows) <= dim:  # the small problem: singular values of X_c L / √(n-1)
        y = (np.asarray(x_ND[rows], dtype=np.float64) - a.mean_D) @ root
        inner = y @ y.T / (len(rows) - 1)
    else:
        inner = root.T @ a.cov_DD @ root
    trace = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0, None)).sum()
    return _distance(a, reference, float(trace))
