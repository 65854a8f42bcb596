"""Figures that are means over images: how near reconstructions are to their originals, and the CLIP score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .result import Figure
from .sources import Images, StreamImages

PER_IMAGE = {
    "psnr": "higher",
    "psnr_foreground": "higher",
    "ssim": "higher",
    "lpips": "lower",
    "stlpips": "lower",
    "clip_score": "higher",
}
"""Every figure that is a mean over images or pairs, and which way is better."""


def per_image_figures(
    names: Sequence[str],
    generated: Images | StreamImages,
    reference: Images | StreamImages | None,
    *,
    weights: str | Path | Mapping[str, Any] | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    z: float = 1.96,
) -> dict[str, Figure]:
    """Means over images with intervals of `z` standard errors of the mean.

    Args:
        names: out of `PER_IMAGE`.
        generated: reconstructions in the order of their originals, or (`clip_score`) images with `captions`.
        reference: the originals; `clip_score` needs none.
        weights: a CLIP's folder, or a mapping from `clip_score` to it.
        device: where the networks run.
        batch_size: images a forward.
        z: standard errors on either side.

    Raises:
        ValueError: unequal numbers or sizes, or images without captions.
    """
    if isinstance(generated, StreamImages) or isinstance(reference, StreamImages):
        raise ValueError(f"{names[0]} reads images by index; give a folder, an npz or an array, not a stream")
    out = {}
    paired = tuple(name for name in names if name != "clip_score")
    if paired:
        from .reconstruction import reconstruction_figures

        if reference is None or len(reference) != len(generated):
            count = 0 if reference is None else len(reference)
            raise ValueError(
                f"{paired[0]} compares image by image: {len(generated)} reconstructions, but {count} originals"
            )
        pairs = ((reference.batch(rows), generated.batch(rows)) for rows in _batches(len(generated), batch_size))
        for name, mean in reconstruction_figures(pairs, metrics=paired, device=device).items():
            out[name] = _figure(name, mean.values_N, z)
    if "clip_score" in names:
        from .text import CLIP, clip_name, clip_scores

        captions = list(getattr(generated, "captions", ()))
        missing = sum(not caption for caption in captions) if captions else len(generated)
        if missing:
            raise ValueError(
                f"clip_score needs a caption for every image, {missing} of {len(generated)} have none; a folder "
                "takes them from NAME.txt beside NAME.png or from metadata.jsonl, shards from .txt"
            )
        given = weights.get("clip_score") if isinstance(weights, Mapping) else weights
        texts = ((generated.batch(rows), [captions[i] for i in rows]) for rows in _batches(len(generated), batch_size))
        scores = clip_scores(texts, model=given or CLIP, device=device)
        out["clip_score"] = _figure("clip_score", scores, z, extractor=clip_name(given or CLIP))
    return out


def _batches(n: int, batch_size: int) -> Iterator[list[int]]:
    for start in range(0, n, batch_size):
        yield list(range(start, min(start + batch_size, n)))


def _figure(name: str, values_N: np.ndarray, z: float, extractor: str = "") -> Figure:
    finite = values_N[np.isfinite(values_N)]  # foreground PSNR of an all-white image is NaN: nothing to measure
    mean = float(finite.mean())
    error = float(finite.std(ddof=1) / np.sqrt(len(finite))) if len(finite) > 1 else None
    return Figure(
        name=name,
        value=mean,
        low=None if error is None else mean - z * error,
        high=None if error is None else mean + z * error,
        standard_error=error,
        interval="standard error of the mean over images",
        better=PER_IMAGE[name],
        extractor=extractor,
        detail={"images": float(len(finite))},
    )
