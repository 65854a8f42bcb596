"""`genlab reconstruct TOKENIZER`: images through a tokenizer and back, with figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config

from . import shared


@config
class ReconstructConfig:
    """Encode and decode images; print PSNR over all pixels and over non-white ones, a Fréchet distance, and for
    discrete tokens how much of the codebook they use, a flextok's by channel and level too.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A tokenizer: a shipped name, a folder or a Hub id."""
    images: str = ""
    """SOURCE or SOURCE:SPLIT: `emoji:heldout`, a folder, shards, `hf:name`; for a tokenizer of clips
    `emoji-anim:heldout`, a folder of films, or one film. SOURCE alone is its held-out part (of a folder without one, an
    image in ten), SOURCE:all is all of it. Empty: the embedded set."""
    n: int | None = None
    """Only the first n images."""
    tokens: str = ""
    """Ordered tokens (a flextok's): figures and columns for so many of them: 1,2,4,8, or `all`."""
    grid: Path | None = None
    """Write originals above reconstructions as one PNG; of clips, as .webp, .gif or .mp4."""
    rows: int = 4
    """Pairs of rows in the grid."""
    fd: bool = True
    """Also compute fd_efficientnet_lite0 of reconstructions against originals."""
    metrics: tuple[str, ...] = ()
    """Further figures of `genlab eval`: ssim, lpips, stlpips, rfid, ..."""
    weights: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Weights files where they are not in the cache, by extractor: `--weights inception-2015 FILE`."""
    batch_size: int = 32
    """Images a batch."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Reconstruct and report."""
    from tokenizers_img.fsq import describe_usage

    c = shared.parse(ReconstructConfig, argv, prog="genlab reconstruct")
    shared.require_positive(c, "n", "rows", "batch_size")
    figures, pairs = reconstruct(c)
    if c.grid is not None:
        if isinstance(pairs, list):
            from genlab.data.video import write_film

            write_film(pairs, c.grid, figures["frames_a_second"])
        else:
            from genlab.pictures import save_png

            save_png(pairs, c.grid)
    if c.json:
        print(json.dumps(figures, indent=2))
    else:
        by_channel = describe_usage(figures) if "channels" in figures else []
        for name, value in figures.items():
            if isinstance(value, list):
                continue  # of each channel and position: lines of their own, and --json
            print(f"{name:<34} {value:.4f}" if isinstance(value, float) else f"{name:<34} {value}")
        print(*by_channel, sep="\n", end="\n" if by_channel else "")
    return 0


def reconstruct(c: ReconstructConfig) -> tuple[dict[str, Any], Any]:
    """Figures, and the grid of originals above reconstructions."""
    import torch
    from tqdm import tqdm

    from genlab.hub import from_pretrained
    from genlab.pictures import grid, to_float, to_uint8
    from tokenizers_img.base import Tokenizer

    from .report import open_held_out

    tokenizer = from_pretrained(c.model, device=shared.torch_device(c.device))
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{c.model} holds a {tokenizer.kind}, not a tokenizer; see `genlab list`")
    spec = tokenizer.spec
    assert spec.image_size is not None
    clips = len(spec.image_size) == 3
    if c.grid is not None:
        shared.require_grid(c.grid, c.model, clips)
    if clips:
        from .clips import reconstruct_clips

        return reconstruct_clips(c, tokenizer)
    images, name = open_held_out(c.images or "emoji", spec.image_size[-1])
    n = min(c.n or len(images), len(images))
    if c.tokens:
        if c.metrics:
            raise ValueError("--metrics goes without --tokens; give one or the other")
        from .kept import by_tokens

        return by_tokens(dataclasses.replace(c, images=name), tokenizer, images, n)
    originals, decoded, codes = [], [], []
    with torch.inference_mode():
        for start in tqdm(range(0, n, c.batch_size), desc="reconstructing", unit="batch", disable=None, leave=False):
            batch = images.batch(torch.arange(start, min(start + c.batch_size, n)))
            originals.append(batch)
            tokens = tokenizer.encode(to_float(batch).to(tokenizer.device))
            codes.append(tokens)
            decoded.append(to_uint8(tokenizer.decode(tokens)).cpu())
    x, y = torch.cat(originals), torch.cat(decoded)
    measures = shared.load("eval.reconstruction")
    error = (x.double() - y.double()).square().mean(1)
    inside = (x < measures.WHITE).any(1)
    numbers = spec.length * (spec.dim or spec.depth)
    figures: dict[str, Any] = {
        "model": c.model,
        "images": n,
        "source": name,
        "tokens": spec.describe(),
        "pixel_values_per_latent_number": x[0].numel() / numbers if spec.kind == "continuous" else None,
        "psnr_all_pixels_pooled": float(measures.decibels(error.mean())),
        "psnr_all_pixels_mean_of_images": float(measures.psnr(x, y).mean()),
        "psnr_non_white_pixels_pooled": float(measures.decibels(error[inside].mean())) if bool(inside.any()) else None,
    }
    figures |= tokenizer.usage(codes)
    wanted = (("fd_efficientnet_lite0",) if c.fd and n > 1 else ()) + c.metrics
    if wanted:
        result = shared.load("eval").evaluate(y, x, metrics=wanted, weights=c.weights, reference_is_sample=False)
        for figure in result.figures:
            name = figure.name
            figures |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    k = min(8 * c.rows, n)
    picks = torch.linspace(0, n - 1, k).long()
    rows = [part for i in range(0, k, 8) for part in (x[picks[i : i + 8]], y[picks[i : i + 8]]) if len(part) == 8]
    labels = ["original", "decoded"] * (len(rows) // 2)
    return figures, grid(torch.cat(rows) if rows else torch.cat([x[:1], y[:1]]), row_labels=labels, zoom=2)
