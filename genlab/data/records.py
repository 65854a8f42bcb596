"""What the readers of folders, shards and Hugging Face data sets hand over: a list of records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

SPLITS = {"train": ("train",), "heldout": ("heldout", "val", "validation", "test")}
"""The names our splits go by in folders, shards and data sets; of several, the first is meant."""

HELDOUT_SHARE = 0.1
"""Where a source has no splits of its own, the share of its keys that a hash puts into `heldout`."""


class Blob(Protocol):
    """Where an image file's bytes come from. Picklable, and safe to read from several threads."""

    def read(self) -> bytes:
        """Return the bytes; OSError where they can't be had."""
        ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes at hand (from a compressed shard)."""

    data: bytes

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class InFile:
    """A file, or the part of one (a member of an uncompressed shard)."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Return the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(kw_only=True, slots=True)
class Record:
    """One image that a source lists, not yet opened."""

    key: str
    where: str
    """Path, or shard and member: names the image in messages."""
    blob: Blob
    cls: str | int | None = None
    """Class name, class number, or None for an unlabelled image."""
    caption: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    """What the source calls the split (`val`, say), or None where it has none."""


class NoImages(ValueError):
    """A source without images in the split that is asked for."""


@dataclass(kw_only=True)
class Listing:
    """What a source holds: its records in a fixed order, and what there is to say about them."""

    records: list[Record]
    classes: tuple[str, ...] | None = None
    """The class names where the source states them; otherwise they are gathered from the records."""
    notes: list[str] = field(default_factory=list)
    """What was passed over, for the report."""
    licences: Path | None = None
    """A folder of licence texts that goes where the images go."""


def split_name(name: str) -> str | None:
    """Return a folder's or shard's name if it is that of a split (`Val`: `val`), else None."""
    return name.lower() if any(name.lower() in names for names in SPLITS.values()) else None


def meant_by(split: str) -> tuple[str, ...]:
    """The names of splits that `split` may mean, best first."""
    return SPLITS.get(split, (split,))


def choose(listing: Listing, split: str, source: str) -> tuple[list[Record], tuple[str, ...]]:
    """Pick the records of a split, and the class names over all splits.

    Args:
        listing: what the source holds.
        split: `train`, `heldout`, `all`, or what the source itself calls a split.
        source: the source's name, for messages.

    Raises:
        NoImages: no such split, or none in it.
        ValueError: no images at all, twin keys, or an impossible class.
    """
    records = listing.records
    if not records:
        raise ValueError("; ".join([f"{source}: no images found", *listing.notes]))
    classes = listing.classes or _class_names(records, source)
    counts = Counter(record.split for record in records)
    if split == "all":
        if len({record.key for record in records}) < len(records):  # the splits share names
            records = [replace(r, key=f"{r.split}/{r.key}") if r.split else r for r in records]
    elif set(counts) == {None} and split in SPLITS:
        records = [r for r in records if (_hash_share(r.key) < HELDOUT_SHARE) == (split == "heldout")]
        listing.notes.append(f"no splits in the source: a hash of the key holds out {HELDOUT_SHARE:.0%}")
    else:
        names = [name for name in meant_by(split) if name in counts]
        records = [r for r in records if names and r.split == names[0]]
        for other in names[1:]:
            listing.notes.append(f"{split} is {names[0]!r} here; {other!r} ({counts[other]} images) is left out")
        if counts[None]:
            listing.notes.append(f"{counts[None]} images belong to no split: only split='all' has them")
    if not records:
        there = ", ".join(f"{n} {name or 'without a split'}" for name, n in counts.items())
        raise NoImages(
            f"{source}: no images in split {split!r} (there are {there}); take another, or all of them: "
            "split='all' (`genlab train`: --data.split all)"
        )
    _refuse_twins(records, source)
    return records, classes


def labels_of(records: Sequence[Record], classes: tuple[str, ...], source: str) -> list[int]:
    """Number the records' classes: the index into `classes`, -1 where unlabelled."""
    number = {name: i for i, name in enumerate(classes)}
    labels = []
    for record in records:
        if record.cls is None:
            labels.append(-1)
        elif isinstance(record.cls, int) and 0 <= record.cls < len(classes):
            labels.append(record.cls)
        elif record.cls in number:
            labels.append(number[record.cls])
        else:
            raise ValueError(
                f"{source}: {record.where} has class {record.cls!r}, not one of its {len(classes)} classes"
            )
    return labels


def _class_names(records: Iterable[Record], source: str) -> tuple[str, ...]:
    found = {record.cls for record in records if record.cls is not None}
    numbers = [c for c in found if isinstance(c, int)]
    if len(numbers) < len(found) and numbers:
        raise ValueError(f"{source}: some images have a class name, others a number; list the names in classes.txt")
    if not numbers:
        return tuple(sorted(map(str, found)))
    if max(numbers) > 1_000_000:
        raise ValueError(f"{source}: class number {max(numbers)} is too large; expected 0 to (classes - 1)")
    return tuple(str(i) for i in range(max(numbers) + 1))


def _refuse_twins(records: Iterable[Record], source: str) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.key in seen:
            raise ValueError(f"{source}: two images have the key {record.key!r}: {seen[record.key]} and {record.where}")
        seen[record.key] = record.where


def _hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
