"""Counter-based randomness: what image 17 draws depends on its seed, not on its batch.

A number is a pure function of (image seed, position, step, purpose, index), by Philox 4x32-10 (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). So a rejection that draws more, another batch size or
another number of processes leaves every other image's noise as it was. The arithmetic is on integers: the
bits are the same on every device.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_MASK = 0xFFFFFFFF


def philox(counter: list[Any], key: tuple[Any, Any]) -> list[Any]:
    """Philox 4x32-10: four words of counter, two of key (int64 tensors or arrays) to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which is what is wanted
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _philox_on_cpu(
    seeds_B: Any, lead: tuple[int, ...], blocks: int, address: tuple[Any, Any, Any], most: int = 1 << 15
) -> Any:
    """`Noise._words` (*lead, 4 blocks) in numpy; address is position, step and purpose, which broadcast to lead.

    Two words at a time, since few operations count where numbers are few, and `most` counters, whose pieces stay in the
    processor's cache.
    """
    words, rows = np.empty((*lead, blocks, 4), dtype=np.uint64), max(1, most // max(1, math.prod(lead[1:]) * blocks))
    pieces = lead[0] > rows  # else every array is filled at once, and broadcasts on its own
    words_of = [np.asarray(x, dtype=np.int64) & _MASK for x in address]
    place = [(np.broadcast_to(x, lead) if pieces else x)[..., None] for x in words_of]
    key = (np.array([seeds_B & _MASK, (seeds_B >> 32) & _MASK], dtype=np.uint64)[None, ..., None, None] + _WEYLS) & _LOW
    for i in range(0, lead[0], rows):
        here = slice(i, i + rows)
        even, odd, product, high = np.empty((4, 2, *words[here].shape[:-1]), dtype=np.uint64)
        even[0], odd[0], even[1], odd[1] = np.arange(blocks), *(x[here] if pieces else x for x in place)
        for k in key[:, :, here]:
            np.multiply(even, _MULTIPLIER, out=product)
            np.right_shift(product, _HALF, out=high)
            np.bitwise_xor(high[::-1], odd, out=even)
            np.bitwise_xor(even, k, out=even)
            np.bitwise_and(product[::-1], _LOW, out=odd)
        for j, part in enumerate((even[0], odd[0], even[1], odd[1])):
            words[here, ..., j] = part
    return words.view(np.int64).reshape(*lead, -1)


_LOW, _HALF = np.uint64(_MASK), np.uint64(32)
_MULTIPLIER, _WEYL = (
    np.array(pair, dtype=np.uint64).reshape(2, 1, 1, 1) for pair in ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
)
_WEYLS = np.arange(10, dtype=np.uint64).reshape(10, 1, 1, 1, 1) * _WEYL


@lru_cache(maxsize=256)
def _purpose(name: str) -> int:
    return zlib.crc32(name.encode())


@dataclass(frozen=True, eq=False)
class Noise:
    """A source of noise for a batch of images, addressed by position, step and purpose.

    Args:
        seeds_B: one seed an image, (B,) integers.
        position: absolute token position, or several: an int, (G,) or (B, G) integers. The draws then have
            the shape (B, *shape) or (B, G, *shape).
        step: which denoising step, trial or model call; an int, or a tensor that broadcasts with `position`.
        purpose: what the noise is for; different names give independent noise.
    """

    seeds_B: torch.Tensor
    position: int | torch.Tensor = 0
    step: int | torch.Tensor = 0
    purpose: str = "sample"

    @classmethod
    def from_seeds(cls, seeds: list[int] | range | torch.Tensor, device: torch.device | str = "cpu") -> Noise:
        """A source for images of these seeds."""
        return cls(torch.as_tensor(list(seeds) if isinstance(seeds, range) else seeds, device=device).long())

    def at(
        self,
        position: int | torch.Tensor | None = None,
        step: int | torch.Tensor | None = None,
        purpose: str | None = None,
    ) -> Noise:
        """The same images' noise at another position, step or purpose."""
        return replace(
            self,
            position=self.position if position is None else position,
            step=self.step if step is None else step,
            purpose=self.purpose if purpose is None else purpose,
        )

    def rows(self, index: torch.Tensor | slice) -> Noise:
        """The noise of the chosen rows (positions and steps that are given a row go with them)."""

        def pick(x: int | torch.Tensor) -> int | torch.Tensor:
            return x[index] if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[0] != 1 else x

        return replace(self, seeds_B=self.seeds_B[index], position=pick(self.position), step=pick(self.step))

    def _words(self, n: int) -> torch.Tensor:
        """(…, 4 * ceil(n / 4)) random 32-bit words, where … is (B,) or (B, G)."""
        device = self.seeds_B.device
        axes = max(getattr(self.position, "ndim", 0), getattr(self.step, "ndim", 0))
        if axes == 0:
            lead = (len(self.seeds_B), 1)
        else:
            G = np.broadcast_shapes(getattr(self.position, "shape", ()), getattr(self.step, "shape", ()), (1,))
            lead = np.broadcast_shapes((len(self.seeds_B), 1), G)
        address, blocks = (self.position, self.step, _purpose(self.purpose)), (n + 3) // 4
        if device.type == "cpu":
            position, step, purpose = (x.numpy() if isinstance(x, torch.Tensor) else x for x in address)
            seeds = self.seeds_B.long().numpy()
            words = torch.from_numpy(_philox_on_cpu(seeds, lead, blocks, (position, step, purpose)))
        else:
            seed, ids = self.seeds_B[:, None, None], torch.arange(blocks, device=device).expand(*lead, -1)
            place = [(torch.as_tensor(x, device=device).long() & _MASK).expand(lead)[..., None] for x in address]
            words = torch.stack(philox([ids, *place], (seed & _MASK, (seed >> 32) & _MASK)), -1).flatten(-2)
        return words if axes else words[:, 0]

    def uniform(self, *shape: int) -> torch.Tensor:
        """Float64 uniforms in the open interval (0, 1), 32 bits each: (B, *shape) or (B, G, *shape)."""
        n = math.prod(shape)
        words = self._words(n)[..., :n]
        return ((words.double() + 0.5) * 2.0**-32).reshape(*words.shape[:-1], *shape)

    def normal(self, *shape: int) -> torch.Tensor:
        """Float64 standard normals (Box-Muller): (B, *shape) or (B, G, *shape)."""
        n = math.prod(shape)
        words = self._words(2 * ((n + 1) // 2))
        u1, u2 = ((words.double() + 0.5) * 2.0**-32).unflatten(-1, (-1, 2)).unbind(-1)
        radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
        z = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :n]
        return z.reshape(*z.shape[:-1], *shape)

    def gumbel(self, *shape: int) -> torch.Tensor:
        """Float64 standard Gumbels: (B, *shape) or (B, G, *shape)."""
        return -(-self.uniform(*shape).log()).log()


def permutation(n: int, seed: int, purpose: str = "shuffle") -> torch.Tensor:
    """A random order of 0..n-1 that only (n, seed, purpose) decide, the same on every machine."""
    noise = Noise(torch.tensor([seed]), purpose=purpose)
    return noise.uniform(n)[0].argsort(stable=True)
