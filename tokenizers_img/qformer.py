"""SEED's networks: a frozen image encoder, and the causal Q-Former that reads it (Ge et al., arXiv 2310.01218, sec. 3).

The Q-Former is BLIP-2's (Li et al., arXiv 2301.12597): a BERT of learned queries, normalised behind each residual,
that looks at the image in every second layer. SEED makes its self-attention causal, so that query i knows of the
queries up to i, as a language model that reads its codes from left to right does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.nn.attention import attend
from genlab.nn.lite0 import load_lite0
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer

LITE0 = "efficientnet-lite0"
LayerNorm = partial(nn.LayerNorm, eps=1e-12)  # BERT's


class Attention(nn.Module):
    """BERT's attention with its residual: LayerNorm(x + out(attend(x, to)))."""

    def __init__(self, dim: int, heads: int, context_dim: int, dropout: float) -> None:
        """Args: dim, heads: sizes. context_dim: width of what is looked at. dropout: behind the output."""
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(context_dim, dim), nn.Linear(context_dim, dim)
        self.out, self.norm, self.dropout = nn.Linear(dim, dim), LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x_BND: torch.Tensor, to_BMC: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """(B, N, D) looks at (B, M, C); causal: position i at those up to i."""
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=self.heads)
            for part in (self.query(x_BND), self.key(to_BMC), self.value(to_BMC))
        )
        y = rearrange(attend(q, k, v, None, causal=causal), "b h n d -> b n (h d)")
        return self.norm(x_BND + self.dropout(self.out(y)))


class Layer(nn.Module):
    """Self-attention, where there is one cross-attention, and a feed-forward network."""

    def __init__(self, dim: int, heads: int, hidden: int, context_dim: int | None, dropout: float) -> None:
        """Args: as `QFormer`; context_dim None: no cross-attention."""
        super().__init__()
        self.attention = Attention(dim, heads, dim, dropout)
        self.cross = None if context_dim is None else Attention(dim, heads, context_dim, dropout)
        self.fc1, self.fc2, self.norm = nn.Linear(dim, hidden), nn.Linear(hidden, dim), LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: torch.Tensor, context_BMC: torch.Tensor, causal: bool) -> torch.Tensor:
        """One layer."""
        x = self.attention(x_BND, x_BND, causal)
        if self.cross is not None:
            x = self.cross(x, context_BMC)
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class QFormer(nn.Module):
    """Learned queries that read a sequence of features."""

    def __init__(
        self,
        *,
        queries: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        context_dim: int,
        cross_every: int = 2,
        causal: bool,
        dropout: float = 0.0,
    ) -> None:
        """Make one.

        Args:
            queries: how many.
            dim: width.
            depth: layers.
            heads: attention heads.
            hidden: width of the feed-forward networks.
            context_dim: width of the features.
            cross_every: layers 0, cross_every, 2 cross_every, … look at the features.
            causal: query i sees the queries up to i; else all see all.
            dropout: behind every residual branch, as BERT's.

        Raises:
            ValueError: if dim isn't a multiple of heads.
        """
        super().__init__()
        if dim % heads:
            raise ValueError(f"a Q-Former's width {dim} is no multiple of its {heads} heads")
        self.causal = causal
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.norm, self.dropout = LayerNorm(dim), nn.Dropout(dropout)
        contexts = [context_dim if i % cross_every == 0 else None for i in range(depth)]
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, context, dropout) for context in contexts)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, context_BMC: torch.Tensor, queries_BND: torch.Tensor | None = None) -> torch.Tensor:
        """What the queries (its own by default) read out of features (B, M, C): (B, N, D)."""
        x = self.queries.expand(len(context_BMC), -1, -1) if queries_BND is None else queries_BND
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, context_BMC, self.causal)
        return x


def vit_blocks(dim: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """Plain pre-norm blocks as of a vision transformer, full attention, no dropout; (B, N, D) to the same."""
    block = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


class FrozenEncoder(Tokenizer):
    """Images to the features of a frozen network, a sequence (B, M, F); it only encodes, so that its cache serves.

    A convolutional network's map is read row by row, a vision transformer's output with its class token.
    """

    kind = "frozen_encoder"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, name: str, *, size: int, image_size: int, args: dict[str, Any] | None = None, pretrained: bool = True
    ) -> None:
        """Load the network.

        Args:
            name: the packaged `efficientnet-lite0`; a timm model's name; or, with a slash in it, a folder or Hub id of
                a vision model that transformers' `AutoModel` reads.
            size: side of the images it is shown.
            image_size: side of the images that `encode` takes.
            args: of timm's `create_model`, where the sizes are not the name's.
            pretrained: False leaves a timm model's weights random: they come from a checkpoint.
        """
        super().__init__({"name": name, "size": size, "args": args or {}})
        if "/" in name:
            from transformers import AutoImageProcessor, AutoModel

            net: Any = AutoModel.from_pretrained(name)
            net, processor = getattr(net, "vision_model", net), AutoImageProcessor.from_pretrained(name)
            mean, std = processor.image_mean, processor.image_std
        else:
            import timm

            net = load_lite0() if name == LITE0 else timm.create_model(name, pretrained=pretrained, **(args or {}))
            mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        for part in ("fc_norm", "head"):  # a vision transformer's end, which features never pass
            if hasattr(net, part):
                setattr(net, part, nn.Identity())
        # channels last: a convolutional network is then twice as quick on a CPU
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.size, self.image_size = size, image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Frozen: it stays in evaluation mode."""
        return super().train(False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, M, F) of images in [-1, 1]."""
        x = F.interpolate(images.float(), self.size, mode="bicubic", align_corners=False, antialias=True)
        x = (((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = x.to(next(self.net.parameters()).dtype)
        if hasattr(self.net, "forward_features"):
            y = self.net.forward_features(x)
        else:
            y = self.net(pixel_values=x).last_hidden_state
        return rearrange(y, "b c h w -> b (h w) c") if y.ndim == 4 else y

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Features in half precision, which is how they are kept on disk."""
        y = self.features(images).half()
        size = (self.image_size, self.image_size)
        return Tokens(y, TokenSpec(kind="continuous", grid=(y.shape[1],), dim=y.shape[2], image_size=size))
