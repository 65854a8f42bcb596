"""`genlab caption IMAGE…`: what a multimodal language model says of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config

from . import shared


@config
class CaptionConfig:
    """Say in words what images, films or animations show: one line a file, `FILE<tab>caption`."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    model: str = "seed_llama-emoji64"
    """A model that reads images, a MODEL of kind seed_llama; or films, of kind divot_lm."""
    tokenizer: str = ""
    """Another tokenizer of the same tokens."""
    tokens: int | None = None
    """Show the model only the first so many codes of each image; all where not given."""
    neighbours: int | None = None
    """Consider as many captions of remembered images that look like it, and give the one that has most in common with
    the others; None: as many as the model's config says, 0: all words are the model's own."""
    ask: str = ""
    """Ask this instead, in the form of a chat: --ask "What colour is it?"."""
    beams: int | None = None
    """Beams of the search; None: 3 for the likeliest words, 1 where they are drawn."""
    temperature: float = 0.0
    """0 takes the likeliest words; above, they are drawn."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest words that hold this much probability."""
    seed: int = 0
    """With a temperature: decides what is drawn."""
    max_new: int = 64
    """Word pieces a caption at most."""
    batch_size: int = 32
    """Images a batch."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Read and say."""
    c = shared.parse(CaptionConfig, argv, prog="genlab caption")
    shared.require_positive(c, "batch_size", "beams", "max_new")
    require_words(c)
    import torch

    from genlab.pictures import to_float

    from .models import load_line

    files = find_images(c.images)
    line = load_line(c.model, tokenizer=c.tokenizer, device=shared.torch_device(c.device))
    model: Any = line.generator
    if not hasattr(model, "describe"):
        raise ValueError(f"{c.model} holds a {model.kind}, which says nothing: give --model a seed_llama's")
    length = model.spec.length
    if c.tokens is not None and not 1 <= c.tokens <= length:
        raise ValueError(f"--tokens {c.tokens}: {c.model} reads 1 to {length} tokens an image")
    beams = (1 if c.temperature else 3) if c.beams is None else c.beams
    options = {"beams": beams, "temperature": c.temperature, "top_p": c.top_p, "max_new": c.max_new}
    torch.manual_seed(c.seed)
    if c.neighbours is not None and c.neighbours < 0:
        raise ValueError(f"--neighbours must not be negative, got {c.neighbours}")
    remembers = getattr(model, "memory", None) is not None and not c.ask and not c.temperature
    if c.neighbours and not remembers:
        raise ValueError(
            "--neighbours goes with neither --ask nor --temperature" if c.ask or c.temperature else
            f"{c.model} remembers no images: leave --neighbours out, or train one with --model.neighbours 24"
        )  # fmt: skip
    captions: list[str] = []
    for i in range(0, len(files), c.batch_size):
        pixels = torch.stack([read(path, line.tokenizer) for path in files[i : i + c.batch_size]])
        x = to_float(pixels).to(line.tokenizer.device)
        if remembers:
            captions += model.caption(x, line.tokenizer, c.tokens, neighbours=c.neighbours, **options)
            continue
        with torch.inference_mode():
            tokens = line.tokenizer.encode(x)
        captions += model.describe(tokens, c.tokens, ask=c.ask, **options)
    if c.json:
        print(json.dumps([{"image": str(f), "caption": w} for f, w in zip(files, captions, strict=True)], indent=2))
    else:
        print("\n".join(f"{f}\t{w}" for f, w in zip(files, captions, strict=True)))
    return 0


def require_words(c: Any) -> None:
    """Refuse a temperature or top-p that words can't be drawn with.

    Raises:
        ValueError: naming the option.
    """
    if not c.temperature >= 0:
        raise ValueError(f"--temperature must not be negative, got {c.temperature}")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {c.top_p}")


def find_images(names: tuple[Path, ...]) -> list[Path]:
    """The files themselves, and those in folders, in order of their names.

    Raises:
        FileNotFoundError: for a name that isn't there, or a folder without images.
        ValueError: if no name is given.
    """
    from genlab.data.decode import is_image
    from genlab.data.video import is_clip

    if not names:
        raise ValueError("name an image file: genlab caption IMAGE.png")
    files = []
    for name in names:
        inside = [name]
        if name.is_dir():
            inside = sorted(
                p for p in name.iterdir() if is_image(p.suffix[1:].lower()) or is_clip(p.suffix[1:].lower())
            )
            if not inside:
                raise FileNotFoundError(f"{name} is a folder without images")
        elif not name.is_file():
            raise FileNotFoundError(f"no image file at {name}")
        files += inside
    return files


def read(path: Path, tokenizer: Any) -> Any:
    """uint8 pixels of a file, (3, size, size), or of its first frames, (T, 3, size, size).

    Raises:
        ImageError: if it can't be read.
    """
    import torch

    from genlab.data.decode import decode

    size = tokenizer.spec.image_size
    if len(size) == 3:
        from .clips import open_named

        return open_named(str(path), tokenizer)[0]
    return torch.from_numpy(decode(path.read_bytes(), str(path), size[-1]).copy()).permute(2, 0, 1)
