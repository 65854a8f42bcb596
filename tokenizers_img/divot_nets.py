"""The networks of Divot (Ge et al., arXiv 2412.04432): frames to tokens, and the denoiser that the tokens condition.

The encoder's parts are the paper's. The denoiser here is a plain space-time transformer: tokens of all frames see each
other, and reach the condition by cross-attention. The release's, DynamiCrafter's U-Net, is in `video_unet`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.nn.attention import attend
from genlab.nn.layers import TimestepEmbedding, modulate


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's GELU, x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to another one."""

    def __init__(self, dim: int, heads: int, *, inner: int = 0, context: int = 0, bias: bool = True) -> None:
        """Args: dim: width. heads: of them. inner: of all heads (0: dim). context: channels of the other sequence."""
        super().__init__()
        inner = inner or dim
        if heads < 1 or inner % heads:
            raise ValueError(f"{inner} channels don't split into {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, inner, bias=bias)
        self.kv = nn.Linear(context or dim, 2 * inner, bias=bias)
        self.proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x_BTD: torch.Tensor, seen_BLD: torch.Tensor) -> torch.Tensor:
        """What x, (B, T, D), reads out of the sequence `seen`: (B, T, D)."""
        q = rearrange(self.q(x_BTD), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(self.kv(seen_BLD), "b l (two h d) -> two b h l d", two=2, h=self.heads)
        return self.proj(rearrange(attend(q, k, v, None), "b h t d -> b t (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block with learned gains and biases."""

    def __init__(self, dim: int, heads: int, *, eps: float, quick: bool = False) -> None:
        """Args: dim, heads: sizes. eps: of the norms. quick: CLIP's GELU in place of the exact one."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = quick_gelu if quick else F.gelu

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to the same."""
        h = self.norm1(x_BTD)
        x = x_BTD + self.attn(h, h)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class TemporalEncoder(nn.Module):
    """Attention over time, apart at each place of the frame (the paper's temporal transformer)."""

    def __init__(self, input_dim: int, output_dim: int, *, width: int, layers: int, heads: int, frames: int) -> None:
        """Args: input_dim, output_dim: channels. width, layers, heads: of the transformer. frames: it reads."""
        super().__init__()
        self.input_proj = nn.Linear(input_dim, width)
        self.position = nn.Parameter(torch.zeros(frames, width))
        self.blocks = nn.ModuleList(Block(width, heads, eps=1e-5, quick=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, output_dim)
        for block in self.blocks:  # each block starts as the identity; the paper also starts output_proj at zero
            nn.init.zeros_(block.attn.proj.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(block.fc2.weight)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, frames, input_dim) to (B, frames, output_dim); B runs over clips and places."""
        x = self.input_proj(x_BTC) + self.position
        for block in self.blocks:
            x = block(x)
        return self.output_proj(self.norm(x))


class _Read(nn.Module):
    """A Perceiver layer: latents attend to the input and to themselves, then an MLP."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, inner=heads * dim_head, bias=False)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BLD: torch.Tensor, latents_BQD: torch.Tensor) -> torch.Tensor:
        h = self.norm2(latents_BQD)
        latents = latents_BQD + self.attn(h, torch.cat([self.norm1(x_BLD), h], 1))
        return latents + self.fc2(F.gelu(self.fc1(self.norm3(latents))))


class Resampler(nn.Module):
    """Perceiver resampler (Flamingo, arXiv 2204.14198): any number of vectors to `queries` of them."""

    def __init__(
        self, input_dim: int, output_dim: int, *, dim: int, depth: int, heads: int, dim_head: int, queries: int
    ) -> None:
        """Args: input_dim, output_dim: channels. dim: inside. depth, heads, dim_head: layers. queries: vectors out."""
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.proj_in = nn.Linear(input_dim, dim)
        self.layers = nn.ModuleList(_Read(dim, heads, dim_head) for _ in range(depth))
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """(B, L, input_dim) to (B, queries, output_dim), normalised."""
        x = self.proj_in(x_BLC)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class SpatialTemporalResampler(nn.Module):
    """Positions in space and time, self-attention over all of them, and the resampler that gives the tokens."""

    def __init__(
        self,
        dim: int,
        *,
        frames: int,
        places: int,
        depth: int,
        heads: int,
        resampler_depth: int,
        resampler_heads: int,
        dim_head: int,
        queries: int,
        output_dim: int,
    ) -> None:
        """Args: dim: width. frames, places: of the input. depth, heads: of the blocks. The others: the resampler's."""
        super().__init__()
        self.space = nn.Parameter(torch.randn(places, dim) * dim**-0.5)
        self.time = nn.Parameter(torch.randn(frames, dim) * dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.resampler = Resampler(
            dim,
            output_dim,
            dim=dim,
            depth=resampler_depth,
            heads=resampler_heads,
            dim_head=dim_head,
            queries=queries,
        )

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """(B, frames x places, dim), frame by frame, to tokens (B, queries, output_dim)."""
        x = x_BND + (self.time[:, None] + self.space).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.resampler(self.norm(x))


class _VideoBlock(nn.Module):
    """Self-attention, cross-attention to the condition, MLP; modulated by the time of the diffusion (adaLN-zero)."""

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.attn, self.cross = Attention(dim, heads), Attention(dim, heads, context=context)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ada = nn.Linear(dim, 6 * dim)

    def forward(self, x_BND: torch.Tensor, context_BQC: torch.Tensor, time_BD: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(time_BD))[:, None].chunk(6, -1)
        h = modulate(_plain_norm(x_BND), shift1, scale1)
        x = x_BND + gate1 * self.attn(h, h)
        x = x + self.cross(self.norm(x), context_BQC)
        return x + gate2 * self.fc2(F.gelu(self.fc1(modulate(_plain_norm(x), shift2, scale2))))


def _plain_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class VideoDiT(nn.Module):
    """Noisy latents of a clip to the diffusion's target, given context vectors (DiT, arXiv 2212.09748).

    Patches of all frames form one sequence; positions are a learned vector a place plus one a frame.
    """

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        patch: int,
        frames: int,
        dim: int,
        depth: int,
        heads: int,
        context: int,
        tube: int = 1,
        aligned: bool = False,
    ) -> None:
        """A denoiser.

        Args:
            channels, side: of a frame's latents.
            patch: side of a patch.
            frames: of a clip.
            dim, depth, heads: of the transformer.
            context: channels of the context's vectors.
            tube: frames that follow one another and share a position.
            aligned: there is one such vector a patch, and it is added to it, too.

        Raises:
            ValueError: for latents that patches don't fill.
        """
        super().__init__()
        if side % patch:
            raise ValueError(f"latents of {side}x{side} can't be cut into patches of side {patch}")
        self.patch, self.tube, self.frames, self.side = patch, tube, frames // tube, side // patch
        self.patch_in = nn.Linear(channels * patch**2 * tube, dim)
        self.space = nn.Parameter(torch.randn(self.side**2, dim) * 0.02)
        self.time = nn.Parameter(torch.randn(frames // tube, dim) * 0.02)
        self.embed_t = TimestepEmbedding(dim)
        self.align = nn.Linear(context, dim) if aligned else None
        self.blocks = nn.ModuleList(_VideoBlock(dim, heads, context) for _ in range(depth))
        self.ada = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, channels * patch**2 * tube)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for block in self.blocks:
            nn.init.zeros_(block.ada.weight)  # type: ignore[union-attr, arg-type]
        for last in (self.ada, self.patch_out):
            nn.init.zeros_(last.weight)

    def forward(self, z_BTChw: torch.Tensor, t_B: torch.Tensor, context_BQC: torch.Tensor) -> torch.Tensor:
        """The target, shaped like z, at times t in 0 … 999."""
        p, k = self.patch, self.tube
        x = rearrange(z_BTChw, "b (t k) c (h p) (w q) -> b t (h w) (k p q c)", k=k, p=p, q=p)
        x = (self.patch_in(x) + self.space + self.time[:, None]).flatten(1, 2)
        if self.align is not None:
            x = x + self.align(context_BQC)
        time = self.embed_t(t_B)
        for block in self.blocks:
            x = block(x, context_BQC, time)
        shift, scale = self.ada(F.silu(time))[:, None].chunk(2, -1)
        x = self.patch_out(modulate(_plain_norm(x), shift, scale))
        return rearrange(
            x, "b (t h w) (k p q c) -> b (t k) c (h p) (w q)", t=self.frames, h=self.side, k=k, p=p, q=p
        )  # fmt: skip
