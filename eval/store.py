"""Features on disk, in tiles: what makes an evaluation resumable, shareable and flat in memory.

A set's features lie in one folder, a file a tile (512 images) and layer. Tiles are written whole (temporary
name, then rename), so a killed run leaves only whole tiles, and the next run computes the missing ones. The
processes of one run take tiles in turn; batches never straddle tiles, so every tile is the same array
whoever made it, and all figures are computed from the tiles in image order: process count, resumption and
caching change nothing at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .features import Extractor, padded_batches
from .sources import Images, StreamImages
from .statistics import Statistics, load_statistics, statistics_of

TILE = 512


def cache_dir() -> Path:
    """`GENLAB_CACHE`, or ~/.cache/genlab."""
    return Path(os.environ.get("GENLAB_CACHE") or Path.home() / ".cache" / "genlab")


class FeatureStore:
    """The features of one set of images under one extractor.

    Args:
        folder: where the tiles lie.
        n: number of images.
    """

    def __init__(self, folder: Path, n: int):
        self.folder, self.n = folder, n

    @property
    def tile_count(self) -> int:
        """Number of tiles of a complete set."""
        return -(-self.n // TILE)

    def path(self, layer: str, tile: int) -> Path:
        """File of one tile."""
        return self.folder / f"{layer}-{tile:05d}.npy"

    def has(self, layers: Sequence[str], tile: int) -> bool:
        """Whether a tile is there for all these layers."""
        return all(self.path(layer, tile).is_file() for layer in layers)

    def put(self, layer: str, tile: int, x_ND: np.ndarray) -> None:
        """Write one tile, whole or not at all."""
        bad = ~np.isfinite(x_ND).all(axis=1)
        if bad.any():
            image = tile * TILE + int(np.argmax(bad))
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
        """The tiles in image order, float32 (at most 512, D), one in memory at a time."""
        for tile in range(self.tile_count):
            yield np.load(self.path(layer, tile), allow_pickle=False)

    def read(self, layer: str) -> np.ndarray:
        """All features in image order, (n, D): memory grows with n."""
        return np.concatenate(list(self.tiles(layer)))

    def statistics(self, layer: str) -> Statistics:
        """Mean and covariance, computed once and kept beside the tiles."""
        path = self.folder / f"{layer}-statistics.npz"
        if path.is_file():
            return load_statistics(path)
        statistics = statistics_of(self.tiles(layer), layer=layer)
        statistics.save(path)
        return statistics

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def store_folder(cache: Path, fingerprint: str, extractor: Extractor) -> Path:
    """The folder of a set's features: named by what the images and the extractor are."""
    key = hashlib.sha256(f"{fingerprint}\n{extractor.key}".encode()).hexdigest()[:32]
    return cache / "features" / key


def extract(
    source: Images | StreamImages,
    extractor: Extractor,
    layers: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> FeatureStore:
    """Compute the features of a set into tiles, leaving out those already there.

    Args:
        source: the images.
        extractor: the network.
        layers: which of its layers.
        folder: the store's folder.
        batch_size: images a forward; every forward has this batch shape.
        progress: show a bar on stderr.

    Raises:
        ValueError: fewer than 2 images, or features that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, StreamImages):
        n = 0
        store = FeatureStore(folder, 0)
        for tile, images in enumerate(source.chunks(TILE)):
            _tile(store, extractor, layers, tile, images, batch_size)
            n += len(images)
        store.n = n
    else:
        from tqdm import tqdm

        store = FeatureStore(folder, len(source))
        missing = [tile for tile in range(store.tile_count) if not store.has(layers, tile)]
        with tqdm(total=len(missing) * TILE, unit="img", disable=not progress or not missing) as bar:
            for tile in missing:
                indices = list(range(tile * TILE, min((tile + 1) * TILE, store.n)))
                _tile(store, extractor, layers, tile, source.batch(indices), batch_size)
                bar.update(len(indices))
    if store.n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {store.n}")
    info = {"n": store.n, "extractor": extractor.key, "source": getattr(source, "fingerprint", "")}
    (folder / "store.json").write_text(json.dumps(info))
    return store


def _tile(store, extractor: Extractor, layers, tile: int, images, batch_size: int) -> None:
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for batch, real in padded_batches(images, batch_size):
        for layer, features in extractor(batch, layers).items():
            parts[layer].append(features[:real])
    for layer in layers:
        store.put(layer, tile, np.concatenate(parts[layer]))
