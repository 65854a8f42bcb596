"""Nearest images of a reference set: the check that a generator does not simply hand back its training set.

A distance says little by itself: set the generated images' distances to the training set beside those of
held-out real images. Generated ones that lie clearly nearer than held-out ones are memorised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def nearest(
    x_ND: np.ndarray,
    y: np.ndarray | Iterable[np.ndarray],
    *,
    k: int = 1,
    chunk: int = 1024,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of y for every row of x, by Euclidean distance, in chunks.

    Candidates come from the matrix product |x|² + |y|² - 2 x·y in float64 (in float32 a copy is lost among pictures
    that are nearly white), and the kept ones are measured again directly, so that a copy is at distance 0 and not at
    the product's rounding error.

    Args:
        x_ND: queries, shape (N, D).
        y: reference, shape (M, D), or an iterable of its consecutive tiles (M_i, D).
        k: how many neighbours.
        chunk: rows of a block; the memory in use is chunk² distances.
        exclude_self: x and y are the same set, and a row is not its own neighbour.

    Returns:
        Distances (N, k), ascending, and indices into y (N, k); equal distances by lower index.

    Raises:
        ValueError: dimensions differ, or y has fewer than k rows.
    """
    x = np.asarray(x_ND, dtype=np.float64)
    spare = k + 4  # rounding may swap near-equal candidates; the re-measurement puts them right
    x_norm = np.square(x).sum(axis=1)
    best_d = np.full((len(x), 0), np.inf)
    best_i = np.zeros((len(x), 0), dtype=np.int64)
    start = 0
    for tile in [y] if isinstance(y, np.ndarray) else y:
        for low in range(0, len(tile), chunk):
            block = np.asarray(tile[low : low + chunk], dtype=np.float64)
            if block.shape[1] != x.shape[1]:
                raise ValueError(f"queries have {x.shape[1]} dimensions, the reference {block.shape[1]}")
            norm = np.square(block).sum(axis=1)
            new_d, new_i = [], []
            for row in range(0, len(x), chunk):
                part = slice(row, row + chunk)
                # squared distances, which pick candidates and nothing more
                square = x_norm[part, None] + norm[None] - 2.0 * (x[part] @ block.T)
                index = np.arange(start, start + len(block))
                if exclude_self:
                    square[np.arange(row, row + len(square))[:, None] == index[None]] = np.inf
                if len(block) > spare:
                    pick = np.argpartition(square, spare - 1, axis=1)[:, :spare]
                    square = np.take_along_axis(square, pick, axis=1)
                else:
                    pick = np.broadcast_to(np.arange(len(block)), square.shape)
                exact = np.square(block[pick] - x[part, None]).sum(axis=2)
                exact[np.isinf(square)] = np.inf
                new_d.append(exact)
                new_i.append(index[pick])
            d = np.concatenate([best_d, np.concatenate(new_d)], axis=1)
            i = np.concatenate([best_i, np.concatenate(new_i)], axis=1)
            order = np.lexsort((i, d), axis=1)[:, :k]
            best_d, best_i = np.take_along_axis(d, order, axis=1), np.take_along_axis(i, order, axis=1)
            start += len(block)
    if best_d.shape[1] < k or not np.isfinite(best_d).all():
        raise ValueError(f"the reference has {start} images, too few for {k} neighbours")
    return np.sqrt(best_d), best_i


def nearest_pixels(images_N3HW, reference_M3HW, *, k: int = 1, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Nearest reference images in pixel space.

    Args:
        images_N3HW: uint8 images (tensor or array).
        reference_M3HW: uint8 images of the same size.
        k: how many neighbours.
        chunk: images of a block.

    Returns:
        Root-mean-square pixel differences in 0..255, shape (N, k), and indices (N, k).
    """
    x, y = np.asarray(images_N3HW), np.asarray(reference_M3HW)
    if x.dtype != np.uint8 or y.dtype != np.uint8 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"need uint8 images of one size, got {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    flat = y.reshape(len(y), -1)
    distance, index = nearest(x.reshape(len(x), -1), flat, k=k, chunk=chunk)
    return distance / np.sqrt(flat.shape[1]), index


def nearest_quantiles(images_N3HW, reference_M3HW, shares: Sequence[float] = (0.01, 0.1, 0.5)) -> list[float]:
    """Within what distance (of `nearest_pixels`) of a reference image these shares of images lie."""
    return np.quantile(nearest_pixels(images_N3HW, reference_M3HW)[0], shares).tolist()
