"""What flows between a tokenizer, a generator and a sampler: `Tokens`, described by a `TokenSpec`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["discrete", "residual", "binary", "continuous"]
Order = Literal["raster", "coarse_to_fine", "scale"]


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """The shape and meaning of one image's (or clip's) tokens.

    Two parts fit together when their specs are equal in everything but `image_size`, which only the
    tokenizer decides.
    """

    kind: Kind
    """`discrete`: ids (L,). `residual`: ids (L, depth). `binary`: ids of sub-tokens (L, depth), each of
    log2(vocab) bits. `continuous`: vectors (L, dim)."""
    grid: tuple[int, ...]
    """Axes of the token map: (L,) in one dimension, (h, w) for images, (t, h, w) for clips. With order
    `scale`, the finest map."""
    order: Order = "raster"
    """`raster`; `coarse_to_fine` (one dimension, any first k tokens are a whole image); `scale` (the maps
    of `scales`, coarse first, one behind the other)."""
    vocab: int | None = None
    """Codebook size; of each depth (residual) or of each sub-token (binary). None where continuous."""
    depth: int = 1
    """Residual depths, or sub-tokens of a binary code."""
    dim: int | None = None
    """Channels of a continuous token. None where discrete."""
    scales: tuple[tuple[int, int], ...] = ()
    """(h, w) of every map, coarse to fine, with order `scale`; empty otherwise."""
    image_size: tuple[int, ...] | None = None
    """(H, W) of the picture, or (T, H, W) of the clip, that the tokenizer reads and writes."""

    def __post_init__(self) -> None:
        if not self.grid or min(self.grid) < 1:
            raise ValueError(f"TokenSpec.grid needs positive axes, got {self.grid}")
        if (self.kind == "continuous") != (self.dim is not None) or (self.kind == "continuous") == (
            self.vocab is not None
        ):
            raise ValueError(
                f"a {self.kind} TokenSpec needs {'dim, not vocab' if self.kind == 'continuous' else 'vocab, not dim'}"
                f" (got vocab={self.vocab}, dim={self.dim})"
            )
        if (self.order == "scale") != bool(self.scales):
            raise ValueError(f"order 'scale' and `scales` go together (got {self.order!r}, {self.scales})")
        if self.kind in ("discrete", "continuous") and self.depth != 1:
            raise ValueError(f"a {self.kind} TokenSpec has depth 1, got {self.depth}")

    @property
    def length(self) -> int:
        """Number of token positions L."""
        if self.scales:
            return sum(math.prod(s) for s in self.scales)
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's token values: (L,), (L, depth) or (L, dim)."""
        if self.kind == "continuous":
            return (self.length, self.dim or 0)
        return (self.length,) if self.kind == "discrete" else (self.length, self.depth)

    def describe(self) -> str:
        """One line for people: `continuous 8x8 raster, 16 channels`."""
        grid = "x".join(map(str, self.grid))
        if self.kind == "continuous":
            what = f"{self.dim} channels"
        elif self.depth == 1:
            what = f"{self.vocab} codes"
        else:
            what = f"{self.depth} x {self.vocab} codes"
        scales = " of scales " + ",".join(f"{h}x{w}" for h, w in self.scales) if self.scales else ""
        return f"{self.kind} {grid} {self.order}{scales}, {what}"

    def fits(self, other: TokenSpec) -> bool:
        """Whether tokens of this spec can be read where `other` is expected."""
        return dataclasses.replace(self, image_size=None) == dataclasses.replace(other, image_size=None)


def require_fit(tokenizer: str, given: TokenSpec, generator: str, wanted: TokenSpec) -> None:
    """Refuse a pair whose tokens don't fit.

    Args:
        tokenizer: name of the tokenizer, for the message.
        given: the tokens it makes.
        generator: name of the generator.
        wanted: the tokens it takes.

    Raises:
        ValueError: naming both specs, what differs, and where to look for one that fits.
    """
    if given.fits(wanted):
        return
    names = [f.name for f in dataclasses.fields(TokenSpec) if f.name != "image_size"]
    differs = ", ".join(n for n in names if getattr(given, n) != getattr(wanted, n))
    raise ValueError(
        f"tokenizer {tokenizer!r} makes {given.describe()}, but generator {generator!r} takes "
        f"{wanted.describe()} (they differ in {differs}). Choose a tokenizer of that spec, or train the generator "
        f"on this one: `genlab list` shows the tokens of every model."
    )


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of tokens: ids or vectors of shape (B, *spec.shape), and how many of them count.

    `kept` limits the row to its first `kept[b]` positions (1D tokens) and `depths` to its first depths
    (residual tokens); a tokenizer's `decode` treats the others as absent.
    """

    values: torch.Tensor
    spec: TokenSpec
    kept: torch.Tensor | None = None
    depths: torch.Tensor | None = None

    def __post_init__(self) -> None:
        import torch

        if tuple(self.values.shape[1:]) != self.spec.shape:
            raise ValueError(
                f"tokens of shape {tuple(self.values.shape)} given; {self.spec.describe()} needs "
                f"(B, {', '.join(map(str, self.spec.shape))})"
            )
        is_float = self.values.is_floating_point()
        if is_float != (self.spec.kind == "continuous"):
            raise ValueError(f"{self.spec.kind} tokens can't have dtype {self.values.dtype}")
        if not is_float and self.values.dtype != torch.long:
            object.__setattr__(self, "values", self.values.long())
        if self.spec.vocab is not None and self.values.numel() and not self.values.is_meta:
            least, most = (int(v) for v in self.values.aminmax())
            if least < 0 or most >= self.spec.vocab:  # a codebook would take them from its end, or bits be dropped
                raise ValueError(f"ids must be in 0..{self.spec.vocab - 1}, got {least} to {most}")

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor | list[int]) -> Tokens:
        """The chosen rows (a slice, a list or a tensor of indices)."""
        return dataclasses.replace(
            self,
            values=self.values[rows],
            kept=None if self.kept is None else self.kept[rows],
            depths=None if self.depths is None else self.depths[rows],
        )

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        return dataclasses.replace(
            self,
            values=self.values.to(device),
            kept=None if self.kept is None else self.kept.to(device),
            depths=None if self.depths is None else self.depths.to(device),
        )

    def first(self, k: int | torch.Tensor) -> Tokens:
        """Keep only the first k positions, of those kept so far: one number, or one a row (B,).

        Raises:
            ValueError: where the tokens' order isn't `coarse_to_fine`, or k is outside 1..L.
        """
        if self.spec.order != "coarse_to_fine":
            raise ValueError(
                f"only coarse-to-fine tokens can be cut to their first k; these are {self.spec.describe()}"
            )
        return dataclasses.replace(self, kept=self._limit(k, self.spec.length, "positions", self.kept))

    def first_depths(self, d: int | torch.Tensor) -> Tokens:
        """Keep only the first d depths of residual tokens, of those kept so far: one number, or one a row (B,).

        Raises:
            ValueError: where the tokens aren't residual, or d is outside 1..depth.
        """
        if self.spec.kind != "residual":
            raise ValueError(f"only residual tokens have depths; these are {self.spec.describe()}")
        return dataclasses.replace(self, depths=self._limit(d, self.spec.depth, "depths", self.depths))

    def _limit(self, k: int | torch.Tensor, top: int, what: str, before: torch.Tensor | None) -> torch.Tensor:
        import torch

        k_B = torch.as_tensor(k, device=self.values.device).expand(len(self))
        if bool((k_B < 1).any()) or bool((k_B > top).any()):
            raise ValueError(f"can keep 1 to {top} {what}, asked for {k_B.tolist()}")
        return k_B if before is None else torch.minimum(k_B, before)


def concatenate(parts: list[Tokens]) -> Tokens:
    """Several batches of the same spec as one, in order.

    Raises:
        ValueError: for an empty list, or parts of different specs.
    """
    import torch

    if not parts:
        raise ValueError("no tokens to concatenate")
    spec = parts[0].spec
    for part in parts:
        if part.spec != spec:
            raise ValueError(f"can't join {part.spec.describe()} to {spec.describe()}")

    def join(name: str, full: int) -> torch.Tensor | None:
        if all(getattr(p, name) is None for p in parts):
            return None
        full_of = [torch.full((len(p),), full, device=p.values.device) for p in parts]
        return torch.cat([f if (v := getattr(p, name)) is None else v for p, f in zip(parts, full_of, strict=True)])

    return Tokens(torch.cat([p.values for p in parts]), spec, join("kept", spec.length), join("depths", spec.depth))
