"""Where images come from, brought to one form: `len`, `batch(indices)`, a content hash, what was skipped."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Images(Protocol):
    """A set of images that can be read by index, such as `genlab.data.ImageSet`."""

    fingerprint: str
    """Hash of the content."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> torch.Tensor:
        """Images as uint8 (N, 3, H, W)."""
        ...


class ArrayImages:
    """Images of a tensor or array, uint8: (N, 3, H, W), or (N, H, W, 3) as ADM's npz files hold them."""

    def __init__(self, array: Any, name: str = "array"):
        array = array.numpy(force=True) if hasattr(array, "numpy") else np.asanyarray(array)
        if array.dtype != np.uint8 or array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
            raise ValueError(
                f"{name}: images must be uint8 of shape (N, 3, H, W) or (N, H, W, 3), got {array.dtype} {array.shape}"
            )
        self.name = name
        self.skipped: list[tuple[str, str]] = []
        self._array = array
        self._channels_last = array.shape[1] != 3

    def __len__(self) -> int:
        return len(self._array)

    @property
    def fingerprint(self) -> str:
        """sha256 of shape and bytes."""
        digest = hashlib.sha256(repr(self._array.shape).encode())
        for start in range(0, len(self), 256):
            digest.update(np.ascontiguousarray(self._array[start : start + 256]).tobytes())
        return digest.hexdigest()

    def batch(self, indices: Any) -> torch.Tensor:
        """Images as uint8 (N, 3, H, W)."""
        import torch

        part = self._array[np.asarray(indices)]
        if self._channels_last:
            part = part.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(part))


def npz_images(path: str | Path) -> ArrayImages:
    """Images of an npz (`arr_0`, ADM's sample batches), mapped from disk where the file is not compressed."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "mu.npy" in names and "arr_0.npy" not in names:
                raise ValueError(f"{path} holds statistics (mu, sigma); here the images themselves are needed (arr_0)")
            if "arr_0.npy" not in names:
                raise ValueError(f"{path} holds {names}, but neither images (arr_0) nor statistics (mu, sigma)")
            info = archive.getinfo("arr_0.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
                    shape, fortran, dtype = read(member)
                    header = member.tell()
                with open(path, "rb") as file:
                    file.seek(info.header_offset + 26)  # the local header's name and extra lengths
                    name, extra = np.frombuffer(file.read(4), dtype="<u2")
                offset = info.header_offset + 30 + int(name) + int(extra) + header
                if not fortran and not dtype.hasobject:
                    mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
                    return ArrayImages(mapped, str(path))
        with np.load(path, allow_pickle=False) as file:
            return ArrayImages(file["arr_0"], str(path))
    except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a readable npz of images: {error}") from error


class StreamImages:
    """Images of an iterable of uint8 batches, read once and in order; cannot be resumed or cached.

    `fingerprint` is empty until all of it has been read.
    """

    def __init__(self, batches: Iterable[Any]):
        self.name, self.fingerprint = "stream", ""
        self.skipped: list[tuple[str, str]] = []
        self._digest = hashlib.sha256()
        self._batches = iter(batches)

    def chunks(self, rows: int) -> Iterator[torch.Tensor]:
        """The images again in chunks of `rows`."""
        import torch

        held: list[torch.Tensor] = []
        count = 0
        for batch in self._batches:
            part = ArrayImages(batch, "stream")
            images = part.batch(np.arange(len(part)))
            if held and images.shape[1:] != held[0].shape[1:]:
                raise ValueError(
                    f"images of two sizes: {tuple(held[0].shape[1:])} and {tuple(images.shape[1:])}; "
                    "bring them to one size first"
                )
            held.append(images)
            self._digest.update(images.numpy().tobytes())
            count += len(images)
            while count >= rows:
                joined = torch.cat(held)
                yield joined[:rows]
                held = [joined[rows:]]
                count = len(held[0])
        if count:
            yield torch.cat(held)
        self.fingerprint = self._digest.hexdigest()


class Subset:
    """The first `n` images of a set."""

    def __init__(self, images: Any, indices: Sequence[int]):
        self._images, self._indices = images, np.asarray(indices)
        self.name, self.skipped = source_name(images), getattr(images, "skipped", [])
        conversions = getattr(images, "conversions", ())
        self.conversions = [conversions[i] for i in self._indices] if conversions else []
        self.inline, self.files = getattr(images, "inline", False), getattr(images, "files", False)
        if hasattr(images, "tile"):
            self.tile = images.tile
        self.classes = getattr(images, "classes", ())
        captions = getattr(images, "captions", ())
        self.captions = [captions[i] for i in self._indices] if len(captions) else []
        labels = getattr(images, "labels", None)
        self.labels = None if labels is None else np.asarray(labels)[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def fingerprint(self) -> str:
        """Hash of the whole set and of which images were taken."""
        return hashlib.sha256(self._images.fingerprint.encode() + self._indices.tobytes()).hexdigest()

    def batch(self, indices: Any) -> torch.Tensor:
        """Images as uint8 (N, 3, H, W)."""
        return self._images.batch(self._indices[np.asarray(indices)].tolist())


def source_name(source: Any) -> str:
    """How a report names a source."""
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", None) or getattr(source, "source", None) or type(source).__name__)


def open_source(
    source: Any, *, n: int | None = None, size: int | None = None, on_error: str = "raise"
) -> Images | StreamImages:
    """Open a source of images.

    Args:
        source: a folder, tar or webdataset or `hf:NAME`, all of it or `SOURCE:SPLIT` (`emoji:train`); an npz
            with `arr_0`; a uint8 tensor or array; anything with `len`, `batch(indices)` and `fingerprint`;
            or an iterable of uint8 batches.
        n: use only the first n images.
        size: centre-crop and resize the images of folders, tars and data sets to this side; None keeps their
            own, which must then be one and square.
        on_error: "raise" or "skip" for images that cannot be read; skipped ones are counted and reported.

    Raises:
        FileNotFoundError: no such path.
        ValueError: no images in it, or fewer than n.
    """
    images: Any
    if isinstance(source, (str, Path)):
        images = _open_path(str(source), size, on_error)
    elif isinstance(source, np.ndarray) or hasattr(source, "numel"):
        images = ArrayImages(source)
    elif hasattr(source, "batch") and hasattr(source, "__len__"):
        images = source
    elif isinstance(source, Iterable):
        if n is not None:
            raise ValueError("n cannot be given with an iterable of batches; cut it off yourself")
        return StreamImages(source)
    else:
        raise ValueError(f"cannot read images from a {type(source).__name__}")
    if len(images) == 0:
        raise ValueError(f"no images in {source_name(source)}")
    if n is not None:
        if n < 1:
            raise ValueError(f"n is {n}; expected the number of images, at least 1")
        if n > len(images):
            raise ValueError(f"{source_name(source)} has {len(images)} images, fewer than the {n} asked for")
        images = Subset(images, range(n))
    return images


def _open_path(source: str, size: int | None, on_error: str) -> Any:
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return npz_images(path)
    from genlab.data.images import named_split, open_images

    source, split = named_split(source)
    options: dict[str, Any] = {"split": split or "all", "cache_bytes": 0}  # one pass: nothing is worth keeping
    # Opening lists the files; pixels are read by `batch` alone, so this size is never used.
    size, kinds = _reading(open_images(source, size=1, **options), source, size)
    options["on_error"] = on_error
    images: Any = open_images(source, size=size, **options)
    images.name = f"{source}:{split}" if split not in ("", "all") else source
    images.conversions = [kinds.get(key, ()) for key in images.keys]
    images.files = True  # decoding takes long enough for worker processes
    return images


def _reading(images: Any, source: str, size: int | None) -> tuple[int, dict[str, list[str]]]:
    """The side to read a set's images at, and by key what is done to each; from headers only.

    With a `size`, images of others are cropped to their centre and resized; without, all must be square and of one.
    """
    from PIL import Image

    seen: dict[tuple[int, int], list[str]] = {}
    kinds: dict[str, list[str]] = defaultdict(list)
    for record in images._records:
        try:
            with Image.open(io.BytesIO(record.blob.read())) as image:
                seen.setdefault(image.size, []).append(record.where)
                if kind := _kind(image):
                    kinds[record.key].append(kind)
                if size is not None and image.size != (size, size):
                    kinds[record.key].append(f"not {size}x{size}: the centre cropped and resized")
        except Exception:  # a broken file is named, or skipped and counted, by the reader itself
            continue
    return _common_size(seen, source) if size is None else size, kinds


def _common_size(seen: dict[tuple[int, int], list[str]], source: str) -> int:
    """The one side of square images, of (width, height) -> their names."""
    if not seen:
        return 1
    if len(seen) > 1:
        most = sorted(seen.items(), key=lambda item: -len(item[1]))[:4]
        listing = "; ".join(f"{w}x{h}: {len(names)} images, first {names[0]}" for (w, h), names in most)
        raise ValueError(
            f"{source} holds images of {len(seen)} sizes ({listing}). A figure would mix resizes: "
            "name the side to bring them all to with `--size`, or separate them"
        )
    ((width, height),) = seen
    if width != height:
        raise ValueError(f"{source}: images are {width}x{height}, not square; `--size` crops the centre and resizes it")
    return width


def _kind(image: Any) -> str:
    """What must be done to reach 8-bit RGB, in words; empty where nothing is lost or added."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return "16-bit: scaled to 8 bits"
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return "with alpha: composited on white"
    if image.mode in ("L", "1"):
        return "grey: the channel repeated"
    return "" if image.mode in ("RGB", "P") else f"{image.mode}: converted to RGB"


class GeneratedImages:
    """Images drawn when they are read: nothing is stored, and an interrupted evaluation resumes.

    Args:
        sample: image indices -> uint8 (N, 3, H, W); image i depends on i alone (its seed), not the batch.
        n: how many images.
        fingerprint: hash of all the images depend on: weights, sampler, guidance, classes, seeds.
        name: for the report.
        tile: how many are kept at once; an interrupted evaluation loses at most so many.
    """

    inline = True  # drawn on the extractor's device: reading ahead gains nothing

    def __init__(
        self,
        sample: Callable[[list[int]], torch.Tensor],
        n: int,
        fingerprint: str,
        name: str = "model",
        *,
        tile: int = 64,
    ):
        self._sample, self._n, self.fingerprint, self.name, self.tile = sample, n, fingerprint, name, tile
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: Any) -> torch.Tensor:
        """Images as uint8 (N, 3, H, W)."""
        return self._sample([int(i) for i in indices])
