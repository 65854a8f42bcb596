"""The configs behind `genlab stats` and `genlab eval`, and the functions they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from genlab.config import config

from .result import Result
from .statistics import Statistics


@config
class StatsConfig:
    """Mean and covariance of a set's features, to judge generated images against later."""

    images: str
    """A folder, tar or webdataset, npz with `arr_0`, `hf:NAME`, or `SOURCE:SPLIT` such as `emoji:train`."""
    out: Path
    """The npz to write."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0, inception-2015 (FID), dinov2-vit-l14 or clip-vit-l14-336."""
    protocol: str = "torch-fidelity"
    """How images reach Inception: torch-fidelity, clean-fid, adm or pytorch-fid."""
    n: int | None = None
    """Use only the first n images."""
    size: int | None = None
    """Centre-crop and resize the images to this side first."""
    on_error: Literal["raise", "skip"] = "raise"
    """Images that cannot be read: stop, or skip them, count and report."""
    weights: Path | None = None
    """File of the extractor's weights where they are not in the cache."""
    batch_size: int = 32
    """Images a forward."""
    workers: int | None = None
    """Processes that decode files; 0 decodes in a thread; by default the spare cores, at most 4."""
    device: str = "cpu"
    """Where the extractor runs."""
    cache: Path | None = None
    """Folder for features, at most GENLAB_CACHE_GB (20) of them; GENLAB_CACHE or ~/.cache/genlab."""
    spatial: bool = False
    """Also keep Inception's spatial statistics, which sFID needs."""
    compact: bool = False
    """Write a quarter of the bytes (float32 triangle), which only genlab reads."""


@config
class EvalConfig:
    """Judge generated images against a reference, with intervals and the protocol written down."""

    generated: str = ""
    """The images to judge: a folder, tar, npz of images or statistics, `hf:NAME` or `SOURCE:SPLIT`."""
    reference: str = ""
    """What they are judged against: the same kinds, or `published:NAME`, handed out by the protocol's authors."""
    metrics: tuple[str, ...] = ("fd_efficientnet_lite0",)
    """fid, sfid, is, kid, precision, recall, density, coverage, fid_infinity, cmmd, fd_dinov2, or kin of the
    embedded network: fd_, kd_, precision_, ... followed by efficientnet_lite0. Of reconstructions against their
    originals: rfid, psnr, psnr_foreground, ssim, lpips, stlpips. Of images with captions: clip_score."""
    protocol: str = "torch-fidelity"
    """How images reach Inception: torch-fidelity, clean-fid, adm or pytorch-fid."""
    n: int | None = None
    """Use only the first n generated images."""
    reference_n: int | None = None
    """Use only the first so many reference images."""
    size: int | None = None
    """Centre-crop and resize the images of folders, tars and data sets to this side first."""
    on_error: Literal["raise", "skip"] = "raise"
    """Images that cannot be read: stop, or skip them, count and report."""
    reference_is_sample: bool = True
    """Add the reference's own sampling error to the intervals; False where it is the whole population."""
    confidence: float = 0.95
    """Level of the intervals."""
    weights: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Weights files where they are not in the cache, by extractor: `--weights inception-2015 FILE`."""
    batch_size: int = 32
    """Images a forward."""
    workers: int | None = None
    """Processes that decode files; 0 decodes in a thread; by default the spare cores, at most 4."""
    device: str = "cpu"
    """Where the extractors run."""
    cache: Path | None = None
    """Folder for features, at most GENLAB_CACHE_GB (20) of them; GENLAB_CACHE or ~/.cache/genlab."""
    class_protocol: str = ""
    """How classes were drawn, for the record."""
    seeds: str = ""
    """Image seeds, for the record."""
    sampler: str = ""
    """Sampler and its settings, for the record."""
    guidance: str = ""
    """Guidance, for the record."""
    json: Path | None = None
    """Write the result here."""
    html: Path | None = None
    """Write the report here: nearest training images, per-class distances, worst and best images, plots."""
    table: tuple[Path, ...] = ()
    """Print these results (files of `--json`) as one table, and stop; refused where they were not measured alike."""
    self_test: bool = False
    """Check this installation against closed forms and other packages, and stop."""


def run_stats(config: StatsConfig, *, images: Any = None, progress: bool = False) -> Statistics:
    """Compute and write statistics.

    Args:
        config: what to do.
        images: an opened source in place of `config.images`.
        progress: bars on stderr.
    """
    from genlab.processes import processes

    from .harness import layer_statistics

    statistics = layer_statistics(
        config.images if images is None else images,
        ("pool", "spatial") if config.spatial else ("pool",),
        extractor=config.extractor,
        protocol=config.protocol,
        n=config.n,
        size=config.size,
        on_error=config.on_error,
        weights=config.weights,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
        cache=config.cache,
        progress=progress,
    )
    if processes()[0] == 0:
        statistics["pool"].save(config.out, spatial=statistics.get("spatial"), compact=config.compact)
    return statistics["pool"]


def run_eval(config: EvalConfig, *, generated: Any = None, reference: Any = None, progress: bool = False) -> Result:
    """Evaluate, and write the JSON and HTML asked for.

    Args:
        config: what to do.
        generated: an opened source in place of `config.generated`, such as `GeneratedImages` of a model.
        reference: likewise.
        progress: bars on stderr.

    Raises:
        ValueError: no generated images named, or what `evaluate` raises.
    """
    from genlab.processes import processes

    from .harness import evaluate
    from .protocols import protocol, published_reference
    from .store import cache_dir

    ours = generated if generated is not None else config.generated
    theirs = reference if reference is not None else config.reference or None
    if isinstance(ours, str) and not ours:
        raise ValueError("name the images to judge with `--generated`, and what to judge them against: `--reference`")
    if isinstance(theirs, str) and theirs.startswith("published:"):
        theirs = published_reference(protocol(config.protocol), theirs.partition(":")[2], config.cache or cache_dir())
    weights: Mapping[str, Any] | None = config.weights or None
    result = evaluate(
        ours,
        theirs,
        metrics=config.metrics,
        protocol=config.protocol,
        n=config.n,
        reference_n=config.reference_n,
        size=config.size,
        on_error=config.on_error,
        reference_is_sample=config.reference_is_sample,
        confidence=config.confidence,
        weights=weights,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
        cache=config.cache,
        class_protocol=config.class_protocol,
        seeds=config.seeds,
        sampler=config.sampler,
        guidance=config.guidance,
        details=config.html is not None,
        progress=progress,
    )
    if processes()[0] > 0:  # one process writes
        return result
    if config.json is not None:
        result.save(config.json)
    if config.html is not None:
        from .page import write_html

        pictures = [_pictures(source, n, config) for source, n in ((ours, config.n), (theirs, config.reference_n))]
        classes = getattr(pictures[0], "classes", ())
        write_html(result, config.html, generated=pictures[0], reference=pictures[1], classes=classes)
    return result


def _pictures(source: Any, n: int | None, config: EvalConfig) -> Any:
    """The images again, for the report's pictures; None for statistics files."""
    from .sources import StreamImages, open_source
    from .statistics import npz_names

    if source is None or (str(source).endswith(".npz") and "arr_0" not in npz_names(Path(source).expanduser())):
        return None
    images = open_source(source, n=n, size=config.size, on_error=config.on_error)
    return None if isinstance(images, StreamImages) else images
