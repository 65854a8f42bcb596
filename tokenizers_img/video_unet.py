"""DynamiCrafter's space-time U-Net (Xing et al., arXiv 2310.12190), in the form that is Divot's de-tokenizer.

Convolutions and attention within frames take turns with convolutions and attention over time. The condition enters by
cross-attention, which has two pairs of keys and values: DynamiCrafter's, for words, reads the first 77 vectors, and
one for images those behind; Divot gives it 125 vectors of one kind, and the split stays.

Written from the paper and the release's layout; maps are (B, C, T, h, w) throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.nn.attention import attend
from genlab.nn.layers import TimestepEmbedding, number


@config
class VideoUNetConfig:
    """Sizes of the U-Net; the defaults are the release's."""

    channels: int = 320
    """At the finest level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Of the channels, a level; each halves the sides."""
    layers: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (0, 1, 2)
    """Levels with attention, within frames and over time."""
    head_dim: int = 64
    """Channels of an attention head."""
    first: int = 77
    """How many of the condition's vectors the first keys and values read; the second ones read the others."""
    stride: int = 3
    """A constant that is embedded beside the time: DynamiCrafter's frame stride, which Divot never changes."""
    dropout: float = 0.1
    """In residual blocks."""


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """In 32 groups; of a clip's map, over time too."""
    return nn.GroupNorm(32, channels, eps=eps)


def frames(x_BCThw: torch.Tensor) -> torch.Tensor:
    """Every frame on its own, (B T, C, h, w)."""
    return rearrange(x_BCThw, "b c t h w -> (b t) c h w")


def clips(x_FChw: torch.Tensor, B: int) -> torch.Tensor:
    """`frames` undone."""
    return rearrange(x_FChw, "(b t) c h w -> b c t h w", b=B)


class _OverTime(nn.Module):
    """Four convolutions over three frames each."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(group_norm(channels) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.convs[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.convs[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = F.silu(norm(h))
            h = conv(self.dropout(h) if i else h)
        return x + h


class _Residual(nn.Module):
    """Convolutions within frames, told the time of the diffusion; then over time."""

    def __init__(self, channels: int, out: int, time: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.emb = nn.Linear(time, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.over_time = _OverTime(out, 0.1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, time_BD: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        B, T = x.shape[0], x.shape[2]
        f = frames(x)
        time = self.emb(F.silu(time_BD)).repeat_interleave(T, 0)
        h = self.conv1(F.silu(self.norm1(f))) + time[..., None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.over_time(clips(self.skip(f) + h, B))


class _Attention(nn.Module):
    """Attention of a sequence to itself, or to a condition of two parts, each with keys and values of its own."""

    def __init__(self, dim: int, heads: int, context: int = 0, first: int = 0) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.q = nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(context or dim, dim, bias=False) for _ in "kv")
        if context:
            self.k2, self.v2 = (nn.Linear(context, dim, bias=False) for _ in "kv")
            self.alpha: nn.Parameter
            number(self, "alpha", 0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        def read(seen: torch.Tensor, keys: nn.Module, values: nn.Module) -> torch.Tensor:
            q, k, v = (
                rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (self.q(x), keys(seen), values(seen))
            )
            return rearrange(attend(q, k, v, None), "b h n d -> b n (h d)")

        if context is None:
            return self.proj(read(x, self.k, self.v))
        first, others = context[:, : self.first], context[:, self.first :]
        h = read(first, self.k, self.v)
        if others.shape[1]:
            h = h + (1 + self.alpha.tanh()) * read(others, self.k2, self.v2)
        return self.proj(h)


class _Transformer(nn.Module):
    """One transformer layer: within frames, with the condition, or (without one) over time at each place."""

    def __init__(self, channels: int, heads: int, head_dim: int, context: int = 0, first: int = 0) -> None:
        super().__init__()
        dim, self.within = heads * head_dim, context > 0
        self.norm = group_norm(channels, eps=1e-6)
        self.enter, self.leave = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = _Attention(dim, heads), _Attention(dim, heads, context, first)
        self.fc1, self.fc2 = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: torch.Tensor, time_BD: torch.Tensor, context_BQC: torch.Tensor) -> torch.Tensor:
        B, _, T, h, w = x.shape
        if self.within:
            y = rearrange(self.norm(frames(x)), "f c h w -> f (h w) c")
            seen = context_BQC.repeat_interleave(T, 0)
        else:
            y, seen = rearrange(self.norm(x), "b c t h w -> (b h w) t c"), None
        y = self.enter(y)
        y = y + self.attn1(self.norm1(y))
        y = y + self.attn2(self.norm2(y), seen)
        value, gate = self.fc1(self.norm3(y)).chunk(2, -1)
        y = self.leave(y + self.fc2(value * F.gelu(gate)))
        if self.within:
            return x + rearrange(y, "(b t) (h w) c -> b c t h w", b=B, h=h)
        return x + rearrange(y, "(b h w) t c -> b c t h w", b=B, h=h)


class _Resize(nn.Module):
    """Half the sides, or twice."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        f = frames(x)
        return clips(self.conv(F.interpolate(f, scale_factor=2, mode="nearest") if self.up else f), len(x))


class VideoUNet(nn.Module):
    """Noisy latents of a clip to the diffusion's target, given context vectors."""

    def __init__(self, c: VideoUNetConfig, *, channels: int, side: int, context: int) -> None:
        """Args: c: sizes. channels, side: of a frame's latents. context: channels of the context's vectors.

        Raises:
            ValueError: for sizes that don't go together.
        """
        super().__init__()
        n, top = 2 ** (len(c.multipliers) - 1), len(c.multipliers) - 1
        if side % n:
            raise ValueError(f"latents of {side}x{side} can't be halved {top} times")
        if c.channels % 32 or c.channels % c.head_dim:
            raise ValueError(f"channels must be a multiple of 32 and of head_dim {c.head_dim}, got {c.channels}")
        self.stride, time = c.stride, 4 * c.channels
        self.embed_t = TimestepEmbedding(time, frequencies=c.channels)
        self.embed_stride = TimestepEmbedding(time, frequencies=c.channels)
        self.enter = nn.Conv2d(channels, c.channels, 3, padding=1)
        self.first = _Transformer(c.channels, 8, c.head_dim)

        def attention(width: int) -> list[nn.Module]:
            heads = width // c.head_dim
            return [_Transformer(width, heads, c.head_dim, context, c.first), _Transformer(width, heads, c.head_dim)]

        width, skips = c.channels, [c.channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(c.multipliers):
            for _ in range(c.layers):
                parts: list[nn.Module] = [_Residual(width, multiplier * c.channels, time, c.dropout)]
                width = multiplier * c.channels
                self.down.append(nn.ModuleList(parts + (attention(width) if level in c.attention_levels else [])))
                skips.append(width)
            if level < top:
                self.down.append(nn.ModuleList([_Resize(width, up=False)]))
                skips.append(width)
        ends = [_Residual(width, width, time, c.dropout) for _ in range(2)]
        self.middle = nn.ModuleList([ends[0], *attention(width), ends[1]])
        for level, multiplier in reversed(list(enumerate(c.multipliers))):
            for i in range(c.layers + 1):
                parts = [_Residual(width + skips.pop(), multiplier * c.channels, time, c.dropout)]
                width = multiplier * c.channels
                parts += attention(width) if level in c.attention_levels else []
                parts += [_Resize(width, up=True)] if level and i == c.layers else []
                self.up.append(nn.ModuleList(parts))
        self.norm, self.leave = group_norm(width), nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, z_BTChw: torch.Tensor, t_B: torch.Tensor, context_BQC: torch.Tensor) -> torch.Tensor:
        """The target, shaped like z, at times t in 0 … 999."""
        B, T = z_BTChw.shape[:2]
        time = self.embed_t(t_B) + self.embed_stride(torch.full_like(t_B, self.stride))

        def run(parts: nn.Module, h: torch.Tensor) -> torch.Tensor:
            assert isinstance(parts, nn.ModuleList)
            for part in parts:
                h = part(h, time, context_BQC)
            return h

        h = self.first(clips(self.enter(z_BTChw.flatten(0, 1)), B), time, context_BQC)
        kept = [h]
        for parts in self.down:
            kept.append(h := run(parts, h))
        h = run(self.middle, h)
        for parts in self.up:
            h = run(parts, torch.cat([h, kept.pop()], 1))
        return self.leave(F.silu(self.norm(frames(h)))).unflatten(0, (B, T))
