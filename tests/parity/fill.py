"""Weights of the recorded parity cases, made again from parameter names and shapes alone."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch


def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """The official state dict of a case.

    A tensor's values depend on its name, shape and `seed`: a PCG64 stream seeded with (seed, CRC-32 of the name).
    Matrices and kernels are normal with standard deviation 1/sqrt(fan-in); vectors named "…weight" are
    1 + 0.1 normal, other vectors 0.1 normal.
    """

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        z = stream.standard_normal(tuple(shape), dtype=np.float32)
        if len(shape) > 1:
            return z / math.sqrt(math.prod(shape[1:]))
        return 1 + 0.1 * z if name.endswith("weight") else 0.1 * z

    return {n: torch.from_numpy(np.asarray(values(n, s), dtype=np.float32, order="C")) for n, s in shapes.items()}
