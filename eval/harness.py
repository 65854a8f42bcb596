"""`evaluate(generated, reference)`: figures with intervals, under a named protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

from .features import EXTRACTORS, Extractor, file_hash
from .frechet import frechet_with_error
from .result import NOT_COMPARABLE, PUBLISHED_IMAGES, Figure, Result, Side
from .sources import StreamImages, open_source, source_name
from .statistics import Statistics, is_statistics, load_statistics
from .store import FeatureStore, cache_dir, extract, store_folder


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is made: a family of formulas on one layer of one extractor."""

    family: str
    extractor: str
    layer: str = "pool"
    better: str = "lower"


METRICS = {
    "fid": Metric("frechet", "inception-2015"),
    "sfid": Metric("frechet", "inception-2015", "spatial"),
    "fd_efficientnet_lite0": Metric("frechet", "efficientnet-lite0"),
}

PROTOCOLS = ("torch-fidelity",)


@dataclasses.dataclass(kw_only=True)
class _Set:
    """One side: its features (None for statistics files) and its record."""

    store: FeatureStore | None
    path: Path | None
    record: Side

    def statistics(self, layer: str) -> Statistics:
        if self.store is not None:
            return self.store.statistics(layer)
        assert self.path is not None
        return load_statistics(self.path, layer=layer)


@contextlib.contextmanager
def _features(
    source: Any,
    extractor: Extractor,
    layers: Sequence[str],
    *,
    n: int | None,
    size: int | None,
    on_error: str,
    cache: Path,
    batch_size: int,
    progress: bool,
) -> Iterator[_Set]:
    """A side's features: from the cache, from a statistics file, or computed."""
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz" and Path(source).is_file():
        path = Path(source)
        if is_statistics(path):
            if n is not None:
                raise ValueError(f"{path} holds statistics; a number of images cannot be chosen from it")
            first = load_statistics(path)
            made_with = first.meta.get("extractor")
            if made_with and made_with != extractor.key:
                raise ValueError(
                    f"{path} was made with {made_with}, not with {extractor.key}; "
                    f"make it again with `genlab stats IMAGES --out {path}` and this extractor"
                )
            width = extractor.layers["pool"]
            if first.dim != width:
                raise ValueError(
                    f"{path} has {first.dim} dimensions, but {extractor.name} has {width}: "
                    "it was made with another extractor"
                )
            record = Side(source=str(path), n=first.n, hash=file_hash(path))
            yield _Set(store=None, path=path, record=record)
            return
    images = open_source(source, n=n, size=size, on_error=on_error)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    with contextlib.ExitStack() as stack:
        fingerprint = images.fingerprint
        if isinstance(images, StreamImages) or not isinstance(source, (str, Path)):
            # what lives in memory is not worth keeping on disk beyond this call
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genlab-features-")))
        else:
            folder = store_folder(cache, fingerprint, extractor)
        store = extract(images, extractor, layers, folder, **options)
        skipped = len(getattr(images, "skipped", ()))
        record = Side(
            source=source_name(source), n=store.n, hash=fingerprint or images.fingerprint, skipped=skipped
        )
        yield _Set(store=store, path=None, record=record)


def evaluate(
    generated: Any,
    reference: Any,
    *,
    metrics: Sequence[str] = ("fd_efficientnet_lite0",),
    protocol: str = "torch-fidelity",
    n: int | None = None,
    reference_n: int | None = None,
    size: int | None = None,
    on_error: str = "raise",
    reference_is_sample: bool = True,
    confidence: float = 0.95,
    weights: str | Path | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    cache: str | Path | None = None,
    class_protocol: str = "",
    seeds: str = "",
    sampler: str = "",
    guidance: str = "",
    progress: bool = False,
) -> Result:
    """Judge a set of images against a reference.

    Args:
        generated: a folder, tar, npz of images (`arr_0`) or of statistics, `emoji:heldout`, a uint8 tensor
            (N, 3, H, W), an object with `len`/`batch`/`fingerprint`, or an iterable of uint8 batches.
        reference: the same.
        metrics: names out of `METRICS`.
        protocol: fixes resize, antialiasing, quantisation and extractor of the Inception metrics.
        n: use only the first n generated images.
        reference_n: use only the first so many reference images.
        size: bring images of folders and tars to this size first.
        on_error: "raise" or "skip" (counted in the result) for images that cannot be read.
        reference_is_sample: add the reference's own sampling error to the intervals; False where the
            reference is the whole population.
        confidence: level of the intervals.
        weights: file of the extractor's weights, where they are not in the cache.
        batch_size: images a forward.
        device: where the extractor runs.
        cache: folder for features and statistics; `GENLAB_CACHE` or ~/.cache/genlab.
        class_protocol: recorded in the result, as are `seeds`, `sampler` and `guidance`.
        seeds: image seeds.
        sampler: sampler and settings.
        guidance: guidance scale or schedule.
        progress: progress bars on stderr.

    Raises:
        ValueError: unknown metric or protocol, broken images, statistics of another dimension, NaN features.
        FileNotFoundError: missing images or weights, with the command that fetches them.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"unknown metric {unknown or '(none given)'}; known: {', '.join(METRICS)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    root = Path(cache) if cache else cache_dir()
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    figures: dict[str, Figure] = {}
    sides: list[Side] = []
    for extractor_name in dict.fromkeys(METRICS[name].extractor for name in metrics):
        extractor = EXTRACTORS[extractor_name](weights, device)  # type: ignore[call-arg]
        mine = [name for name in metrics if METRICS[name].extractor == extractor_name]
        layers = tuple(dict.fromkeys(METRICS[name].layer for name in mine))
        options: dict[str, Any] = {
            "size": size, "on_error": on_error, "cache": root, "batch_size": batch_size, "progress": progress,
        }  # fmt: skip
        with (
            _features(generated, extractor, layers, n=n, **options) as ours,
            _features(reference, extractor, layers, n=reference_n, **options) as theirs,
        ):
            sides = sides or [ours.record, theirs.record]
            for name in mine:
                figures[name] = _frechet_figure(
                    name, METRICS[name], extractor, ours, theirs, reference_is_sample, z
                )
    notes = []
    count = sides[0].n or 0
    if count < PUBLISHED_IMAGES:
        notes.append(
            f"{count or 'an unknown number of'} images: {NOT_COMPARABLE} (those use {PUBLISHED_IMAGES:,})"
        )
    if any(figure.name.startswith("fd_") for figure in figures.values()):
        notes.append(
            "figures named fd_* are Fréchet distances on another network than FID's: they are not FID"
        )
    return Result(
        figures=tuple(figures[name] for name in metrics),
        protocol=protocol,
        generated=sides[0],
        reference=sides[1],
        class_protocol=class_protocol,
        seeds=seeds,
        sampler=sampler,
        guidance=guidance,
        confidence=confidence,
        versions=versions(),
        notes=tuple(notes),
    )


def _frechet_figure(
    name: str, metric: Metric, extractor: Extractor, ours: _Set, theirs: _Set, sampled: bool, z: float
) -> Figure:
    a, b = ours.statistics(metric.layer), theirs.statistics(metric.layer)
    mine, other = ours.store, theirs.store
    result = frechet_with_error(
        a,
        b,
        tiles=None if mine is None else lambda: mine.tiles(metric.layer),
        reference_tiles=None if other is None or not sampled else lambda: other.tiles(metric.layer),
    )
    se = result.standard_error
    exact = result.standard_error_reference is None
    how = "influence function, at this number of images; reference taken as " + (
        "exact" if exact else "a sample"
    )
    return Figure(
        name=name,
        value=result.value,
        low=None if se is None else max(0.0, result.value - z * se),
        high=None if se is None else result.value + z * se,
        standard_error=se,
        interval="none: no features behind the generated set's statistics" if se is None else how,
        better=metric.better,
        extractor=extractor.key,
        layer=metric.layer,
        detail={} if exact else {"standard_error_reference": float(result.standard_error_reference or 0.0)},
    )


def versions() -> dict[str, str]:
    """Versions of the packages that a figure may depend on."""
    out = {}
    for name in (
        "genlab",
        "torch",
        "torchvision",
        "timm",
        "torch-fidelity",
        "transformers",
        "numpy",
        "pillow",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def make_statistics(
    source: Any,
    *,
    extractor: str = "efficientnet-lite0",
    n: int | None = None,
    size: int | None = None,
    on_error: str = "raise",
    weights: str | Path | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    cache: str | Path | None = None,
    progress: bool = False,
) -> Statistics:
    """Statistics of a set of images, ready to `save` (`genlab stats`); arguments as in `evaluate`."""
    if extractor not in EXTRACTORS:
        raise ValueError(f"unknown extractor {extractor!r}; known: {', '.join(EXTRACTORS)}")
    network = EXTRACTORS[extractor](weights, device)  # type: ignore[call-arg]
    root = Path(cache) if cache else cache_dir()
    with _features(
        source, network, ("pool",), n=n, size=size, on_error=on_error, cache=root,
        batch_size=batch_size, progress=progress,
    ) as images:  # fmt: skip
        statistics = images.statistics("pool")
        meta = {"extractor": network.key, "source": images.record.source, "hash": images.record.hash}
        return dataclasses.replace(
            statistics, meta={**statistics.meta, **meta, "skipped": images.record.skipped}
        )
