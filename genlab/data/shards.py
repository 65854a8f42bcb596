"""Webdataset shards: tars of `KEY.webp`, `KEY.json`, `KEY.cls`, `KEY.txt`, read by offset, not unpacked."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from genlab.data.decode import is_image
from genlab.data.folder import read_index, stated_classes, walk
from genlab.data.records import Blob, InFile, InMemory, Listing, Record, meant_by, split_name

TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$")
"""File names taken for shards."""

MEMORY = 2 << 30
"""Compressed shards, which can't be read by offset, are held in memory: at most this many bytes a source."""


def find_shards(source: Path, accepts: Callable[[str], bool] = is_image) -> list[Path]:
    """List the shards that a path means: a tar, a brace pattern, or a folder with tars (in it or its splits).

    Returns:
        The shards in order, empty where the path is a folder without any.

    Raises:
        FileNotFoundError: a shard of the pattern is missing.
        ValueError: a folder holds both shards and images.
    """
    if source.is_dir():
        folders = [source, *sorted(p for p in source.iterdir() if p.is_dir() and split_name(p.name))]
        inside = [path for folder in folders for path in sorted(folder.iterdir())]
        shards = [path for path in inside if TAR.search(path.name) and path.is_file()]
        image = next((p for p in walk(source) if accepts(p.suffix.lower()[1:])), None) if shards else None
        if image:
            raise ValueError(
                f"{source}: holds images ({image}) as well as shards ({shards[0].name}); name the shards by "
                f"a pattern, or move them out of the folder"
            )
        return shards
    from braceexpand import braceexpand

    shards = [Path(name) for name in braceexpand(str(source))]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards of {source} are missing, first {missing[0]}")
    return shards


def list_shards(shards: Sequence[Path], split: str, accepts: Callable[[str], bool] = is_image) -> Listing:
    """List the images in shards, in the order of the shards and of their members.

    A shard belongs to the split its name (`train-000000.tar`) or its folder begins with. Where class names
    are stated beside the shards (`classes.txt`, `index.json`), shards of other splits are not opened.
    Checksums that an `index.json` holds are compared.

    Raises:
        ValueError: a damaged shard, a wrong checksum, a member that is a link or that points outside, no
            shards of the split, or some shards that belong to a split and some that don't.
    """
    root = shards[0].parent if not split_name(shards[0].parent.name) else shards[0].parent.parent
    splits = [split_name(re.split(r"[-_.\d]", s.name)[0]) or split_name(s.parent.name) for s in shards]
    if None in splits and len(set(splits)) > 1:
        odd = shards[splits.index(None)]
        raise ValueError(f"{odd}: the other shards' names begin with a split (train-, heldout-, val-), this one's not")
    if None not in splits and split != "all" and not set(splits) & set(meant_by(split)):
        there = ", ".join(sorted({str(own) for own in splits}))
        raise ValueError(f"{root}: no shards of split {split!r} (there are {there})")
    classes = stated_classes(root)
    checksums = _checksums(root)
    records: list[Record] = []
    other: Counter[str] = Counter()
    held = 0
    for shard, own in zip(shards, splits, strict=True):
        if classes and own and split != "all" and own not in meant_by(split):
            continue
        expected = checksums.get(shard.name)
        if expected and hashlib.sha256(shard.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{shard}: its sha256 is not the one in {root / 'index.json'}; fetch or build it again")
        for record in _read_shard(shard, own, other, accepts):
            held += len(record.blob.data) if isinstance(record.blob, InMemory) else 0
            if held > MEMORY:
                raise _too_large(shard)
            records.append(record)
    if len({(record.split, record.key) for record in records}) < len(records):  # shards that count from zero
        for record in records:
            shard = Path(record.where.partition("::")[0])
            record.key = f"{shard.parent.name}/{shard.name}/{record.key}"
    notes = [f"members that are not images, passed over: {dict(sorted(other.items()))}"] if other else []
    licences = root / "LICENSES"
    return Listing(records=records, classes=classes, notes=notes, licences=licences if licences.is_dir() else None)


def _too_large(shard: Path) -> ValueError:
    return ValueError(f"{shard}: compressed shards beyond {MEMORY / 2**30:.3g} GiB; unpack them to plain .tar")


def _checksums(root: Path) -> dict[str, str]:
    """The sha256 of each shard that `index.json` lists."""
    splits = read_index(root).get("splits")
    parts = [part for part in splits.values() if isinstance(part, dict)] if isinstance(splits, dict) else []
    return {s["file"]: s["sha256"] for part in parts for s in part.get("shards", ()) if "sha256" in s}


def _read_shard(
    shard: Path, split: str | None, other: Counter[str], accepts: Callable[[str], bool]
) -> Iterator[Record]:
    """Yield the samples of one shard: members with the same path up to the first dot of the name."""
    samples: dict[str, dict[str, Blob]] = {}
    plain, held = shard.suffix == ".tar", 0
    try:
        with tarfile.open(shard, mode="r:" if plain else "r:*") as tar:
            for member in tar:
                _refuse_outsiders(shard, member)
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.partition(".")
                if not stem:
                    other[path.name] += 1
                    continue
                parts = samples.setdefault(str(path.with_name(stem)), {})
                if suffix.lower() in parts:
                    raise ValueError(f"{shard}: holds {member.name} twice")
                if plain:
                    parts[suffix.lower()] = InFile(shard, member.offset_data, member.size)
                else:
                    file = tar.extractfile(member)
                    assert file is not None
                    held += member.size
                    if held > MEMORY:  # before it is unpacked: zeros pack a thousand times smaller
                        raise _too_large(shard)
                    parts[suffix.lower()] = InMemory(file.read())
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # cut between two members, where tarfile sees no harm
                raise tarfile.ReadError("the mark at its end is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: damaged or truncated tar ({error}); fetch or build it again") from error
    for key, parts in samples.items():
        images = [suffix for suffix in parts if accepts(suffix)]
        if not images:
            other.update(list(parts))
            continue
        if len(images) > 1:
            raise ValueError(f"{shard}: sample {key} has several images ({', '.join(images)}); expected one")
        where = f"{shard}::{key}.{images[0]}"
        try:
            cls, caption, meta = _describe(parts)
        except ValueError as error:
            raise ValueError(f"{where}: its .json or .cls can't be read: {error}") from error
        yield Record(key=key, where=where, blob=parts[images[0]], cls=cls, caption=caption, meta=meta, split=split)


def _refuse_outsiders(shard: Path, member: tarfile.TarInfo) -> None:
    """Refuse a shard with links, devices or paths that lead out of it: nobody packs those in good faith."""
    name = member.name
    outside = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name)
    if outside or not (member.isfile() or member.isdir()):
        kind = "a path that leads outside" if outside else "a link or a special file"
        raise ValueError(f"{shard}: member {name!r} is {kind}; refused, pack the shard again with plain files")


def _describe(parts: dict[str, Blob]) -> tuple[str | int | None, str, dict[str, Any]]:
    """Class, caption and the rest, out of a sample's .json, .cls, .txt or .caption."""
    meta = json.loads(parts["json"].read()) if "json" in parts else {}
    if not isinstance(meta, dict):
        raise ValueError(f"expected an object, got {type(meta).__name__}")
    cls = next((meta[name] for name in ("class", "label", "cls") if meta.get(name) is not None), None)
    if "cls" in parts:
        cls = parts["cls"].read().decode().strip()
    if cls is not None:
        cls = int(cls) if re.fullmatch(r"-?\d+", str(cls)) else str(cls)
        cls = None if isinstance(cls, int) and cls < 0 else cls
    caption = meta.get("caption", meta.get("text"))
    text = next((parts[name] for name in ("txt", "caption") if name in parts), None)
    if caption is None and text is not None:
        caption = text.read().decode("utf-8", errors="replace").strip()
    return cls, str(caption or ""), meta
