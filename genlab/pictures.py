"""Pictures in and out: uint8 and float tensors, labelled grids, PNG files with metadata."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 to float32 in [-1, 1].

    Raises:
        ValueError: for another dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) to uint8, rounded to nearest.

    Raises:
        ValueError: for integers, NaN or infinity.
    """
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(
            f"expected finite float images in [-1, 1], got {images.dtype} with NaN or infinity or integers"
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """One image (3, H, W), float in [-1, 1] or uint8, as a PIL image."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a PNG, whole or not at all, with text metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


LABEL = 72
"""Letters of a caption that a grid has room for."""


def grid(
    images: torch.Tensor,
    *,
    columns: int = 8,
    row_labels: Sequence[str] = (),
    title: str = "",
    zoom: int = 1,
) -> Image.Image:
    """Images (N, 3, H, W), float in [-1, 1] or uint8, as one picture.

    Args:
        images: row by row.
        columns: images a row.
        row_labels: a caption at the left of each row, long ones cut.
        title: a line above.
        zoom: enlarge each image by this whole factor.
    """
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    n, _, h, w = images.shape
    h, w, gap = h * zoom, w * zoom, 2 * max(1, zoom)
    rows = -(-n // columns)
    font = ImageFont.load_default(size=max(11, min(16, h // 4)))
    row_labels = [label if len(label) <= LABEL else f"{label[: LABEL - 1]}…" for label in row_labels]
    left = int(max((font.getlength(label) for label in row_labels), default=-8)) + 8 if row_labels else 0
    top = 24 if title else 0
    canvas = Image.new("RGB", (left + columns * (w + gap) + gap, top + rows * (h + gap) + gap), (225, 225, 225))
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((4, 4), title, fill=(0, 0, 0), font=font)
    for r, label in enumerate(row_labels[:rows]):
        draw.text((4, top + gap + r * (h + gap) + h // 2), label, fill=(0, 0, 0), font=font, anchor="lm")
    for i in range(n):
        tile = to_pil(images[i]).resize((w, h), Image.Resampling.NEAREST)
        canvas.paste(tile, (left + gap + i % columns * (w + gap), top + gap + i // columns * (h + gap)))
    return canvas


def sheet(clips: torch.Tensor, **options: Any) -> list[Image.Image]:
    """Clips (N, T, 3, H, W) as one animated contact sheet: a `grid` a frame, with its options."""
    return [grid(clips[:, t], **options) for t in range(clips.shape[1])]
