"""Clips through a tokenizer and back: `genlab reconstruct` for tokenizers of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import shared


def open_named(name: str, tokenizer: Any) -> Any:
    """The clips of SOURCE, SOURCE:SPLIT, or of one film.

    Raises:
        FileNotFoundError, ValueError: as `open_clips`, `read_film`.
    """
    from genlab.data.clips import open_clips
    from genlab.data.images import named_split

    t = tokenizer.config
    path = Path(name)
    if path.is_file():
        import torch

        from genlab.data.clips import cut
        from genlab.data.video import read_film

        film = read_film(path.read_bytes(), name, t.image_size, t.fps)
        for note in film.notes:
            print(f"note: {name}: {note}")
        return torch.from_numpy(cut(film.frames_T, film.loops, t.frames, 0, 1).transpose(0, 3, 1, 2).copy())[None]
    source, split = named_split(name)
    return open_clips(source, split or "heldout", t.image_size, t.frames, t.fps)  # type: ignore[arg-type]


def reconstruct_clips(c: Any, tokenizer: Any) -> tuple[dict[str, Any], list[Any]]:
    """Figures, and an animated sheet of originals above reconstructions."""
    import torch
    from tqdm import tqdm

    from genlab.pictures import sheet, to_float, to_uint8

    if c.tokens or c.metrics:
        raise ValueError("--tokens and --metrics are for images; of clips, --no-fd is all there is to choose")
    name, spec = c.images or "emoji-anim:heldout", tokenizer.spec
    clips = open_named(name, tokenizer)
    n = min(c.n or len(clips), len(clips))
    x = clips[:n] if isinstance(clips, torch.Tensor) else clips.batch(range(n))
    parts = []
    with torch.inference_mode():
        for part in tqdm(x.split(c.batch_size), desc="reconstructing", unit="batch", disable=None, leave=False):
            tokens = tokenizer.encode(to_float(part).to(tokenizer.device))
            parts.append(to_uint8(tokenizer.decode(tokens)).cpu())
    y = torch.cat(parts)
    extractor = shared.load("eval.features").EfficientNetLite0() if c.fd and n > 1 else None
    figures = {
        "model": c.model,
        "source": name,
        "tokens": spec.describe(),
        "pixel_values_per_token_number": x[0].numel() / (spec.length * spec.dim),
        "frames_a_second": float(tokenizer.config.fps),
        **shared.load("eval.clips").reconstruction(x, y, extractor),
    }
    picks = torch.linspace(0, n - 1, min(8 * c.rows, n)).long()
    columns = min(8, len(picks))
    shown = [part for p in picks.split(columns) if len(p) == columns for part in (x[p], y[p])]
    labels = ["original", "decoded"] * (len(shown) // 2)
    return figures, sheet(torch.cat(shown), columns=columns, row_labels=labels, zoom=2)
