"""Kernel distances between sets of features: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603).

Both are squared maximum mean discrepancies. The kernel matrices are walked in square blocks, so memory does
not grow with the number of images; row sums are all that is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
BLOCK = 1024


def cubic(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """KID's kernel (x·y / D + 1)³."""
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1.0) ** 3


def gaussian(x_ND: np.ndarray, y_MD: np.ndarray, *, bandwidth: float = 10.0) -> np.ndarray:
    """CMMD's kernel exp(-|x - y|² / (2 σ²)), σ = 10 on unit-length CLIP embeddings."""
    square = np.square(x_ND).sum(axis=1)[:, None] + np.square(y_MD).sum(axis=1)[None] - 2.0 * x_ND @ y_MD.T
    return np.exp(-np.maximum(square, 0.0) / (2.0 * bandwidth**2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """A squared maximum mean discrepancy of two samples."""

    unbiased: float
    """U-statistic: zero in expectation for equal distributions, so it can be negative."""
    biased: float
    """V-statistic (the diagonal counts), never negative."""
    standard_error: float
    """Of both, by influence function."""


def discrepancy(x_ND: np.ndarray, y_MD: np.ndarray, kernel: Kernel = cubic) -> Discrepancy:
    """Squared maximum mean discrepancy of all of x against all of y, with its standard error.

    The influence of an image x is 2(E k(x, X) - E k(x, Y)), centred (Gretton et al. 2012, section 2.2). Its
    plug-in variance stays above the estimator's own at equal distributions, where the first order vanishes:
    there the interval is wider than need be.

    Raises:
        ValueError: fewer than 2 vectors on a side, or different dimensions.
    """
    x, y = np.asarray(x_ND), np.asarray(y_MD)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"need two sets of at least 2 vectors of one dimension, got {x.shape} and {y.shape}")
    n, m = len(x), len(y)
    xx, xx_diagonal = _own_sums(x, kernel)
    yy, yy_diagonal = _own_sums(y, kernel)
    xy, yx = _cross_sums(x, y, kernel)
    cross = 2.0 * xy.sum() / (n * m)
    biased = xx.sum() / n**2 + yy.sum() / m**2 - cross
    off_x, off_y = xx - xx_diagonal, yy - yy_diagonal
    unbiased = off_x.sum() / (n * (n - 1)) + off_y.sum() / (m * (m - 1)) - cross
    influence_x = 2.0 * (off_x / (n - 1) - xy / m)
    influence_y = 2.0 * (off_y / (m - 1) - yx / n)
    variance = influence_x.var(ddof=1) / n + influence_y.var(ddof=1) / m
    return Discrepancy(
        unbiased=float(unbiased), biased=float(max(biased, 0.0)), standard_error=float(np.sqrt(variance))
    )


def _block(x: np.ndarray, i: int) -> np.ndarray:
    return np.asarray(x[i : i + BLOCK], dtype=np.float64)


def _cross_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Row sums and column sums of k(x, y)."""
    rows, columns = np.zeros(len(x)), np.zeros(len(y))
    for i in range(0, len(x), BLOCK):
        ours = _block(x, i)
        for j in range(0, len(y), BLOCK):
            block = kernel(ours, _block(y, j))
            rows[i : i + BLOCK] += block.sum(axis=1)
            columns[j : j + BLOCK] += block.sum(axis=0)
    return rows, columns


def _own_sums(x: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Row sums of k(x, x), from its upper half, and its diagonal."""
    rows, diagonal = np.zeros(len(x)), np.zeros(len(x))
    for i in range(0, len(x), BLOCK):
        ours = _block(x, i)
        for j in range(i, len(x), BLOCK):
            block = kernel(ours, _block(x, j))
            rows[i : i + BLOCK] += block.sum(axis=1)
            if i == j:
                diagonal[i : i + BLOCK] = np.diagonal(block)
            else:
                rows[j : j + BLOCK] += block.sum(axis=0)
    return rows, diagonal


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID as it is published (a mean over random subsets), and the estimate from all pairs."""

    mean: float
    """Mean over subsets, of the unbiased estimate."""
    subset_deviation: float
    """Standard deviation over subsets: what papers print after ±; no error of the mean."""
    subset_size: int
    """Images in a subset."""
    subsets: int
    """How many."""
    all_pairs: Discrepancy
    """The estimate from all pairs and its standard error."""

    @property
    def standard_error(self) -> float:
        """Of `mean`: the sampling error of the images, and that of choosing subsets."""
        return float(np.hypot(self.all_pairs.standard_error, self.subset_deviation / self.subsets**0.5))


def kernel_distance(
    x_ND: np.ndarray, y_MD: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """KID through torch-fidelity: 100 random subsets of 1000, cubic kernel.

    The subsets are drawn by image index, so they do not depend on batches or processes. Sets of fewer than
    `subset_size` images use subsets of the smaller set's size, which is recorded.
    """
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if min(len(x_ND), len(y_MD)) < 2:
        raise ValueError("KID needs at least 2 images on each side")
    size = min(subset_size, len(x_ND), len(y_MD))
    out = kid_features_to_metric(
        torch.from_numpy(np.ascontiguousarray(x_ND)),
        torch.from_numpy(np.ascontiguousarray(y_MD)),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return KernelDistance(
        mean=out[KEY_METRIC_KID_MEAN],
        subset_deviation=out[KEY_METRIC_KID_STD],
        subset_size=size,
        subsets=subsets,
        all_pairs=discrepancy(x_ND, y_MD),
    )
