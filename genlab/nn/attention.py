"""Attention with a key-value cache that holds a length a row, so that each row can be cropped on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Held = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """Keys and values of every layer for R rows, `lengths[r]` of them valid.

    New entries go behind each row's valid ones; `crop` only shortens lengths, it moves nothing. While all
    rows have one length (plain sampling), reads are views and need no mask.
    """

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, head_dim: int, *, like: torch.Tensor) -> None:
        """Args: layers, rows, heads, capacity, head_dim: sizes. like: gives device and dtype."""
        # zeros: rows shorter than the longest read behind their end, masked, and 0 * NaN would be NaN
        self.k = like.new_zeros(layers, rows, heads, capacity, head_dim)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * rows  # on the host: no device sync to read them
        self.capacity = capacity

    def crop(self, lengths: list[int]) -> None:
        """Keep the first `lengths[r]` entries of row r."""
        if any(not 0 <= n <= old for n, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"can't crop a cache of lengths {self.lengths} to {lengths}")
        self.lengths = list(lengths)

    def advance(self, n: int, rows: slice) -> None:
        """Count n entries that `put` wrote for these rows."""
        start, stop, _ = rows.indices(len(self.lengths))
        self.lengths[start:stop] = [m + n for m in self.lengths[start:stop]]

    def put(
        self, layer: int, k_RHTd: torch.Tensor, v_RHTd: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T entries behind the valid ones; return all keys and values of these rows, up to the longest.

        The lengths stay as they are until `advance` (every layer writes to the same places).
        """
        lengths, T = self.lengths[rows], k_RHTd.shape[2]
        top = max(lengths) + T
        if top > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {top} are needed")
        k, v = self.k[layer, rows], self.v[layer, rows]
        if min(lengths) == max(lengths):
            k[:, :, top - T : top], v[:, :, top - T : top] = k_RHTd, v_RHTd
        else:
            r = torch.arange(len(lengths), device=k.device)[:, None]
            at = torch.tensor(lengths, device=k.device)[:, None] + torch.arange(T, device=k.device)
            k[r, :, at], v[r, :, at] = k_RHTd.transpose(1, 2), v_RHTd.transpose(1, 2)
        return k[:, :, :top], v[:, :, :top]

    def keep(self, rows: slice) -> Callable[[int], Callable[[torch.Tensor, torch.Tensor], Held]]:
        """`put` for these rows, as networks take it: a function of the layer's number."""
        return lambda layer: lambda k, v: self.put(layer, k, v, rows)


def attend(
    q_RHTd: torch.Tensor,
    k_RHLd: torch.Tensor,
    v_RHLd: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention; mask is boolean, true where a key may be seen, and broadcasts to (R, H, T, L).

    A mask of floats is added to the logits.

    With `causal` and no mask, query i sees the keys up to i.
    """
    causal = causal and mask is None
    reduced = q_RHTd.dtype != torch.float32
    if reduced and q_RHTd.device.type == "cpu" and torch.is_grad_enabled() and k_RHLd.shape[2] <= 512:
        # on a CPU with units for bf16 the fused kernel's backward pass is the slow part of training short sequences;
        # in float32 the kernel is several times as fast as what follows
        scores = (q_RHTd @ k_RHLd.transpose(-1, -2)) * (scale or q_RHTd.shape[-1] ** -0.5)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).to(v_RHLd) @ v_RHLd
    return F.scaled_dot_product_attention(q_RHTd, k_RHLd, v_RHLd, attn_mask=mask, scale=scale, is_causal=causal)


def axial_rope(grid_y: torch.Tensor, grid_x: torch.Tensor, head_dim: int, theta: float = 1e4) -> torch.Tensor:
    """Angles of two-dimensional rotary positions: (N, head_dim / 2).

    The first half of a head's channels turns with the row, the second with the column (RoPE: arXiv 2104.09864).

    Args:
        grid_y: rows of N tokens, (N,).
        grid_x: their columns.
        head_dim: channels a head, a multiple of 4.
        theta: base of the frequencies.

    Raises:
        ValueError: if head_dim isn't a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need a head_dim that is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    freqs = theta ** (-torch.arange(0, half, 2, device=grid_y.device).float() / half)
    return torch.cat([grid_y.float()[:, None] * freqs, grid_x.float()[:, None] * freqs], -1)


def rotate(x_RHTd: torch.Tensor, cos_T: torch.Tensor, sin_T: torch.Tensor) -> torch.Tensor:
    """Turn interleaved channel pairs; cos and sin are (T, d/2), or (R, 1, T, d/2)."""
    x1, x2 = x_RHTd.float().unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.stack([x1 * cos_T - x2 * sin_T, x1 * sin_T + x2 * cos_T], -1).flatten(-2)
    return out.to(x_RHTd)


def turn(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """`rotate` by complex factors that broadcast to (..., d/2): one product, where many small calls would count."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)
