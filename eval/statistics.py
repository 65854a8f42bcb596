"""Mean and covariance of features: streaming, mergeable, in float64, and the files they live in.

A Fréchet distance is the difference of large traces, so the moments are accumulated in float64 about a
shift (the first rows' mean), and two accumulators are joined by Chan's pairwise update, which makes the
result independent of batch size and of the number of processes to rounding (about 1e-15 relative).
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "genlab-statistics-1"
# Rows are gathered to this many before the matrix product: 4x faster than products of 64 rows.
BUFFER_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """First two moments of a set of feature vectors."""

    mean_D: np.ndarray
    """Mean, float64, shape (D,)."""
    cov_DD: np.ndarray
    """Unbiased covariance (divided by n - 1), float64, shape (D, D), symmetric."""
    n: int | None = None
    """Number of vectors behind it; None where a foreign file does not say."""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where it came from: extractor, its weights' hash, protocol, source, source hash."""

    def __post_init__(self) -> None:
        mean = np.asarray(self.mean_D, dtype=np.float64)
        cov = np.asarray(self.cov_DD, dtype=np.float64)
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise ValueError(f"statistics need a mean (D,) and a covariance (D, D), got {mean.shape} and {cov.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("statistics hold NaN or infinity; compute them again with `genlab stats`")
        scale = float(np.abs(cov).max(initial=0.0))
        if scale and float(np.abs(cov - cov.T).max()) > 1e-5 * scale:
            raise ValueError("the covariance is not symmetric; the file does not hold feature statistics")
        if float(cov.diagonal().min(initial=0.0)) < 0:
            raise ValueError("the covariance has negative variances; the file does not hold feature statistics")
        object.__setattr__(self, "mean_D", mean)
        object.__setattr__(self, "cov_DD", (cov + cov.T) / 2)

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.mean_D.size)

    def save(self, path: str | Path, *, spatial: Statistics | None = None, compact: bool = False) -> Path:
        """Write an npz that ADM's, pytorch-fid's and clean-fid's readers open too (`mu`, `sigma`).

        `spatial` are the statistics of Inception's spatial layer (`mu_s`, `sigma_s`, for sFID). `compact` keeps
        the covariance's upper triangle in float32 instead, a quarter of the bytes, for genlab's own reader; it
        moves a distance by about 1e-7 of tr C1 + tr C2. The file is written under a temporary name and renamed,
        so a half-written one is never read.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        covariance: dict[str, Any] = {"sigma": self.cov_DD}
        if compact:
            covariance = {"sigma_upper": self.cov_DD[np.triu_indices(self.dim)].astype(np.float32)}
        if spatial is not None:
            covariance |= {"mu_s": spatial.mean_D, "sigma_s": spatial.cov_DD}
        with open(temporary, "wb") as file:
            np.savez(
                file,
                mu=self.mean_D,
                **covariance,
                n=np.int64(-1 if self.n is None else self.n),
                format=np.array(FORMAT),
                meta=np.array(json.dumps(self.meta)),
            )
        os.replace(temporary, path)
        return path


class RunningStatistics:
    """Streaming mean and covariance: `update` with batches, `merge` with another, `finish`.

    Args:
        dim: feature dimension; taken from the first batch when None.
    """

    def __init__(self, dim: int | None = None):
        self.dim = dim
        self.n = 0  # rows in mean and scatter, not counting the buffer
        self._mean_D: np.ndarray | None = None
        self._scatter_DD: np.ndarray | None = None  # sum of (x - mean)(x - mean)^T
        self._shift_D: np.ndarray | None = None
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._seen = 0

    def update(self, x_ND: np.ndarray) -> RunningStatistics:
        """Take in a batch of features, shape (N, D), any float type. NaN and infinity are refused."""
        x = np.asarray(x_ND)
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"features must be a float array (N, D), got {x.dtype} {x.shape}")
        if self.dim is None:
            self.dim = x.shape[1]
        if x.shape[1] != self.dim:
            raise ValueError(f"features have {x.shape[1]} dimensions, expected {self.dim}")
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            first = self._seen + int(np.argmax(bad))
            raise ValueError(
                f"{int(bad.sum())} feature vectors hold NaN or infinity, the first for image {first}; "
                "the extractor's weights or that image are broken"
            )
        self._seen += len(x)
        if self._shift_D is None and len(x):
            self._shift_D = x.astype(np.float64).mean(axis=0)
        self._buffer.append(np.array(x))  # a copy: callers may reuse their buffer
        self._buffered += len(x)
        if self._buffered >= BUFFER_ROWS:
            self._flush()
        return self

    def _flush(self) -> None:
        if not self._buffered:
            self._buffer = []
            return
        assert self._shift_D is not None
        y_ND = np.concatenate(self._buffer).astype(np.float64) - self._shift_D
        self._buffer, self._buffered = [], 0
        mean_D = y_ND.mean(axis=0)
        y_ND -= mean_D
        self._chan(len(y_ND), mean_D + self._shift_D, y_ND.T @ y_ND)

    def _chan(self, n: int, mean_D: np.ndarray, scatter_DD: np.ndarray) -> None:
        """Join another group's (n, mean, scatter): Chan, Golub, LeVeque 1983, eq. 1.5."""
        if self._mean_D is None or self._scatter_DD is None:
            self.n, self._mean_D, self._scatter_DD = n, mean_D, scatter_DD
            return
        delta_D = mean_D - self._mean_D
        total = self.n + n
        self._scatter_DD += scatter_DD
        self._scatter_DD += np.outer(delta_D, delta_D) * (self.n * n / total)
        self._mean_D = self._mean_D + delta_D * (n / total)
        self.n = total

    def merge(self, other: RunningStatistics) -> RunningStatistics:
        """Take in what another accumulator (another process) has seen; `other` is left unchanged."""
        other._flush()
        self._flush()
        if other.n == 0:
            return self
        if self.dim is None:
            self.dim = other.dim
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {other.dim} dimensions into {self.dim}")
        assert other._mean_D is not None
        assert other._scatter_DD is not None
        if self._shift_D is None:
            self._shift_D = other._shift_D
        self._chan(other.n, other._mean_D.copy(), other._scatter_DD.copy())
        self._seen += other.n
        return self

    def finish(self, **meta: Any) -> Statistics:
        """The statistics so far. Fewer than two vectors have no covariance and are refused."""
        self._flush()
        if self.n < 2 or self._mean_D is None or self._scatter_DD is None:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        return Statistics(mean_D=self._mean_D, cov_DD=self._scatter_DD / (self.n - 1), n=self.n, meta=meta)


def statistics_of(batches: np.ndarray | Iterable[np.ndarray], **meta: Any) -> Statistics:
    """Statistics of an array (N, D) or of an iterable of such arrays."""
    running = RunningStatistics()
    for x_ND in [batches] if isinstance(batches, np.ndarray) else batches:
        running.update(x_ND)
    return running.finish(**meta)


def _unpack(upper: np.ndarray, dim: int) -> np.ndarray:
    cov = np.zeros((dim, dim))
    cov[np.triu_indices(dim)] = upper
    return cov + np.triu(cov, 1).T


def npz_names(path: str | Path) -> set[str]:
    """Names of the arrays in an npz file.

    Raises:
        ValueError: it is not a readable npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz: {error}") from error


def is_statistics(path: str | Path) -> bool:
    """Whether an npz file holds statistics (`mu`, `sigma`); ADM's reference batches hold images besides."""
    names = npz_names(path)
    return "mu" in names and bool({"sigma", "sigma_upper"} & names)


def load_statistics(path: str | Path, *, layer: str = "pool") -> Statistics:
    """Read statistics written by genlab, ADM, pytorch-fid or clean-fid.

    Args:
        path: npz with `mu` and `sigma`; ADM's files also hold `mu_s` and `sigma_s` (spatial, for sFID).
        layer: "pool" reads `mu`/`sigma`, "spatial" reads `mu_s`/`sigma_s`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no such statistics, or broken ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}; make them with `genlab stats IMAGES --out {path}`")
    suffix = {"pool": "", "spatial": "_s"}.get(layer)
    if suffix is None:
        raise ValueError(f"layer must be 'pool' or 'spatial', got {layer!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            compact = layer == "pool" and "sigma_upper" in names
            if f"mu{suffix}" not in names or not (compact or f"sigma{suffix}" in names):
                raise ValueError(f"it holds {sorted(names)}, but no mu{suffix} and sigma{suffix} ({layer} statistics)")
            n = int(file["n"]) if "n" in names else -1
            meta = json.loads(str(file["meta"])) if "meta" in names else {}
            mean = file[f"mu{suffix}"]
            cov = _unpack(file["sigma_upper"], mean.size) if compact else file[f"sigma{suffix}"]
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable npz of statistics: {error}") from error
    try:
        return Statistics(mean_D=mean, cov_DD=cov, n=n if n > 0 else None, meta=meta)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
