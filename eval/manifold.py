"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of feature sets.

A set's manifold is the union of balls around its points, each reaching to the point's k-th neighbour in its
own set. Distances are Euclidean, in float64, a block at a time, so that the sets may be mapped from disk and
memory grows with N alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK = 256
WIDE = 4096


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


def manifolds(generated_ND: np.ndarray, reference_MD: np.ndarray, *, k: int = 3, k_density: int = 5) -> Manifolds:
    """Precision, recall (k = 3), density and coverage (k = 5).

    Precision and recall count the ball's surface as inside (<=), as torch-fidelity and ADM do; density and
    coverage do not (<), as their authors do.

    Raises:
        ValueError: fewer images than neighbours, or different dimensions.
    """
    x, y = generated_ND, reference_MD
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    (generated_radius,) = radii(x, (k,))
    reference_radius, density_radius = radii(y, (k, k_density))
    precise = np.zeros(len(x), dtype=bool)
    recalled = np.zeros(len(y), dtype=bool)
    density = np.zeros(len(x))
    least = np.full(len(y), np.inf)
    nearest = np.zeros(len(x), dtype=np.int64)
    distance = np.zeros(len(x))
    for i in range(0, len(x), BLOCK):
        part = slice(i, i + BLOCK)
        block = distances(x[part], y)
        precise[part] = (block <= reference_radius).any(axis=1)
        recalled |= (block <= generated_radius[part, None]).any(axis=0)
        density[part] = (block < density_radius).sum(axis=1) / k_density
        least = np.minimum(least, block.min(axis=0))
        nearest[part], distance[part] = block.argmin(axis=1), block.min(axis=1)
    covered = least < density_radius
    return Manifolds(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=float(density.mean()),
        coverage=float(covered.mean()),
        precise_N=precise,
        recalled_M=recalled,
        density_N=density,
        covered_M=covered,
        nearest_N=nearest,
        distance_N=distance,
    )
