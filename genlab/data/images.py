"""`open_images`: one set of images with classes and captions, whatever holds them."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from genlab.data.decode import PREPROCESSING, ImageError, decode, is_image
from genlab.data.records import Listing, Record, choose, labels_of

if TYPE_CHECKING:
    import torch

EMBEDDED = {"emoji": Path(__file__).parent / "emoji", "emoji-anim": Path(__file__).parent / "emoji_anim"}
"""Sets that come with the package; of an animation, `open_images` takes the first frame."""
CACHE_BYTES = 1 << 30
"""Decoded sets up to this size stay in memory (87,381 images at 64x64); larger ones are decoded each time."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with its words."""

    image: torch.Tensor
    """uint8, (3, H, W), 0 to 255."""
    label: int
    """Index into the set's `classes`; -1 where unlabelled."""
    caption: str
    key: str


class ImageSet:
    """A split of a source, by index: lengths, labels and captions at once, pixels on demand.

    Attributes:
        classes: class names; labels are indices into it. The same for every split of a source.
        keys: one unique name an image.
        captions: one an image, '' where there is none.
        meta: what else the source says of each image (of the emoji: code, vendor, name, tags, group).
        skipped: `(key, reason)` of every image left out by `on_error="skip"`.
        source, split, size: as given to `open_images`.
        licences: a folder of licence texts that goes where the images go, or None.
    """

    what = "images"

    def __init__(
        self,
        records: Sequence[Record],
        classes: tuple[str, ...],
        *,
        source: str,
        split: str,
        size: int,
        skip: bool,
        cache_bytes: int = CACHE_BYTES,
        notes: Sequence[str] = (),
        licences: Path | None = None,
    ):
        self.source, self.split, self.size, self.licences = source, split, size, licences
        self.classes = classes
        self.skipped: list[tuple[str, str]] = []
        self._notes, self._cache_bytes = list(notes), cache_bytes
        self._records = list(records)
        self._cache: np.ndarray | None = None
        self._cached = np.zeros(len(self._records), bool)
        if skip:
            self._leave_out_broken()
        self.keys = [record.key for record in self._records]
        self.captions = [record.caption for record in self._records]
        self.meta = [record.meta for record in self._records]
        self._labels = labels_of(self._records, classes, source)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return Example(
            image=self.batch([index])[0],
            label=self._labels[index],
            caption=self.captions[index],
            key=self.keys[index],
        )

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self.source!r}, split={self.split!r}, size={self.size}: {len(self)} {self.what})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's pixels: (3, size, size)."""
        return (3, self.size, self.size)

    @property
    def preprocessing(self) -> str:
        """How pixels come about, in one line."""
        return PREPROCESSING

    @cached_property
    def labels(self) -> torch.Tensor:
        """Class indices, int64 (N,); -1 where unlabelled."""
        import torch

        return torch.tensor(self._labels, dtype=torch.int64)

    def batch(self, indices: Any) -> torch.Tensor:
        """Decode images, several at a time.

        Args:
            indices: a list, range, slice, array or tensor of indices, or a boolean mask.

        Returns:
            uint8, (B, *shape), 0 to 255; memory of its own.

        Raises:
            ImageError: one of them can't be read (`on_error="skip"` left those out when the set opened).
            IndexError: there is no such index.
        """
        import torch

        if not isinstance(indices, slice):
            indices = np.asarray(indices if len(indices) else np.empty(0, int))
        rows = np.arange(len(self))[indices]
        return torch.from_numpy(self._pixels(rows))

    def suffixes(self) -> list[str]:
        """Endings of the files that `files` gives."""
        return ["png"] * len(self)

    def files(self, rows: Sequence[int]) -> Iterator[bytes]:
        """Each example as a file of its own: PNG.

        Raises:
            ImageError: one of them can't be read.
        """
        import io

        from PIL import Image

        for pixels_CHW in self.batch(rows):
            Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy()).save(buffer := io.BytesIO(), "PNG")
            yield buffer.getvalue()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over preprocessing, size, and each image's key, class, caption and file bytes, in order.

        The first use reads every file; encoding a set to latents, for which this is the cache's key, takes
        longer.
        """
        digest = hashlib.sha256(f"{self.preprocessing}\n{self.size}\n{self.classes}\n".encode())

        def one(i: int) -> bytes:
            record = self._records[i]
            head = repr((record.key, self._labels[i], record.caption))
            return hashlib.sha256(head.encode() + b"\0" + read(record)).digest()

        for part in _threaded(one, range(len(self))):
            digest.update(part)
        return digest.hexdigest()

    def report(self) -> str:
        """Say in a few lines what the set holds, what was skipped, and why."""
        words = sum(bool(caption) for caption in self.captions)
        unlabelled = sum(label < 0 for label in self._labels)
        lines = [
            f"{self.source}, split {self.split}: {len(self)} {self.what} at {self.size}x{self.size}, "
            f"{len(self.classes)} classes ({unlabelled} {self.what} unlabelled), {words} with captions, "
            f"{len(self.skipped)} skipped"
        ]
        lines += [f"  skipped {key}: {reason}" for key, reason in self.skipped[:20]]
        if len(self.skipped) > 20:
            lines.append(f"  and {len(self.skipped) - 20} more, see .skipped")
        return "\n".join(lines + [f"  note: {note}" for note in self._notes])

    def _decode(self, record: Record) -> np.ndarray:
        """Pixels of one record, uint8, `shape`."""
        return decode(read(record), record.where, self.size).transpose(2, 0, 1)

    def _pixels(self, rows: np.ndarray) -> np.ndarray:
        """Pixels of some rows, uint8 (B, *shape), out of the cache where the set fits in it."""

        def one(row: int) -> np.ndarray:
            return self._decode(self._records[row])

        shape = (len(self._records), *self.shape)
        if np.prod(shape) > self._cache_bytes:
            out = np.empty((len(rows), *shape[1:]), np.uint8)
            for i, pixels in enumerate(_threaded(one, rows.tolist())):
                out[i] = pixels
            return out
        if self._cache is None:
            self._cache = np.empty(shape, np.uint8)
        missing = np.unique(rows[~self._cached[rows]]).tolist()
        for row, pixels in zip(missing, _threaded(one, missing), strict=True):
            self._cache[row] = pixels
            self._cached[row] = True
        return self._cache[rows]

    def _leave_out_broken(self) -> None:
        """Decode everything once; keep what can be decoded, note the rest in `skipped`."""
        keeps = np.prod((len(self._records), *self.shape)) <= self._cache_bytes

        def one(record: Record) -> np.ndarray | ImageError | None:
            try:
                pixels = self._decode(record)
            except ImageError as error:
                return error
            return pixels if keeps else None

        kept, cache = [], []
        for record, result in zip(self._records, _threaded(one, self._records), strict=True):
            if isinstance(result, ImageError):
                self.skipped.append((record.key, f"{result.where}: {result.reason}"))
                continue
            kept.append(record)
            if result is not None:
                cache.append(result)
        if not kept:
            raise ValueError(
                f"{self.source}: none of {len(self._records)} {self.what} can be read: {self.skipped[0][1]}"
            )
        if self.skipped:
            warnings.warn(
                f"{self.source}, split {self.split}: skipped {len(self.skipped)} of {len(self._records)} "
                f"{self.what} that can't be read, first {self.skipped[0][1]}; .report() lists them",
                stacklevel=4,
            )
        self._records = kept
        self._cache = np.stack(cache) if keeps else None
        self._cached = np.full(len(kept), keeps)


def open_images(
    source: str | Path,
    split: Literal["train", "heldout", "all"] = "train",
    size: int = 64,
    on_error: Literal["raise", "skip"] = "raise",
    *,
    cache_bytes: int = CACHE_BYTES,
) -> ImageSet:
    """Open a set of images with classes and captions.

    Args:
        source: `emoji`, the embedded set; a folder of images (`folder.list_folder` says how it is read);
            webdataset shards: a `.tar`, a brace pattern (`data/train-{000..099}.tar`) or a folder of them;
            or `hf:name[:config]`, `hf:PATH`, a Hugging Face data set. `./emoji` is a folder of that name.
        split: `train`, `heldout`, or `all`. Where the source has no splits, a hash of the key holds out one
            image in ten.
        size: side of the square images in pixels; see `decode.decode` for all that is done to them.
        on_error: `raise` an ImageError when a broken image is met, or `skip`: decode every image now, leave
            the broken ones out, warn, and list them in `skipped` and `report()`.
        cache_bytes: keep the decoded set in memory if it takes no more than this.

    Raises:
        FileNotFoundError: no such source.
        ValueError: no images, no such split, a shard that is damaged or refused, a source that contradicts
            itself.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    if size < 1:
        raise ValueError(f"size is {size}; expected the side of the images in pixels, at least 1")
    listing = list_source(str(source), split)
    records, classes = choose(listing, split, str(source))
    return ImageSet(
        records,
        classes,
        source=str(source),
        split=split,
        size=size,
        skip=on_error == "skip",
        cache_bytes=cache_bytes,
        notes=listing.notes,
        licences=listing.licences,
    )


def named_split(name: str) -> tuple[str, str]:
    """`emoji:train` as ("emoji", "train"). Without a split, as the name of a path that exists is: the name and ""."""
    source, _, split = name.rpartition(":")
    named = split in ("train", "heldout", "all") and not Path(name).expanduser().exists()
    return (source, split) if named else (name, "")


def list_source(source: str, split: str, accepts: Callable[[str], bool] = is_image) -> Listing:
    """List a source by the reader that its name calls for; `accepts` tells its files by their endings."""
    if source.startswith("hf:"):
        from genlab.data.hf import list_hf

        return list_hf(source[3:])
    if re.match(r"(https?|s3|gs|pipe|file):", source):
        raise ValueError(f"{source}: shards are read from disk only; download them and name the files")
    from genlab.data.folder import list_folder
    from genlab.data.shards import TAR, find_shards, list_shards

    path = EMBEDDED.get(source) or Path(source).expanduser()
    if not path.is_dir() and not TAR.search(path.name):
        raise FileNotFoundError(
            f"{source}: no such source; expected {', '.join(map(repr, EMBEDDED))}, a folder, .tar shards (a file "
            f"or a brace pattern), or 'hf:name' (see `genlab data --help`)"
        )
    shards = find_shards(path, accepts)
    return list_shards(shards, split, accepts) if shards else list_folder(path, accepts)


def read(record: Record) -> bytes:
    """The file's bytes. Raises: ImageError: where they can't be had."""
    try:
        return record.blob.read()
    except OSError as error:
        raise ImageError(record.where, f"can't be read ({error})") from error


def _threaded(function: Callable[[T], U], items: Sequence[T]) -> Iterable[U]:
    """Map in order over a few threads (Pillow and hashlib release the interpreter lock); few items, none."""
    workers = min(8, os.cpu_count() or 1, len(items) // 8)
    if workers < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), 256):  # a bounded number of results at a time
            yield from pool.map(function, items[start : start + 256])
