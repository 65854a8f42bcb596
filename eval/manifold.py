"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of feature sets.

A set's manifold is the union of balls around its points, each reaching to the point's k-th neighbour in its
own set. Distances are Euclidean, in float64, a block at a time, so that the sets may be mapped from disk and
memory grows with N alone.

All four depend on both sets, not only through the images that are counted: another reference has other balls. Their
standard error is a jack-knife over groups of each set: every group is left out in turn, its balls and all, and what
that does to the figure is its influence. (The binomial error of the count alone is too small.)
"""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK = 256
WIDE = 4096
GROUPS = 16
"""Image i belongs to group i mod 16; sets sorted by class have every class in every group."""
SPARE = 9
"""Neighbours kept beyond the k-th, in case those before it are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifolds:
    """The four shares, and the per-image values they are means of."""

    precision: float
    """Share of generated images inside the reference's manifold."""
    recall: float
    """Share of reference images inside the generated set's manifold."""
    density: float
    """Mean number of reference balls (of k neighbours) around a generated image, over k."""
    coverage: float
    """Share of reference balls that hold a generated image."""
    precise_N: np.ndarray
    """For each generated image: inside or not."""
    recalled_M: np.ndarray
    """For each reference image: inside or not."""
    density_N: np.ndarray
    """For each generated image: balls it lies in, over k."""
    covered_M: np.ndarray
    """For each reference image: its ball is hit or not."""
    nearest_N: np.ndarray
    """For each generated image: index of the nearest reference image."""
    distance_N: np.ndarray
    """For each generated image: distance to it."""

    standard_errors: dict[str, float]
    """Jack-knife standard errors of the four shares, the sampling of both sets counted."""


def in_single_precision(generated_ND: np.ndarray, reference_MD: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall as torch-fidelity computes them, which decides ties as float32 rounds.

    Distances come from squares and products of float32 features. Where those are large beside the distances (features
    that are all alike) the rounding puts a few images on the other side of a ball's surface.
    """
    import torch
    from torch_fidelity.metric_prc import calculate_precision_recall_full, calculate_precision_recall_part

    x, y = (torch.from_numpy(np.array(a, dtype=np.float32)) for a in (generated_ND, reference_MD))
    small = max(len(x), len(y)) <= 20_000  # its two ways differ in memory; the first is its default
    return (calculate_precision_recall_full if small else calculate_precision_recall_part)(x, y, k)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distances of a few rows to all rows of y, which is brought to float64 a block at a time."""
    wide = x.astype(np.float64)
    own = np.square(wide).sum(axis=1)[:, None]
    out = np.empty((len(x), len(y)))
    for j in range(0, len(y), WIDE):
        block = np.asarray(y[j : j + WIDE], dtype=np.float64)
        out[:, j : j + WIDE] = own + np.square(block).sum(axis=1) - 2.0 * (wide @ block.T)
    return np.sqrt(np.maximum(out, 0.0, out=out), out=out)


def radii(x_ND: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Distance of each row to its k-th neighbour in the same set (itself not counted), shape (len(ks), N)."""
    x = x_ND
    if len(x) <= max(ks):
        raise ValueError(f"{len(x)} images are too few for {max(ks)} neighbours")
    out = np.empty((len(ks), len(x)))
    for i in range(0, len(x), BLOCK):
        block = distances(x[i : i + BLOCK], x)
        rows = np.arange(len(block))
        block[rows, i + rows] = 0.0  # itself, whatever rounding says
        part = np.partition(block, ks, axis=1)
        out[:, i : i + BLOCK] = part[:, list(ks)].T
    return out


def _left_out_radii(x_ND: np.ndarray, ks: tuple[int, ...], groups: int) -> np.ndarray:
    """Radii as `radii` gives them, and again with each group of images left out: shape (len(ks), 1 + groups, N).

    A row of the group left out has radius -1: its ball holds nothing.
    """
    n = len(x_ND)
    keep = min(max(ks) + 1 + SPARE, n)
    out = np.empty((len(ks), 1 + groups, n))
    for i in range(0, n, BLOCK):
        block = distances(x_ND[i : i + BLOCK], x_ND)
        rows = np.arange(len(block))
        block[rows, i + rows] = 0.0  # itself, whatever rounding says
        index = np.argpartition(block, keep - 1, axis=1)[:, :keep]
        near = np.take_along_axis(block, index, axis=1)
        order = np.argsort(near, axis=1)
        near, group = np.take_along_axis(near, order, axis=1), np.take_along_axis(index, order, axis=1) % groups
        part = slice(i, i + len(block))
        for g in range(-1, groups):
            count = np.cumsum(group != g, axis=1)
            for j, k in enumerate(ks):
                at = np.where(count[:, -1] > k, np.argmax(count > k, axis=1), keep - 1)
                out[j, 1 + g, part] = near[rows, at]
    for g in range(groups):
        out[:, 1 + g, g::groups] = -1.0
    return out


def manifolds(generated_ND: np.ndarray, reference_MD: np.ndarray, *, k: int = 3, k_density: int = 5) -> Manifolds:
    """Precision, recall (k = 3), density and coverage (k = 5), with jack-knife standard errors.

    Precision and recall count the ball's surface as inside (<=), as torch-fidelity and ADM do; density and
    coverage do not (<), as their authors do.

    Raises:
        ValueError: fewer images than neighbours, or different dimensions.
    """
    x, y = generated_ND, reference_MD
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    if min(len(x) - k, len(y) - k_density) <= 0:
        raise ValueError(f"{len(x)} and {len(y)} images are too few for {k} and {k_density} neighbours")
    n, m = len(x), len(y)
    of_x, of_y = min(GROUPS, n), min(GROUPS, m)
    (x_radius,) = _left_out_radii(x, (k,), of_x)
    y_radius, density_radius = _left_out_radii(y, (k, k_density), of_y)
    # Row 0 is the figure, the others leave out a group of the other set.
    precise = np.zeros((1 + of_y, n), dtype=bool)
    density = np.zeros((1 + of_y, n))
    recalled = np.zeros((1 + of_x, m), dtype=bool)
    least = np.full((of_x, m), np.inf)  # distance to the nearest generated image of each group
    nearest = np.zeros(n, dtype=np.int64)
    distance = np.zeros(n)
    for i in range(0, n, BLOCK):
        part = slice(i, i + BLOCK)
        block = distances(x[part], y)
        for g in range(1 + of_y):
            precise[g, part] = (block <= y_radius[g]).any(axis=1)
            density[g, part] = (block < density_radius[g]).sum(axis=1) / k_density
        for g in range(1 + of_x):
            recalled[g] |= (block <= x_radius[g, part, None]).any(axis=0)
        for g in range(of_x):
            rows = block[(g - i) % of_x :: of_x]
            if len(rows):
                least[g] = np.minimum(least[g], rows.min(axis=0))
        nearest[part], distance[part] = block.argmin(axis=1), block.min(axis=1)
    without = np.stack([least.min(axis=0)] + [np.delete(least, g, axis=0).min(axis=0) for g in range(of_x)])
    covered = without < density_radius[0]  # (1 + groups of x, M)
    covered_y = without[0] < density_radius  # (1 + groups of y, M)
    errors = {
        "precision": _jackknife(_others(precise[0], of_x), precise[1:].mean(axis=1)),
        "density": _jackknife(_others(density[0], of_x), density[1:].mean(axis=1)),
        "recall": _jackknife(recalled[1:].mean(axis=1), _others(recalled[0], of_y)),
        "coverage": _jackknife(
            covered[1:].mean(axis=1),
            np.array([np.delete(covered_y[1 + g], slice(g, None, of_y)).mean() for g in range(of_y)]),
        ),
    }
    return Manifolds(
        precision=float(precise[0].mean()),
        recall=float(recalled[0].mean()),
        density=float(density[0].mean()),
        coverage=float(covered[0].mean()),
        precise_N=precise[0],
        recalled_M=recalled[0],
        density_N=density[0],
        covered_M=covered[0],
        nearest_N=nearest,
        distance_N=distance,
        standard_errors=errors,
    )


def _others(values: np.ndarray, groups: int) -> np.ndarray:
    """Mean without each group of rows."""
    return np.array([np.delete(values, slice(g, None, groups)).mean() for g in range(groups)])


def _jackknife(*left_out: np.ndarray) -> float:
    """Standard error out of the figure with each group of one set left out, and of the other set."""
    variance = sum((len(v) - 1) / len(v) * np.square(v - v.mean()).sum() for v in left_out)
    return float(np.sqrt(variance))
