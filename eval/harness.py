"""`evaluate(generated, reference)`: figures with intervals, under a named protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from .features import EXTRACTORS, Extractor, Inception2015, file_hash
from .frechet import FrechetResult, frechet_with_error
from .manifold import GROUPS, Manifolds, in_single_precision, manifolds
from .per_image import PER_IMAGE, per_image_figures
from .protocols import EMBEDDED, Protocol, published_reference
from .protocols import protocol as find_protocol
from .result import NOT_COMPARABLE, PUBLISHED_IMAGES, Figure, Result, Side
from .sources import ArrayImages, StreamImages, open_source, source_name
from .statistics import Statistics, is_statistics, load_statistics, npz_names
from .store import FeatureStore, cache_dir, cache_limit, evict, extract, in_use, store_folder


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is made: a family of formulas on one layer of one extractor."""

    family: str
    extractor: str
    layer: str = "pool"
    better: str = "lower"


def _metrics() -> dict[str, Metric]:
    lower = {"frechet": "fd", "infinity": "fd_infinity", "kernel": "kd"}
    higher = ("precision", "recall", "density", "coverage")
    inception = "inception-2015"
    out = {
        "fid": Metric("frechet", inception),
        "rfid": Metric("paired_frechet", inception),
        "sfid": Metric("frechet", inception, "spatial"),
        "is": Metric("score", inception, "logits", "higher"),
        "kid": Metric("kernel", inception),
        "fid_infinity": Metric("infinity", inception),
        **{name: Metric(name, inception, better="higher") for name in higher},
        "cmmd": Metric("cmmd", "clip-vit-l14-336"),
    }
    for tail, extractor in (("dinov2", "dinov2-vit-l14"), ("efficientnet_lite0", "efficientnet-lite0")):
        out |= {f"{name}_{tail}": Metric(family, extractor) for family, name in lower.items()}
        out |= {f"{name}_{tail}": Metric(name, extractor, better="higher") for name in higher}
    return out


METRICS = _metrics()
"""Every metric of a set by name. Only figures of Inception-2015 are called fid, rfid, sfid, is or kid."""

PACKAGES = ("genlab", "torch", "torchvision", "timm", "torch-fidelity", "transformers", "numpy", "pillow")


@dataclasses.dataclass(kw_only=True)
class FeatureSet:
    """One side of a comparison: its features (none behind a statistics file) and its record."""

    store: FeatureStore | None
    path: Path | None
    """A statistics file; ADM's reference batches hold images besides, for precision and recall."""
    record: Side
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    """Class index of each image, where the source has classes."""
    classes: tuple[str, ...] = ()
    """Their names."""

    def statistics(self, layer: str) -> Statistics:
        """Mean and covariance of a layer."""
        if self.path is not None:
            return load_statistics(self.path, layer=layer)
        assert self.store is not None
        return self.store.statistics(layer)

    def features(self, layer: str, metric: str) -> np.ndarray:
        """All features of a layer, (n, D); a statistics file has none and is refused."""
        if self.store is None:
            raise ValueError(
                f"{metric} needs the images' features, but {self.path} holds only their mean and covariance; "
                "give the images themselves"
            )
        return self.store.read(layer)


@contextlib.contextmanager
def open_features(
    source: Any,
    extractor: Extractor,
    layers: Sequence[str],
    *,
    n: int | None = None,
    size: int | None = None,
    on_error: str = "raise",
    cache: Path | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool = False,
    features: bool = True,
) -> Iterator[FeatureSet]:
    """A side's features: from the cache, from a statistics file, or computed.

    Arguments as in `evaluate`; `features=False` is content with the statistics of a file that also holds images.
    """
    given = None
    if (path := _statistics_file(source)) is not None:
        given = _from_statistics(path, extractor, layers, n)
        if not (features and "arr_0" in npz_names(path)):
            yield given
            return
    images: Any = open_source(source, n=n, size=size, on_error=on_error)
    cache = cache or cache_dir()
    limit = cache_limit()
    with contextlib.ExitStack() as stack:
        in_memory = isinstance(images, (StreamImages, ArrayImages)) and not isinstance(source, (str, Path))
        if in_memory:  # not worth keeping on disk beyond this call
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genlab-features-")))
        else:
            folder = store_folder(cache, images, extractor)
            stack.callback(evict, cache, limit)  # after the folder is let go
            stack.enter_context(in_use(folder))
        store = extract(
            images, extractor, layers, folder, batch_size=batch_size, workers=workers, progress=progress,
            shared=not in_memory,
        )  # fmt: skip
        record, notes = side_of(images, store.n)
        if given is not None:
            notes += (f"{given.record.source}: Fréchet distances take its mu and sigma, the rest its {store.n} images",)
            record = dataclasses.replace(given.record, skipped=record.skipped)
        labels = getattr(images, "labels", None)
        yield FeatureSet(
            store=store,
            path=None if given is None else given.path,
            record=record,
            notes=notes,
            labels=None if labels is None else np.asarray(labels),
            classes=tuple(getattr(images, "classes", ())),
        )


def side_of(images: Any, n: int) -> tuple[Side, tuple[str, ...]]:
    """The record of a set of images, and what a reader has to know of it."""
    skipped = [f"{key}: {reason}" for key, reason in getattr(images, "skipped", ())]
    record = Side(source=source_name(images), n=n, hash=images.fingerprint, skipped=len(skipped))
    made = Counter(what for image in getattr(images, "conversions", ()) for what in image)
    notes = [f"{count} images of {record.source} were {what}" for what, count in made.items()]
    if skipped:
        notes.append(f"{len(skipped)} images of {record.source} skipped, first {skipped[0]}")
    return record, tuple(notes)


def _statistics_file(source: Any) -> Path | None:
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    return path if path and path.suffix == ".npz" and path.is_file() and is_statistics(path) else None


def _from_statistics(path: Path, extractor: Extractor, layers: Sequence[str], n: int | None) -> FeatureSet:
    if n is not None:
        raise ValueError(f"{path} holds statistics; a number of images cannot be chosen from it")
    for layer in layers:
        if layer not in ("pool", "spatial"):
            continue  # refused by the metric that wants it, with the metric's name
        statistics = load_statistics(path, layer=layer)
        made_with = statistics.meta.get("extractor")
        if made_with and made_with != extractor.key:
            raise ValueError(
                f"{path} was made with {made_with}, not with {extractor.key}; "
                f"make it again with `genlab stats IMAGES --out {path}` and this extractor and protocol"
            )
        if statistics.dim != extractor.layers[layer]:
            raise ValueError(
                f"{path} has {statistics.dim} dimensions, but {extractor.name}'s {layer} has "
                f"{extractor.layers[layer]}: it was made with another extractor"
            )
    record = Side(source=str(path), n=load_statistics(path).n, hash=file_hash(path))
    return FeatureSet(store=None, path=path, record=record)


def make_extractor(
    name: str, protocol: Protocol, weights: str | Path | Mapping[str, Any] | None, device: str = "cpu"
) -> Extractor:
    """An extractor by name; the protocol decides how images reach Inception.

    Args:
        name: out of `EXTRACTORS`.
        protocol: the Inception metrics' protocol.
        weights: file of the weights, or a mapping from extractor names to files.
        device: where it runs.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")
    path = weights.get(name) if isinstance(weights, Mapping) else weights
    if name == "inception-2015":
        return Inception2015(path, device, resize=protocol.resize)
    return EXTRACTORS[name](path, device)  # type: ignore[call-arg]


def evaluate(
    generated: Any,
    reference: Any = None,
    *,
    metrics: Sequence[str] = ("fd_efficientnet_lite0",),
    protocol: str = "torch-fidelity",
    n: int | None = None,
    reference_n: int | None = None,
    size: int | None = None,
    on_error: str = "raise",
    reference_is_sample: bool = True,
    confidence: float = 0.95,
    weights: str | Path | Mapping[str, Any] | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "cpu",
    cache: str | Path | None = None,
    class_protocol: str = "",
    seeds: str = "",
    sampler: str = "",
    guidance: str = "",
    details: bool = False,
    progress: bool = False,
) -> Result:
    """Judge a set of images against a reference.

    Args:
        generated: a folder, tar, npz of images (`arr_0`) or of statistics, `hf:NAME`, `emoji:heldout`, a
            uint8 tensor (N, 3, H, W), an object with `len`/`batch`/`fingerprint` (such as
            `GeneratedImages`, which draws from a model as it is read), or an iterable of uint8 batches.
        reference: the same, or `published:NAME`, a reference that the protocol's authors hand out; not needed
            for the Inception score and the CLIP score alone.
        metrics: names out of `METRICS` (figures of a set) and `eval.per_image.PER_IMAGE` (means over images).
        protocol: fixes resize, antialiasing, quantisation and extractor of the Inception metrics.
        n: use only the first n generated images.
        reference_n: use only the first so many reference images.
        size: bring images of folders and tars to this side first.
        on_error: "raise" or "skip" (counted in the result) for images that cannot be read.
        reference_is_sample: add the reference's own sampling error to the intervals; False where the
            reference is the whole population.
        confidence: level of the intervals.
        weights: file of the extractor's weights where they are not in the cache; with several extractors a
            mapping from their names to files.
        batch_size: images a forward.
        workers: processes that decode files; 0 decodes in a thread; None takes the spare cores, at most 4.
        device: where the extractors run.
        cache: folder for features and statistics; `GENLAB_CACHE` or ~/.cache/genlab.
        class_protocol: recorded in the result, as are `seeds`, `sampler` and `guidance`.
        seeds: image seeds.
        sampler: sampler and settings.
        guidance: guidance scale or schedule.
        details: collect what the report shows beside the figures (`Result.extra`).
        progress: progress bars on stderr.

    Under torchrun or `accelerate launch` every process takes its share of the images; all return the result.

    Raises:
        ValueError: unknown metric or protocol, broken images, statistics of another dimension, NaN features.
        FileNotFoundError: missing images or weights, with the command that fetches them.
    """
    known = {**METRICS, **PER_IMAGE}
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise ValueError(f"unknown metric {unknown or '(none)'}; known: {', '.join(known)}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    rules = find_protocol(protocol)
    of_sets = [name for name in metrics if name in METRICS]
    per_image = [name for name in metrics if name in PER_IMAGE]
    alone = ("is", "clip_score")
    needs_reference = [name for name in metrics if name not in alone]
    if reference is None and needs_reference:
        raise ValueError(f"{needs_reference[0]} needs a reference set")
    if isinstance(reference, str) and reference.startswith("published:"):
        reference = published_reference(rules, reference.partition(":")[2], Path(cache) if cache else cache_dir())
    extractors = list(dict.fromkeys(METRICS[name].extractor for name in of_sets))
    weighted = [*extractors, *(name for name in per_image if name == "clip_score")]
    if isinstance(weights, Mapping) and (odd := set(weights) - {*EXTRACTORS, "clip_score"}):
        raise ValueError(f"weights for {', '.join(sorted(odd))}; expected {', '.join(EXTRACTORS)} or clip_score")
    if isinstance(weights, (str, Path)) and len(weighted) > 1:
        raise ValueError(f"one weights file for {', '.join(weighted)}; map these names to files")
    if len(extractors) + bool(per_image) > 1:
        generated, reference = _rereadable(generated), _rereadable(reference)
    reading: dict[str, Any] = {"size": size, "on_error": on_error}
    options: dict[str, Any] = {
        **reading,
        "cache": Path(cache) if cache else None,
        "batch_size": batch_size,
        "workers": workers,
        "progress": progress,
    }
    if getattr(generated, "inline", False) and isinstance(reference, (str, Path)) and not _statistics_file(reference):
        open_source(reference, n=reference_n, **reading)  # one that can't be read is refused before hours of drawing
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    figures: dict[str, Figure] = {}
    extra: dict[str, Any] = {}
    notes: list[str] = []
    sides: list[Side | None] = []
    for extractor_name in extractors:
        extractor = make_extractor(extractor_name, rules, weights, device)
        mine = [name for name in of_sets if METRICS[name].extractor == extractor_name]
        layers = tuple(dict.fromkeys(METRICS[name].layer for name in mine))
        common = tuple(layer for layer in layers if layer != "logits") or ("pool",)
        by_moments = all(METRICS[name].family in ("frechet", "infinity", "score") for name in mine)
        if (path := _statistics_file(reference)) is not None:  # refuse a wrong one now, not after hours of drawing
            _from_statistics(path, extractor, common, reference_n)
        with contextlib.ExitStack() as stack:
            ours = stack.enter_context(open_features(generated, extractor, layers, n=n, **options))
            theirs = None
            if reference is not None and mine != ["is"]:
                theirs = stack.enter_context(
                    open_features(
                        reference, extractor, common, n=reference_n, features=details or not by_moments, **options
                    )
                )
            compare = _Comparison(
                ours=ours, theirs=theirs, extractor=extractor, rules=rules, sampled=reference_is_sample, z=z
            )
            figures |= {name: compare.figure(name) for name in mine}
            if details and theirs is not None and not extra:
                from .details import collect

                extra = collect(ours, theirs, common[0])
            if not sides or (sides[1] is None and theirs):
                sides = [ours.record, theirs.record if theirs else None]
            notes += [*ours.notes, *(theirs.notes if theirs else ()), *compare.notes]
    if per_image:
        pair: list[Any] = [
            None if source is None else open_source(source, n=count, **reading)
            for source, count in ((generated, n), (reference, reference_n))
        ]
        figures |= per_image_figures(
            per_image, pair[0], pair[1], weights=weights, device=device, batch_size=batch_size, z=z
        )
        records = [None if images is None else side_of(images, len(images)) for images in pair]
        sides = sides or [record[0] if record else None for record in records]
        notes += [note for record in records if record for note in record[1]]
    assert sides[0] is not None
    count = sides[0].n or 0
    if count < PUBLISHED_IMAGES:
        number = f"{count} images" if count else "unknown number of images"
        notes.insert(0, f"{number}: {NOT_COMPARABLE}, which use {PUBLISHED_IMAGES:,}")
    if any(METRICS[name].extractor != "inception-2015" for name in of_sets):
        notes.append("figures named after another network than Inception-2015 are not FID")
    return Result(
        figures=tuple(figures[name] for name in metrics),
        protocol=protocol if "inception-2015" in extractors else EMBEDDED,
        generated=sides[0],
        reference=sides[1],
        class_protocol=class_protocol,
        seeds=seeds,
        sampler=sampler,
        guidance=guidance,
        confidence=confidence,
        versions=versions(),
        notes=tuple(dict.fromkeys(notes)),
        extra=extra,
    )


def _rereadable(source: Any) -> Any:
    """An iterable of batches can be read once; several extractors need its images several times."""
    if source is None or isinstance(source, (str, Path)):
        return source
    images: Any = open_source(source)
    if not isinstance(images, StreamImages):
        return images
    return ArrayImages(np.concatenate([chunk.numpy() for chunk in images.chunks(512)]), "stream")


@dataclasses.dataclass(kw_only=True)
class _Comparison:
    """Two feature sets under one extractor, and the figures of each family."""

    ours: FeatureSet
    theirs: FeatureSet | None
    extractor: Extractor
    rules: Protocol
    sampled: bool
    z: float
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        # several figures share these; the caches live as long as this comparison
        self.frechet = functools.cache(self._frechet)
        self.manifolds = functools.cache(self._manifolds)
        self.single = functools.cache(lambda layer, name: in_single_precision(*self._sets(layer, name)))

    def figure(self, name: str) -> Figure:
        """The figure of a metric."""
        metric = METRICS[name]
        part = _FAMILIES[metric.family](self, name, metric)
        low, high = part.pop("bounds", (0.0, np.inf))
        reach = part.pop("reach", self.z)  # standard errors on either side
        value, error = part["value"], part["standard_error"]
        if error is not None and not np.isnan(error):
            part["low"], part["high"] = max(low, value - reach * error), min(high, value + reach * error)
        else:
            part["standard_error"] = None
        return Figure(name=name, better=metric.better, extractor=self.extractor.key, layer=metric.layer, **part)

    def _sets(self, layer: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        assert self.theirs is not None
        return self.ours.features(layer, name), self.theirs.features(layer, name)

    def _frechet(self, layer: str, paired: bool = False) -> FrechetResult:
        assert self.theirs is not None
        mine = self.ours.store if self.ours.path is None else None
        other = self.theirs.store if self.theirs.path is None else None
        return frechet_with_error(
            self.ours.statistics(layer),
            self.theirs.statistics(layer),
            tiles=None if mine is None else lambda: mine.tiles(layer),
            reference_tiles=None if other is None or not (self.sampled or paired) else lambda: other.tiles(layer),
            paired=paired,
        )

    def _manifolds(self, layer: str, name: str) -> Manifolds:
        return manifolds(*self._sets(layer, name))

    def _reference(self, result: FrechetResult) -> str:
        return "taken as exact" if result.standard_error_reference is None else "a sample"

    def make_frechet(self, name: str, metric: Metric) -> dict[str, Any]:
        result = self.frechet(metric.layer)
        if result.standard_error is None:
            how = "none: no features behind the generated set's statistics"
        else:
            how = f"influence function, at this number of images; the reference is {self._reference(result)}"
        detail = {}
        if result.standard_error_reference is not None:
            detail["standard_error_reference"] = result.standard_error_reference
        return {
            "value": result.value, "standard_error": result.standard_error, "interval": how, "detail": detail,
        }  # fmt: skip

    def make_paired_frechet(self, name: str, metric: Metric) -> dict[str, Any]:
        assert self.theirs is not None
        counts = [None if side.store is None else side.store.n for side in (self.ours, self.theirs)]
        if None in counts or counts[0] != counts[1]:
            raise ValueError(
                f"{name} compares reconstructions with their originals, image by image: both sides must be images "
                f"and equally many, got {counts[0]} and {counts[1]}"
            )
        result = self.frechet(metric.layer, True)
        return {
            "value": result.value, "standard_error": result.standard_error,
            "interval": "influence function over pairs of reconstruction and original, at this number of images",
        }  # fmt: skip

    def make_infinity(self, name: str, metric: Metric) -> dict[str, Any]:
        from .infinity import frechet_infinity

        assert self.theirs is not None
        x = self.ours.features(metric.layer, name)
        full = self.frechet(metric.layer)
        out = frechet_infinity(x, self.theirs.statistics(metric.layer), full=full)
        if out.sizes[-1] <= x.shape[1]:
            self.notes.append(
                f"{name}: its smallest blocks have {out.sizes[-1]} images for {x.shape[1]} dimensions; "
                "the line in 1/N bends there, and the extrapolation is rough"
            )
        how = f"influence function and repeated cuts; the reference is {self._reference(full)}"
        detail = {f"at_{size}": value for size, value in zip(out.sizes, out.distances, strict=True)}
        return {
            "value": out.value, "standard_error": out.standard_error, "interval": how, "detail": detail,
            "bounds": (-np.inf, np.inf),
        }  # fmt: skip

    def make_score(self, name: str, metric: Metric) -> dict[str, Any]:
        from .inception_score import inception_score, students_reach

        logits = self.ours.features(metric.layer, name)
        mean, deviation, scores = inception_score(
            logits, splits=min(10, len(logits)), per_split=self.rules.isc_split, shuffle=self.rules.isc_shuffle
        )
        splits = len(scores)
        error = scores.std(ddof=1) / np.sqrt(splits) if splits > 1 else None
        return {
            "value": mean, "standard_error": None if error is None else float(error),
            "interval": f"standard error over {splits} splits, Student's t",
            "reach": students_reach(self.z, splits),
            "detail": {"deviation_over_splits": deviation, "splits": float(splits)},
            "bounds": (1.0, np.inf),
        }  # fmt: skip

    def make_kernel(self, name: str, metric: Metric) -> dict[str, Any]:
        from .kernels import kernel_distance

        out = kernel_distance(*self._sets(metric.layer, name))
        return {
            "value": out.mean, "standard_error": out.standard_error,
            "interval": "influence function and choice of subsets",
            "detail": {
                "deviation_over_subsets": out.subset_deviation, "subset_size": float(out.subset_size),
                "all_pairs": out.all_pairs.unbiased, "standard_error_all_pairs": out.all_pairs.standard_error,
            },
            "bounds": (-np.inf, np.inf),
        }  # fmt: skip

    def make_cmmd(self, name: str, metric: Metric) -> dict[str, Any]:
        from .kernels import discrepancy, gaussian

        out = discrepancy(*self._sets(metric.layer, name), kernel=gaussian)
        # Scaled by 1000, and the V-statistic, as in the authors' code.
        return {
            "value": 1000 * out.biased, "standard_error": 1000 * out.standard_error,
            "interval": "influence function", "detail": {"unbiased": 1000 * out.unbiased},
        }  # fmt: skip

    def make_manifold(self, name: str, metric: Metric) -> dict[str, Any]:
        # one cache entry for the four figures: the name only serves a refusal
        figures = "precision, recall, density and coverage"
        out = self.manifolds(metric.layer, figures)
        value, detail = getattr(out, metric.family), {}
        if name in ("precision", "recall") and self.rules.name == "torch-fidelity":
            detail = {"in_double_precision": value}
            value = dict(zip(("precision", "recall"), self.single(metric.layer, figures), strict=True))[name]
        return {
            "value": value,
            "standard_error": out.standard_errors[metric.family],
            "interval": f"jack-knife over {GROUPS} groups of each set",
            "detail": detail,
            "bounds": (0.0, np.inf if metric.family == "density" else 1.0),
        }


_FAMILIES = {
    "frechet": _Comparison.make_frechet,
    "paired_frechet": _Comparison.make_paired_frechet,
    "infinity": _Comparison.make_infinity,
    "score": _Comparison.make_score,
    "kernel": _Comparison.make_kernel,
    "cmmd": _Comparison.make_cmmd,
    **dict.fromkeys(("precision", "recall", "density", "coverage"), _Comparison.make_manifold),
}


def versions() -> dict[str, str]:
    """Versions of the packages that a figure may depend on."""
    out = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def make_statistics(source: Any, *, layer: str = "pool", **options: Any) -> Statistics:
    """Statistics of a set of images, ready to `save` (`genlab stats`); options as in `layer_statistics`."""
    return layer_statistics(source, (layer,), **options)[layer]


def layer_statistics(
    source: Any,
    layers: Sequence[str],
    *,
    extractor: str = "efficientnet-lite0",
    protocol: str = "torch-fidelity",
    n: int | None = None,
    size: int | None = None,
    on_error: str = "raise",
    weights: str | Path | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "cpu",
    cache: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Statistics]:
    """Statistics of several layers of an extractor, from one pass over the images; arguments as in `evaluate`.

    Raises:
        ValueError: for a file that holds statistics already: who made them isn't known here.
    """
    if _statistics_file(source) is not None:
        raise ValueError(f"{source} holds statistics already; give the images")
    network = make_extractor(extractor, find_protocol(protocol), weights, device)
    with open_features(
        source, network, layers, n=n, size=size, on_error=on_error,
        cache=Path(cache) if cache else None, batch_size=batch_size, workers=workers, progress=progress,
    ) as images:  # fmt: skip
        record = images.record
        meta = {
            "extractor": network.key, "source": record.source, "hash": record.hash, "skipped": record.skipped,
            "notes": list(images.notes),
        }  # fmt: skip
        return {layer: dataclasses.replace(images.statistics(layer), meta=meta) for layer in layers}
