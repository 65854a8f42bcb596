"""The transformer that LlamaGen (Sun et al., arXiv 2406.06525) and ELM (Liu et al., arXiv 2410.16257) share.

Llama's blocks over a prefix (the class or the caption) and a raster of tokens: RMSNorm, SwiGLU, no biases,
two-dimensional rotary positions. The published models multiply the queries and keys of the prefix by a rotary
table of zeros, cosines too, so the prefix attends evenly and draws on its values alone; that is kept here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .attention import attend, axial_rope, turn
from .layers import GatedMLP, Linear

Keep = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def swiglu_hidden(dim: int, multiple: int = 256) -> int:
    """Llama's hidden width: 8/3 of the width, rounded up."""
    return -(-int(8 * dim / 3) // multiple) * multiple


class GPTBlock(nn.Module):
    """Attention and SwiGLU, pre-norm."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        """Args: dim, heads, hidden: sizes. dropout: of both branches."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.wqkv = Linear(dim, 3 * dim, bias=False)
        self.wo = Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedMLP(dim, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_RTD: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, causal: bool, keep: Keep | None
    ) -> torch.Tensor:
        """One block; rope is complex and broadcasts to (R, T, 2, heads, d/2), `keep` puts keys and values by."""
        R, T, D = x_RTD.shape
        qkv = self.wqkv(self.attention_norm(x_RTD)).contiguous().view(R, T, 3, self.heads, D // self.heads)
        q, k = turn(qkv[:, :, :2], rope).permute(2, 0, 3, 1, 4)
        v = qkv[:, :, 2].transpose(1, 2)
        if keep is not None:
            k, v = keep(k, v)
        h = attend(q, k, v, mask, causal=causal).transpose(1, 2).reshape(R, T, D)
        if not self.training:  # few small calls count where rows are few
            x = x_RTD + self.wo(h)
            return x + self.mlp(self.ffn_norm(x))
        x = x_RTD + self.dropout(self.wo(h))
        return x + self.dropout(self.mlp(self.ffn_norm(x)))


class GPT(nn.Module):
    """The blocks; embedding and heads are the generator's."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        prefix: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:
        """Make the blocks.

        Args:
            grid: rows and columns of the raster behind the prefix.
            prefix: positions in front of it.
            dim, depth, heads: sizes.
            hidden: width inside the MLP; 0 takes `swiglu_hidden`.
            dropout: of the embeddings and of each branch.

        Raises:
            ValueError: if dim is not a multiple of heads.
        """
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(GPTBlock(dim, heads, hidden or swiglu_hidden(dim), dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        places = torch.arange(grid[0] * grid[1], device="cpu")
        angles = axial_rope(places // grid[1], places % grid[1], dim // heads)
        rope = torch.polar(torch.ones_like(angles), angles)
        # not a buffer: `module.to(bfloat16)` would round it
        self._rope = torch.cat([rope.new_zeros(prefix, rope.shape[1]), rope])

    def forward(
        self,
        x_RTD: torch.Tensor,
        at: torch.Tensor | slice | None = None,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = True,
        keep: Callable[[int], Keep] | None = None,
    ) -> torch.Tensor:
        """Embeddings to the last block's output, before `norm`.

        Args:
            x_RTD: embeddings of T positions.
            at: which positions they are, (T,), (R, T), or a slice; None: the first T.
            mask: boolean, which keys each position sees, (R or 1, 1, T, keys).
            causal: without a mask, each position sees those before it and itself; False: all.
            keep: layer number to that layer's cache.
        """
        if self._rope.device != x_RTD.device:
            self._rope = self._rope.to(x_RTD.device)
        rope = (self._rope[: x_RTD.shape[1]] if at is None else self._rope[at])[..., None, None, :]
        x = self.dropout(x_RTD)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, causal, keep and keep(i))
        return x
