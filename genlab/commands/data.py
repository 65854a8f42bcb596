"""`genlab data emoji --out DIR`."""

from __future__ import annotations

import json
from functools import partial
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
    """Which split; `both` writes what there is."""
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
    from genlab.data.records import NoImages

    splits: tuple[Literal["train", "heldout"], ...] = ("train", "heldout") if c.split == "both" else (c.split,)
    open_set: Any = partial(open_images, size=c.size or 64)
    if c.clips or c.source == "emoji-anim":
        from genlab.data.clips import open_clips

        if c.size is not None:
            raise ValueError("--size has no effect on films and animations, which are copied as they are")
        open_set = open_clips
    sets: list[Any] = []
    for split in splits:
        try:
            sets.append(open_set(c.source, split=split, on_error=c.on_error))
        except NoImages:
            if split == splits[-1] and not sets:
                raise
    write_folder(sets, c.out, overwrite=c.overwrite)
    counts = {x.split: len(x) for x in sets}
    skipped = [[k, why] for x in sets for k, why in x.skipped]
    if c.json:
        print(json.dumps({"out": str(c.out), "images": counts, "skipped": skipped}))
    else:
        print(f"wrote {c.out}: " + ", ".join(f"{n:,} {s}" for s, n in counts.items()))
        for x in sets:
            if x.skipped:
                print(x.report())
    return 0
