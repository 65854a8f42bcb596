"""`genlab data emoji --out DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from genlab.config import config

from . import shared


@config
class DataConfig:
    """Write a set of images as a plain folder: OUT/{train,heldout}/CLASS/KEY.png and metadata.jsonl.

    Films and animations (`emoji-anim`, or --clips) are copied as they are.
    """

    source: Annotated[str, tyro.conf.Positional] = "emoji"
    """`emoji`, `emoji-anim` (the embedded sets), a folder, shards, or `hf:name`."""
    out: Path = Path("data")
    """The folder to write; it must be empty or absent."""
    split: Literal["both", "train", "heldout"] = "both"
    """Which split."""
    size: int | None = None
    """Side of the images, in pixels; None: 64."""
    clips: bool = False
    """The source holds films and animations."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that can't be read: stop, or skip it and say so."""
    overwrite: bool = False
    """Replace a folder that this command wrote before."""
    json: bool = False
    """Print the counts as JSON."""


def main(argv: list[str]) -> int:
    """Write the folder."""
    c = shared.parse(DataConfig, argv, prog="genlab data")
    from genlab.data import open_images, write_folder

    splits: tuple[Literal["train", "heldout"], ...] = ("train", "heldout") if c.split == "both" else (c.split,)
    sets: list[Any]
    if c.clips or c.source == "emoji-anim":
        from genlab.data.clips import open_clips

        if c.size is not None:
            raise ValueError("--size has no effect on films and animations, which are copied as they are")
        sets = [open_clips(c.source, split=s, on_error=c.on_error) for s in splits]
    else:
        sets = [open_images(c.source, split=s, size=c.size or 64, on_error=c.on_error) for s in splits]
    write_folder(sets, c.out, overwrite=c.overwrite)
    counts = {s: len(x) for s, x in zip(splits, sets, strict=True)}
    skipped = [[k, why] for x in sets for k, why in x.skipped]
    if c.json:
        print(json.dumps({"out": str(c.out), "images": counts, "skipped": skipped}))
    else:
        print(f"wrote {c.out}: " + ", ".join(f"{n:,} {s}" for s, n in counts.items()))
        for x in sets:
            if x.skipped:
                print(x.report())
    return 0
