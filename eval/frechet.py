"""Fréchet distance between Gaussians, fast and without an epsilon, and its interval.

    d² = |μ1 - μ2|² + tr C1 + tr C2 - 2 tr (C1^½ C2 C1^½)^½        (Dowson and Landau 1982)

The last trace is taken over a symmetric matrix, so every eigenvalue is real by construction and rounding
below zero is clamped. Where a set has fewer images than feature dimensions, its covariance has low rank and
the same trace comes from a small matrix of the centred features (exact algebra, nothing regularised).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from .statistics import Statistics, statistics_of

# Modes whose square root is below this share of the largest are noise of the eigen-solver (its error is
# about 1e-16 of the largest eigenvalue); only the interval's maps divide by them.
_CUTOFF = 1e-12

Tiles = Callable[[], Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrechetResult:
    """A Fréchet distance with its sampling error."""

    value: float
    """The (squared) distance, the figure papers call FID when the features are Inception's."""
    standard_error: float | None
    """Standard error at this number of images, or None where no features were given."""
    standard_error_reference: float | None
    """The part of it that the reference's own sampling contributes (None: the reference is exact)."""
    influence_N: np.ndarray | None = None
    """Influence of each generated image on the figure (positive: the image raises it)."""


def _check(a: Statistics, b: Statistics) -> None:
    if a.dim != b.dim:
        raise ValueError(
            f"statistics of {a.dim} and {b.dim} dimensions cannot be compared; "
            "both sides need the same extractor and protocol"
        )


def _centred(x_ND: np.ndarray, mean_D: np.ndarray | None = None) -> np.ndarray:
    x = np.asarray(x_ND, dtype=np.float64)
    return x - (x.mean(axis=0) if mean_D is None else mean_D)


def _root(cov_DD: np.ndarray) -> np.ndarray:
    """A factor L with L Lᵀ = cov, through eigh (works for any rank; rounding below zero is clamped)."""
    values, vectors = np.linalg.eigh(cov_DD)
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def _distance(a: Statistics, b: Statistics, trace_root: float) -> float:
    return _assemble(a.mean_D - b.mean_D, float(np.trace(a.cov_DD) + np.trace(b.cov_DD)), trace_root)


def _assemble(delta_D: np.ndarray, traces: float, trace_root: float) -> float:
    value = float(delta_D @ delta_D) + traces - 2.0 * trace_root
    return max(value, 0.0)  # a squared distance: rounding can bring equal sets to about -1e-13


def trace_root(cov1_DD: np.ndarray, cov2_DD: np.ndarray) -> float:
    """Trace of (C1^½ C2 C1^½)^½ for two symmetric positive semi-definite matrices, any rank.

    With C1 = L Lᵀ the matrix Lᵀ C2 L has the same non-zero eigenvalues as C1 C2 and is symmetric. L is a
    Cholesky factor with pivoting, which finds the rank: directions without variance add nothing, and leaving
    them out makes a rank-deficient C1 cheaper, not other. (An eigen-decomposition of C1 takes 3 times as long.)
    """
    from scipy.linalg import eigvalsh, lapack

    packed, pivots, rank, _ = lapack.dpstrf(cov1_DD, lower=1)
    if rank == 0 or not cov1_DD.any():
        return 0.0
    order = pivots - 1
    lower = np.tril(packed)[:, :rank]
    inner = cov2_DD[np.ix_(order, order)]
    if rank == len(cov1_DD):
        inner, _ = lapack.dsygst(inner, lower, itype=2, lower=1)  # Lᵀ C L, lower half only
    else:
        inner = lower.T @ inner @ lower
    eigenvalues = eigvalsh(inner, lower=True, overwrite_a=True, check_finite=False)
    return float(np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())


def trace_root_features(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """The same trace from two sets of features: the nuclear norm of X_c Y_cᵀ / √((N-1)(M-1)).

    Exact for any N and M; faster than the covariances when either is below the dimension.
    """
    x = _centred(x_ND)
    y = _centred(y_MD)
    product = x @ y.T
    if product.shape[0] > product.shape[1]:
        product = product.T
    # Singular values through eigvalsh of the small Gram matrix would halve the digits of the small ones;
    # svd without vectors keeps them.
    norm = np.linalg.svd(product, compute_uv=False).sum()
    return float(norm / np.sqrt((len(x) - 1) * (len(y) - 1)))


def trace_root_gram(x_ND: np.ndarray, cov_DD: np.ndarray) -> float:
    """The same trace from features on one side and a covariance on the other: the N×N X_c C X_cᵀ / (N-1).

    Exact for any N; faster than two covariances when N is below D.
    """
    x = _centred(x_ND)
    gram = x @ cov_DD @ x.T
    eigenvalues = np.linalg.eigvalsh((gram + gram.T) / (2 * (len(x) - 1)))
    return float(np.sqrt(np.clip(eigenvalues, 0.0, None)).sum())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two sets of statistics.

    Raises:
        ValueError: the dimensions differ.
    """
    _check(a, b)
    # The side with fewer samples is decomposed first: its rank bounds the second problem's size.
    if (b.n or a.dim + 1) < (a.n or a.dim + 1):
        a, b = b, a
    return _distance(a, b, trace_root(a.cov_DD, b.cov_DD))


def _mean_and_trace(x_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and trace of the covariance, without the covariance."""
    if len(x_ND) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(x_ND)}")
    mean_D = x_ND.mean(axis=0, dtype=np.float64)
    trace = float(np.square(x_ND - mean_D).sum() / (len(x_ND) - 1))
    if not np.isfinite(trace):
        raise ValueError("features hold NaN or infinity")
    return mean_D, trace


def frechet_of_features(x_ND: np.ndarray, y: np.ndarray | Statistics) -> float:
    """Fréchet distance of features against features (M, D) or statistics, by the cheapest exact route.

    Raises:
        ValueError: the dimensions differ, fewer than 2 vectors, or features that are not finite.
    """
    x = np.asarray(x_ND)
    (n, dim), other = x.shape, y.dim if isinstance(y, Statistics) else np.shape(y)[1]
    if dim != other:
        raise ValueError(f"features of {dim} and {other} dimensions cannot be compared")
    if isinstance(y, Statistics):
        if n >= dim:
            return frechet_distance(statistics_of(x), y)
        mean_D, trace = _mean_and_trace(x)
        return _assemble(mean_D - y.mean_D, trace + float(np.trace(y.cov_DD)), trace_root_gram(x, y.cov_DD))
    y = np.asarray(y)
    if min(n, len(y)) < dim and max(n, len(y)) < 2 * dim:
        (mean_D, trace), (mean_y_D, trace_y) = _mean_and_trace(x), _mean_and_trace(y)
        return _assemble(mean_D - mean_y_D, trace + trace_y, trace_root_features(x, y))
    few, many = (x, y) if n <= len(y) else (y, x)
    return frechet_of_features(few, statistics_of(many))


def _transport_maps(a: Statistics, b: Statistics) -> tuple[float, np.ndarray, np.ndarray]:
    """Trace of M^½ with M = C1^½ C2 C1^½, and the maps T12 = C1^-½ M^½ C1^-½ and T21 = C1^½ M^-½ C1^½.

    T12 is the optimal-transport map between the Gaussians (Knott and Smith 1984), on the range of C1;
    T21 is its inverse, on the range of C2. Samples of a set never leave the range of its own covariance.
    """
    values, vectors = np.linalg.eigh(a.cov_DD)
    values = np.clip(values, 0.0, None)
    keep = values > values[-1] * _CUTOFF
    values, vectors = values[keep], vectors[:, keep]
    root = vectors * np.sqrt(values)  # D x r
    inner = root.T @ b.cov_DD @ root
    m, v = np.linalg.eigh((inner + inner.T) / 2)
    m = np.clip(m, 0.0, None)
    s = np.sqrt(m)
    live = m > (m[-1] if len(m) else 0.0) * _CUTOFF
    forward = (vectors / np.sqrt(values)) @ (v * np.sqrt(s))  # T12 = F Fᵀ
    backward = root @ (v[:, live] / np.sqrt(s[live]))  # T21 = B Bᵀ
    return float(s.sum()), forward, backward


def _influence(tiles: Iterable[np.ndarray], mean_D: np.ndarray, delta_D: np.ndarray, map_DR: np.ndarray):
    """IF(x) = 2 δ·(x - μ) + (x - μ)ᵀ(I - T)(x - μ), centred; T = map mapᵀ, δ = μ - μ'."""
    parts = []
    for x_ND in tiles:
        x = _centred(x_ND, mean_D)
        parts.append(2.0 * x @ delta_D + (x * x).sum(axis=1) - np.square(x @ map_DR).sum(axis=1))
    influence_N = np.concatenate(parts)
    return influence_N - influence_N.mean()


def _standard_error(influence_N: np.ndarray) -> float:
    n = len(influence_N)
    return float(np.sqrt(np.square(influence_N).sum() / (n * (n - 1))))


def frechet_with_error(
    a: Statistics,
    b: Statistics,
    *,
    tiles: Tiles | None = None,
    reference_tiles: Tiles | None = None,
    paired: bool = False,
) -> FrechetResult:
    """Fréchet distance with its standard error by influence function.

    The distance is a smooth function of two empirical distributions. Adding a little mass at x to the first
    changes it by IF(x) = 2(μ1-μ2)·(x-μ1) + (x-μ1)ᵀ(I-T)(x-μ1) - tr((I-T)C1), with T the optimal-transport
    map from the first Gaussian to the second (differentiate tr (C1^½ C2 C1^½)^½ in C1: the derivative is
    T/2). The variance of the estimate is the mean of IF² over N (infinitesimal jack-knife); the reference's
    own part is added where its features are given. The interval says how far another set of the *same*
    number of images would fall; the upward bias of about 1/N is not in it (see FID∞ for that).

    Args:
        a: statistics of the generated set.
        b: statistics of the reference.
        tiles: a callable that iterates the generated features (N_i, D), as often as it is called.
        reference_tiles: the same for the reference where it is a sample; None takes it as exact.
        paired: image i of one set is made from image i of the other (a reconstruction of it), so that their
            influences vary together.
    """
    _check(a, b)
    if tiles is None:
        return FrechetResult(value=frechet_distance(a, b), standard_error=None, standard_error_reference=None)
    trace, forward, backward = _transport_maps(a, b)
    delta_D = a.mean_D - b.mean_D
    influence_N = _influence(tiles(), a.mean_D, delta_D, forward)
    variance = _standard_error(influence_N) ** 2
    reference = None
    if reference_tiles is not None:
        influence_M = _influence(reference_tiles(), b.mean_D, -delta_D, backward)
        reference = _standard_error(influence_M)
        variance = _standard_error(influence_N + influence_M) ** 2 if paired else variance + reference**2
    return FrechetResult(
        value=_distance(a, b, trace),
        standard_error=float(np.sqrt(variance)),
        standard_error_reference=reference,
        influence_N=influence_N,
    )
