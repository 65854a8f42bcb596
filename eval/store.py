"""Features on disk, in tiles: what makes an evaluation resumable, shareable and flat in memory.

A set's features lie in one folder, a file a tile (512 images; 64 of those drawn as they are read) and layer.
Tiles are written whole (temporary name, then rename), so a killed run leaves only whole tiles, and the next run
computes the missing ones. The processes of one run take tiles in turn; batches never straddle tiles, so every tile is
the same array whoever made it, and all figures are computed from the tiles in image order: process count, resumption
and caching change nothing at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genlab.processes import processes

from .features import Extractor, padded
from .sources import Images, StreamImages, source_name
from .statistics import Statistics, load_statistics, statistics_of

if TYPE_CHECKING:
    import torch

TILE = 512
CACHE_GB = 20.0
"""Features kept on disk, in GB, unless `GENLAB_CACHE_GB` says otherwise; the longest unused go first."""
AHEAD = 4


def cache_dir() -> Path:
    """`GENLAB_CACHE`, or ~/.cache/genlab."""
    return Path(os.environ.get("GENLAB_CACHE") or Path.home() / ".cache" / "genlab")


def cache_limit() -> float:
    """Bytes that features may take: `GENLAB_CACHE_GB`, or 20 GB.

    Raises:
        ValueError: the variable is not a number of 0 or more.
    """
    text = os.environ.get("GENLAB_CACHE_GB") or str(CACHE_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"GENLAB_CACHE_GB is {text!r}; expected a number of gigabytes, such as 20 (0 keeps nothing)")
    return limit * 1e9


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Make a store's folder and keep `evict` of any process off it; it counts as used now."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows, where nothing is evicted either
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    path = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(path, "a")  # noqa: SIM115
        except FileNotFoundError:  # evicted between the two lines
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            break
        lock.close()  # evicted while we waited
    with lock:
        os.utime(path)
        yield


def evict(cache: Path, limit: float) -> list[Path]:
    """Remove the longest unused stores until all take no more than `limit` bytes; those in use stay.

    Returns:
        The folders removed.
    """
    try:
        import fcntl
    except ImportError:
        return []
    stores = []
    for folder in (cache / "features").glob("*/"):
        with contextlib.suppress(FileNotFoundError):  # another process evicts too
            size = sum(f.stat().st_size for f in folder.iterdir())
            lock = folder / ".lock"
            stores.append(((lock if lock.exists() else folder).stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in stores)
    removed = []
    for _, size, folder in sorted(stores):
        if total <= limit:
            break
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(folder / ".lock", "a") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            total -= size
            removed.append(folder)
    return removed


class FeatureStore:
    """The features of one set of images under one extractor.

    Args:
        folder: where the tiles lie.
        n: number of images.
        tile: images in a tile.
    """

    def __init__(self, folder: Path, n: int, tile: int = TILE):
        self.folder, self.n, self.tile = folder, n, tile

    @property
    def tile_count(self) -> int:
        """Number of tiles of a complete set."""
        return -(-self.n // self.tile)

    def path(self, layer: str, tile: int) -> Path:
        """File of one tile."""
        return self.folder / f"{layer}-{tile:05d}.npy"

    def rows(self, tile: int) -> range:
        """Image indices of one tile."""
        return range(tile * self.tile, min((tile + 1) * self.tile, self.n))

    def has(self, layers: Sequence[str], tile: int) -> bool:
        """Whether a tile is there for all these layers."""
        return all(self.path(layer, tile).is_file() for layer in layers)

    def put(self, layer: str, tile: int, x_ND: np.ndarray) -> None:
        """Write one tile, whole or not at all."""
        bad = ~np.isfinite(x_ND).all(axis=1)
        if bad.any():
            image = tile * self.tile + int(np.argmax(bad))
            raise ValueError(
                f"{int(bad.sum())} images of a tile have NaN or infinite features, the first image {image}; "
                "the extractor's weights or that image are broken"
            )
        path = self.path(layer, tile)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, x_ND)
        os.replace(temporary, path)

    def tiles(self, layer: str) -> Iterator[np.ndarray]:
        """The tiles in image order, float32 (at most `tile`, D), one in memory at a time."""
        for tile in range(self.tile_count):
            yield np.load(self.path(layer, tile), allow_pickle=False)

    def read(self, layer: str) -> np.ndarray:
        """All features in image order, (n, D) float32, mapped from disk: pages come in as they are used."""
        path = self.folder / f"{layer}-all.npy"
        if not path.is_file():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            width = np.load(self.path(layer, 0), mmap_mode="r").shape[1]
            with open(temporary, "wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.n, width)}
                np.lib.format.write_array_header_1_0(file, header)
                for tile in self.tiles(layer):
                    tile.astype("<f4", copy=False).tofile(file)
            os.replace(temporary, path)
        return np.load(path, mmap_mode="c")  # copy on write: torch wants arrays it could write to

    def statistics(self, layer: str) -> Statistics:
        """Mean and covariance, computed once and kept beside the tiles."""
        path = self.folder / f"{layer}-statistics.npz"
        if path.is_file():
            return load_statistics(path)
        statistics = statistics_of(self.tiles(layer))
        statistics.save(path)
        return statistics


def store_folder(cache: Path, source: Images | StreamImages, extractor: Extractor) -> Path:
    """The folder of a set's features: named by what the images and the extractor are."""
    what = [source.fingerprint, len(source), extractor.key, getattr(source, "tile", TILE)]  # type: ignore[arg-type]
    key = hashlib.sha256("\n".join(map(str, what)).encode()).hexdigest()[:32]
    return cache / "features" / key


def extract(
    source: Images | StreamImages,
    extractor: Extractor,
    layers: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    progress: bool = False,
    shared: bool = False,
) -> FeatureStore:
    """Compute the features of a set into tiles, leaving out those already there.

    Args:
        source: the images.
        extractor: the network.
        layers: which of its layers.
        folder: the store's folder.
        batch_size: images a forward; every forward has this batch shape.
        workers: processes that decode files; 0 decodes in a thread; None takes the spare cores, at most 4.
        progress: show a bar on stderr.
        shared: all processes of a `torchrun` or `accelerate launch` work into this folder, each its tiles.

    Raises:
        ValueError: fewer than 2 images, or features that are not finite.
    """
    from tqdm import tqdm

    if batch_size < 1 or (workers or 0) < 0:
        raise ValueError(f"batch_size must be at least 1 and workers 0 or more, got {batch_size} and {workers}")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, StreamImages):
        store = FeatureStore(folder, 0)
        for tile, images in enumerate(source.chunks(TILE)):
            batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
            parts = [_forward(extractor, _ready(extractor, b, batch_size), len(b), layers) for b in batches]
            _put(store, tile, layers, parts)
            store.n += len(images)
    else:
        store = FeatureStore(folder, len(source), getattr(source, "tile", TILE))
        rank, world = processes() if shared else (0, 1)
        missing = [t for t in range(store.tile_count) if not store.has(layers, t)]
        with tqdm(total=store.n, unit="img", disable=not progress or rank > 0, leave=False) as bar:
            bar.update(store.n - sum(len(store.rows(t)) for t in missing))
            # Assigned by number, not by place in the list: a neighbour may already have filled a tile.
            _fill(store, source, extractor, layers, [t for t in missing if t % world == rank], batch_size, workers, bar)
            if world > 1:
                import torch.distributed

                torch.distributed.barrier()
                left = [t for t in missing if not store.has(layers, t)]
                _fill(store, source, extractor, layers, left, batch_size, workers, bar)
    if store.n < 2:
        raise ValueError(f"{source_name(source)}: a covariance needs at least 2 images, got {store.n}")
    return store


def _fill(
    store: FeatureStore,
    source: Images,
    extractor: Extractor,
    layers: Sequence[str],
    tiles: list[int],
    batch_size: int,
    workers: int | None,
    bar: Any,
) -> None:
    """Compute some tiles, reading the next batches while this one is computed."""
    jobs = [
        (tile, rows[i : i + batch_size])
        for tile in tiles
        for rows in [store.rows(tile)]
        for i in range(0, len(rows), batch_size)
    ]

    def read(rows: range) -> torch.Tensor:
        return _ready(extractor, source.batch(list(rows)), batch_size)

    if getattr(source, "inline", False):
        batches: Iterator[torch.Tensor] = map(read, [r for _, r in jobs])
    elif getattr(source, "files", False) and (count := _workers(workers, len(jobs))):
        batches = _by_processes(read, [r for _, r in jobs], count)
    else:
        batches = _by_thread(read, [r for _, r in jobs])
    parts: list[dict[str, np.ndarray]] = []
    for (tile, rows), images in zip(jobs, batches, strict=True):
        parts.append(_forward(extractor, images, len(rows), layers))
        bar.update(len(rows))
        if rows[-1] == store.rows(tile)[-1]:
            _put(store, tile, layers, parts)
            parts = []


def _workers(asked: int | None, jobs: int) -> int:
    """How many processes decode; 0 where a thread does it (few batches, one core, or no `fork`)."""
    if not hasattr(os, "fork"):
        return 0
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1) if jobs > 2 * AHEAD else 0
    return max(0, min(asked, jobs))


def _by_thread(read: Callable[[range], torch.Tensor], items: list[range]) -> Iterator[torch.Tensor]:
    """Read in order, some batches ahead, in a thread (Pillow lets go of the interpreter lock)."""
    with ThreadPoolExecutor(1, thread_name_prefix="genlab-read") as pool:
        waiting: deque[Future[torch.Tensor]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Reads:
    """What a DataLoader's workers run: a batch as an array, or the error that reading it raised."""

    def __init__(self, read: Callable[[range], torch.Tensor]):
        self.read = read

    def __getitem__(self, rows: range) -> Any:
        try:
            return self.read(rows).numpy()  # arrays go through a pipe: containers' /dev/shm is often tiny
        except Exception as error:  # DataLoader would wrap it in a text
            return error


def _by_processes(read: Callable[[range], torch.Tensor], items: list[range], count: int) -> Iterator[torch.Tensor]:
    """Read in order, some batches ahead, on worker processes, which end with this one however it ends."""
    import torch.utils.data

    loader: Any = torch.utils.data.DataLoader(
        _Reads(read),  # type: ignore[arg-type]
        batch_size=None,
        sampler=items,
        num_workers=count,
        prefetch_factor=max(2, AHEAD // count),
        collate_fn=_as_is,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # the caller's random numbers stay as they are
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield torch.from_numpy(batch)


def _as_is(batch: Any) -> Any:
    return batch


def _ready(extractor: Extractor, images_B3HW: torch.Tensor, batch_size: int) -> torch.Tensor:
    """A padded batch, resized here where the resize is Pillow's, else left to the device."""
    images = padded(images_B3HW, batch_size)
    return extractor.prepare(images) if extractor.resize.startswith("pil") else images


def _forward(extractor: Extractor, images: torch.Tensor, real: int, layers) -> dict[str, np.ndarray]:
    call = extractor if str(images.dtype) == "torch.uint8" else extractor.features
    return {layer: features[:real] for layer, features in call(images, layers).items()}


def _put(store: FeatureStore, tile: int, layers, parts: list[dict[str, np.ndarray]]) -> None:
    for layer in layers:
        store.put(layer, tile, np.concatenate([part[layer] for part in parts]))
