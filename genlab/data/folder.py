"""Image folders: `ROOT/[train|heldout|val]/[CLASS/]name.png`, captions in a file or beside the image."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genlab.data.decode import is_image
from genlab.data.records import InFile, Listing, Record, split_name

METADATA = ("metadata.jsonl", "captions.jsonl")
"""One JSON object a line: `file_name` (relative to the file), `caption` or `text`, perhaps `key`, `class`."""


def list_folder(root: Path, accepts: Callable[[str], bool] = is_image) -> Listing:
    """List the images under a folder, in the order of their paths; `accepts` tells them by their endings.

    Sub-folders named `train`, `heldout`, `val`, `validation` or `test` are splits, unless others with images
    lie beside them (a class may well be called `train`). The next folder is the class. A key is the path
    below the split without its ending (with it, where two files differ in the ending only), or what metadata
    says.

    Raises:
        ValueError: a line of a metadata file can't be read.
    """
    notes: list[str] = []
    files = sorted(walk(root))
    images = [p for p in files if accepts(_suffix(p)) and not p.name.startswith(".")]
    tops = {p.parts[0] for p in images if len(p.parts) > 1}
    splits = bool(tops) and all(split_name(top) for top in tops)
    if not splits and any(split_name(top) for top in tops):
        notes.append(f"folders are taken for classes, not splits: {', '.join(sorted(tops)[:8])}")

    metadata, sidecars = _metadata(root, files)
    lone = Counter(str(p.with_suffix("")) for p in images)
    texts = {p for p in files if p.suffix == ".txt"}
    records = []
    for path in images:
        row = metadata.pop(path, {})
        below = Path(*path.parts[1:]) if splits and len(path.parts) > 1 else path
        caption = row.pop("caption", row.pop("text", None))
        if caption is None and path.with_suffix(".txt") in texts:
            caption = (root / path.with_suffix(".txt")).read_text(encoding="utf-8", errors="replace").strip()
        key = below if lone[str(path.with_suffix(""))] > 1 else below.with_suffix("")
        records.append(
            Record(
                key=str(row.pop("key", key.as_posix())),
                where=str(root / path),
                blob=InFile(root / path),
                cls=row.pop("class", below.parts[0] if len(below.parts) > 1 else None),
                caption=str(caption or ""),
                meta=row,
                split=split_name(path.parts[0]) if splits and len(path.parts) > 1 else None,
            )
        )
    if metadata:
        notes.append(f"{len(metadata)} metadata lines name no image, first {next(iter(metadata))}")
    known = {*sidecars, *images, *(p.with_suffix(".txt") for p in images), Path("index.json")}
    passed = [p for p in files if p not in known]
    other = Counter("hidden" if p.name[0] == "." else _suffix(p) or "no ending" for p in passed)
    if other:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(other.items()))
        notes.append(f"files that are not images by their ending, passed over: {kinds}")
    return Listing(records=records, classes=stated_classes(root), notes=notes)


def stated_classes(root: Path) -> tuple[str, ...] | None:
    """Read the class names a folder states: `classes.txt` (one a line) or "classes" in `index.json`."""
    if (root / "classes.txt").is_file():
        lines = (root / "classes.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    classes = read_index(root).get("classes")
    return tuple(map(str, classes)) if isinstance(classes, list) and classes else None


def read_index(root: Path) -> dict[str, Any]:
    """Read the `index.json` of a folder; empty where there is none, or where it is something else's."""
    path = root / "index.json"
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); write it again or remove it") from error
    return index if isinstance(index, dict) else {}


def _suffix(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def walk(root: Path) -> Iterator[Path]:
    """Yield every file below a folder, relative to it; links are followed, circles are not."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name).relative_to(root) for name in files)


def _metadata(root: Path, files: list[Path]) -> tuple[dict[Path, dict[str, Any]], set[Path]]:
    """Read every metadata file below the root: rows by image path, and the files read."""
    rows: dict[Path, dict[str, Any]] = {}
    sidecars = {p for p in files if p.name in METADATA} | {p for p in files if p.name == "classes.txt"}
    for path in sorted(p for p in sidecars if p.suffix == ".jsonl"):
        for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row.pop("file_name")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{root / path}, line {number}: expected a JSON object with file_name, got {line[:80]!r}"
                ) from error
            rows.setdefault(path.parent / str(name), {}).update(row)
    return rows, sidecars
