"""`write_folder`: an image set as plain PNG files that any tool can read."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from genlab.data.images import ImageSet

MARK = "written by genlab.data.write_folder"


def write_folder(images: ImageSet | Sequence[ImageSet], out: str | Path, *, overwrite: bool = False) -> Path:
    """Write image sets as `OUT/SPLIT/CLASS/KEY.png` with captions in `OUT/SPLIT/metadata.jsonl`; films as they are.

    The layout is that of Hugging Face's `imagefolder` and of `open_images(OUT)`, which gives back the same
    pixels, classes, captions and keys. Unlabelled images go to `OUT/SPLIT`. Licence texts of the
    source are copied. Everything is written to a temporary folder beside OUT, which is then renamed: OUT is
    whole or absent.

    Args:
        images: one set, or one a split: `[open_images(s, split="train"), open_images(s, split="heldout")]`.
        out: the folder to make; it may exist if it is empty.
        overwrite: replace OUT even if it is not empty, provided that `write_folder` wrote it.

    Returns:
        OUT.

    Raises:
        FileExistsError: OUT is not empty and `overwrite` is off, or it is not ours to replace.
        ValueError: two of the sets are of the same split, or their classes differ.
        ImageError: an image can't be read; nothing is left behind.
    """
    sets = [images] if isinstance(images, ImageSet) else list(images)
    names = [one.split for one in sets]
    if not sets or len(set(names)) < len(names) or len({one.classes for one in sets}) > 1:
        raise ValueError(f"expected sets of different splits with the same classes, got splits {names}")
    out = Path(out).expanduser().absolute()
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{out} is not empty; name another folder, or say overwrite (--overwrite)")
        if not _is_ours(out):
            raise FileExistsError(f"{out} was not written by this command; remove it yourself if it may go")
    elif out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; expected the name of a folder to make")

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh = temporary / "new"
        fresh.mkdir()
        for one in sets:
            _write_split(one, fresh / _file_name(one.split))
            for licence in sorted(one.licences.iterdir()) if one.licences else ():
                shutil.copyfile(licence, fresh / licence.name)
        index = {
            "made_by": MARK,
            "source": sets[0].source,
            "size": sets[0].size,
            "classes": list(sets[0].classes),
            "splits": {one.split: {"images": len(one), "fingerprint": one.fingerprint} for one in sets},
        }
        (fresh / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(temporary / "old")
        fresh.rename(out)
    finally:
        if not out.exists() and (temporary / "old").exists():
            (temporary / "old").rename(out)
        shutil.rmtree(temporary)
    return out


def _write_split(images: ImageSet, folder: Path) -> None:
    from tqdm import tqdm

    folder.mkdir()
    taken: set[str] = set()
    labels = images.labels.tolist()
    suffixes = images.suffixes()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        starts = range(0, len(images), 256)
        for start in tqdm(starts, desc=f"writing {images.split}", unit="batch", leave=False):
            rows = range(start, min(start + 256, len(images)))
            for row, data in zip(rows, images.files(rows), strict=True):
                cls = images.classes[labels[row]] if labels[row] >= 0 else None
                parent = "" if cls is None else _file_name(cls) + "/"
                name = parent + _file_name(images.keys[row].removeprefix(f"{cls}/"))  # a folder's keys start so
                while name.lower() in taken:  # keys that differ only in what file systems don't tell apart
                    name += "_"
                taken.add(name.lower())
                path = folder / f"{name}.{suffixes[row]}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                line = {
                    **images.meta[row],
                    "file_name": path.relative_to(folder).as_posix(),
                    "key": images.keys[row],
                    "class": cls,
                    "caption": images.captions[row],
                }
                metadata.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _file_name(name: str) -> str:
    """A name that every file system takes."""
    safe = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name)[:120].strip(". ")
    return safe or "_"


def _is_ours(out: Path) -> bool:
    try:
        index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("made_by") == MARK
