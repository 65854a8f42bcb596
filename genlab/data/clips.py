"""`open_clips`: films and animations as clips (T, 3, H, W), with classes and captions."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genlab.data.decode import decode
from genlab.data.images import CACHE_BYTES, ImageSet, list_source, read
from genlab.data.records import Record, choose
from genlab.data.video import is_clip, read_film

MOVED = "moved:"
"""In front of a source of images: stills, set in motion."""


@dataclass(kw_only=True, slots=True)
class Take(Record):
    """A clip's place in its film."""

    number: int = 0
    of: int = 1
    moved: bool = False
    """A still, to be set in motion."""


class ClipSet(ImageSet):
    """A split of a source of films, by index: `batch` gives clips, uint8 (B, T, 3, size, size).

    Attributes:
        frames: T.
        fps: frames a second.
        notes: what was left out of the films decoded so far, and of how many.
    """

    what = "clips"

    def __init__(self, records: Sequence[Record], classes: tuple[str, ...], *, frames: int, fps: float, **options: Any):
        """As `ImageSet`; `frames` at `fps` a second."""
        self.frames, self.fps, self.notes = frames, fps, Counter[str]()
        super().__init__(records, classes, **options)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, 3, size, size)."""
        return (self.frames, 3, self.size, self.size)

    @property
    def preprocessing(self) -> str:
        """How pixels come about, in one line."""
        return f"clips-1: {self.frames} frames at {self.fps} a second"

    def _decode(self, record: Record) -> np.ndarray:
        assert isinstance(record, Take)
        if record.moved:
            frames = set_in_motion(decode(read(record), record.where, self.size), record.key, self.frames)
        else:
            film = read_film(read(record), record.where, self.size, self.fps)
            self.notes.update(film.notes)
            frames = cut(film.frames_T, film.loops, self.frames, record.number, record.of)
        return frames.transpose(0, 3, 1, 2)

    def suffixes(self) -> list[str]:
        """Endings of the films' own files.

        Raises:
            ValueError: for stills set in motion, or several clips a film: they have no files.
        """
        if any(record.moved or record.of > 1 for record in self._takes):
            raise ValueError(f"{self.source}: stills set in motion, or several clips a film, have no files to write")
        return [record.where.rpartition(".")[2].lower() for record in self._takes]

    def files(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The films' own files.

        Raises:
            ImageError: one of them can't be decoded.
        """
        for row in rows:
            self.batch([row])
            yield read(self._takes[row])

    @property
    def _takes(self) -> list[Take]:
        return [record for record in self._records if isinstance(record, Take)]

    def report(self) -> str:
        """Say in a few lines what the set holds, what was skipped, what was left out."""
        left_out = [f"  note: {note} ({n} decoded clips)" for note, n in sorted(self.notes.items())]
        return "\n".join([super().report(), *left_out])


def cut(film: np.ndarray, loops: bool, frames: int, number: int, of: int) -> np.ndarray:
    """Take `number` of `of` out of a film (N, ...): (frames, ...).

    Takes begin at even distances. An animation goes round; a film that is too short holds its last frame.
    """
    n = len(film)
    if loops:
        return film[(n * number // of + np.arange(frames)) % n]
    room = max(0, n - frames)
    start = room * number // max(1, of - 1)
    return film[np.minimum(start + np.arange(frames), n - 1)]


def set_in_motion(image: np.ndarray, key: str, frames: int) -> np.ndarray:
    """A still (S, S, 3), shifted, turned and zoomed along a smooth path that its key decides: (frames, S, S, 3).

    Ours: films are few, and a tokenizer must see many things move.
    """
    from PIL import Image

    size = image.shape[0]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    t = np.arange(frames) / frames

    def path(middle: float, swing: float) -> np.ndarray:
        speed, phase, size = rng.uniform(0.3, 2.0), rng.uniform(), rng.uniform() * swing
        return middle + size * np.sin(2 * math.pi * (speed * t + phase))

    zoom, angle = path(0.85, 0.25), path(0.0, 0.7)
    shift_x, shift_y = path(0.0, 0.25 * size), path(0.0, 0.25 * size)
    picture, out = Image.fromarray(image), []
    half = (size - 1) / 2
    for z, a, dx, dy in zip(zoom, angle, shift_x, shift_y, strict=True):
        c, s = math.cos(a) / z, math.sin(a) / z
        inverse = (c, s, half - c * (half + dx) - s * (half + dy), -s, c, half + s * (half + dx) - c * (half + dy))
        moved = picture.transform(
            (size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor="white"
        )
        out.append(np.asarray(moved))
    return np.stack(out)


def open_clips(
    source: str | Path,
    split: Literal["train", "heldout", "all"] = "train",
    size: int = 64,
    frames: int = 8,
    fps: float = 4.0,
    on_error: Literal["raise", "skip"] = "raise",
    *,
    takes: int = 1,
    cache_bytes: int = CACHE_BYTES,
) -> ClipSet:
    """Open a set of clips with classes and captions.

    Args:
        source: `emoji-anim`, the embedded set; a folder or shards of films and animations (`.mp4`, `.webm`, `.gif`,
            `.webp`, …), laid out as `open_images` reads images; `moved:SOURCE`, the images of a source set in motion;
            any of these with `#N` behind it, N of them, evenly chosen; or several, joined by `+`.
        split, size, on_error: as for `open_images`.
        frames: a clip.
        fps: frames a second; films of other rates are resampled.
        takes: clips a film, at even distances; a still is set in motion once.
        cache_bytes: keep the decoded set in memory if it takes no more than this.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no clips, no such split, or as `open_images`.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    if min(size, frames, takes) < 1 or fps <= 0:
        raise ValueError(f"size {size}, frames {frames}, takes {takes} and fps {fps} must be positive")
    records: list[Record] = []
    names: list[tuple[str, ...]] = []
    notes: list[str] = []
    licences = None
    for part in str(source).split("+"):
        moved = part.startswith(MOVED)
        bare, _, limit = part.removeprefix(MOVED).partition("#")
        if limit and not (limit.isdigit() and int(limit)):
            raise ValueError(f"{part}: what stands behind # is how many of them, at least 1")
        listing = list_source(bare, split) if moved else list_source(bare, split, is_clip)
        chosen, classes = choose(listing, split, bare)
        if limit and int(limit) < len(chosen):
            chosen = [chosen[i * len(chosen) // int(limit)] for i in range(int(limit))]
        times = 1 if moved else takes
        for record in chosen:
            own = {f.name: getattr(record, f.name) for f in fields(Record)}
            for k in range(times):
                key = f"{MOVED * moved}{record.key}" + (f"@{k}" if times > 1 else "")
                records.append(Take(**(own | {"key": key}), number=k, of=times, moved=moved))
        names.append(classes)
        notes += listing.notes
        licences = licences or listing.licences
    same = all(own == names[0] for own in names)
    return ClipSet(
        records,
        names[0] if same else tuple(sorted({name for own in names for name in own})),
        frames=frames,
        fps=fps,
        source=str(source),
        split=split,
        size=size,
        skip=on_error == "skip",
        cache_bytes=cache_bytes,
        notes=notes,
        licences=licences,
    )
