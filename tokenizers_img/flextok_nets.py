"""The two transformers of FlexTok (Bachmann et al., arXiv 2502.13967): latents to registers, registers to a velocity.

Pre-norm blocks without biases or learned gains: LayerNorm, normalised queries and keys, attention scaled by 8 / d
(muP), SwiGLU. No rotary positions: patches carry fixed sines, the decoder's registers learned vectors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.nn.apg import APG, APGConfig
from genlab.nn.attention import attend
from genlab.nn.layers import GatedMLP, Linear, TimestepEmbedding, modulate


def norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm of the last axis, without gain or bias, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x)


def sincos_2d(side: int, dim: int) -> torch.Tensor:
    """Fixed positions (side^2, dim) of a raster: sines and cosines of the row, then of the column.

    Raises:
        ValueError: if dim isn't a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"two-dimensional sine positions need a width that is a multiple of 4, got {dim}")
    freqs = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * freqs
    row, column = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1).float()


def patchify(z_BChw: torch.Tensor, p: int) -> torch.Tensor:
    """A map to its p x p patches (B, P, p p C), raster order; inside, row, column, channel."""
    return rearrange(z_BChw, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x_BPC: torch.Tensor, p: int, side: int) -> torch.Tensor:
    """`patchify` undone: (B, C, side p, side p)."""
    return rearrange(x_BPC, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)


class Block(nn.Module):
    """Attention and SwiGLU; with `kinds`, modulated by time (adaLN-zero), each kind of token on its own."""

    def __init__(self, dim: int, head_dim: int, kinds: int = 0) -> None:
        """Args: dim: width. head_dim: of a head. kinds: of tokens that are modulated apart; 0: no modulation."""
        super().__init__()
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)
        self.mlp = GatedMLP(dim, int(2 * 4 * dim / 3), bias=False)
        self.ada = nn.Linear(dim, kinds * 6 * dim) if kinds else None

    def attention(self, x_RTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of normalised input."""
        R, T, D = x_RTD.shape
        qkv = self.qkv(x_RTD).view(R, T, 3, self.heads, self.head_dim)
        q, k = norm(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)
        h = attend(q, k, qkv[:, :, 2].transpose(1, 2), mask, scale=8 / self.head_dim)
        return self.proj(h.transpose(1, 2).reshape(R, T, D))

    def forward(
        self, x_RTD: torch.Tensor, mask: torch.Tensor | None = None, mods: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One block; mask is boolean, or added to the logits; mods are six parts, (R or 1, T, D) each."""
        if mods is None:
            x = x_RTD + self.attention(norm(x_RTD), mask)
            return x + self.mlp(norm(x))
        gate1, gate2, shift1, scale1, shift2, scale2 = mods
        x = x_RTD + gate1 * self.attention(modulate(norm(x_RTD), shift1, scale1), mask)
        return x + gate2 * self.mlp(modulate(norm(x), shift2, scale2))


def start_small(module: nn.Module) -> None:
    """Xavier for matrices, zero for biases and for all that modulates."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for m in module.modules():
        if isinstance(m, Block) and m.ada is not None:
            nn.init.zeros_(m.ada.weight)


class Encoder(nn.Module):
    """Latents to registers. Patches see patches; a register sees all patches, the registers before it and itself."""

    positions: torch.Tensor
    mask: torch.Tensor

    def __init__(
        self, *, channels: int, side: int, patch: int, registers: int, dim: int, depth: int, head_dim: int, out: int
    ) -> None:
        """Args: channels, side: of the latents, in patches. patch: its side. out: channels a register is mapped to."""
        super().__init__()
        self.patch = patch
        self.patch_in = nn.Linear(channels * patch**2, dim)
        self.registers = nn.Parameter(torch.randn(registers, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, head_dim) for _ in range(depth))
        self.out = nn.Linear(dim, out)
        start_small(self)
        P, T = side**2, side**2 + registers
        mask = torch.ones(T, T, dtype=torch.bool)
        mask[:, P:] = False
        mask[P:, P:] = torch.ones(registers, registers, dtype=torch.bool).tril()
        self.register_buffer("mask", mask[None, None], persistent=False)
        self.register_buffer("positions", sincos_2d(side, dim), persistent=False)

    def forward(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, registers, out), before quantisation."""
        x = self.patch_in(patchify(z_BChw, self.patch)) + self.positions
        x = torch.cat([x, self.registers.to(x).expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.out(norm(x[:, -len(self.registers) :]))


class Decoder(nn.Module):
    """Codes, a noisy latent and its time to a velocity; full attention over patches and registers."""

    positions: torch.Tensor

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        patch: int,
        registers: int,
        dim: int,
        depth: int,
        head_dim: int,
        code_dim: int,
        kinds: int,
        learned_null: bool,
    ) -> None:
        """Args: as `Encoder`; code_dim: channels of a code. kinds, learned_null: see `FlexTokConfig`."""
        super().__init__()
        self.patch, self.side, self.kinds = patch, side, kinds
        self.codes_in = nn.Linear(code_dim, dim)
        self.register_positions = nn.Parameter(torch.randn(registers, dim) * 0.02)
        self.absent = nn.Parameter(torch.randn(dim) * 0.02)
        self.null = nn.Parameter(torch.randn(dim) * 0.02) if learned_null else None
        self.patch_in = nn.Linear(channels * patch**2, dim)
        self.time = TimestepEmbedding(dim, max_period=256)
        self.blocks = nn.ModuleList(Block(dim, head_dim, kinds) for _ in range(depth))
        self.ada_out = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, channels * patch**2)
        start_small(self)
        for layer in (self.ada_out, self.patch_out):
            nn.init.zeros_(layer.weight)
        self.register_buffer("positions", sincos_2d(side, dim), persistent=False)

    def condition(self, codes_BnC: torch.Tensor, kept_B: torch.Tensor) -> torch.Tensor:
        """Registers (B, n, D) of codes; those behind a row's first kept_B[b] are one learned vector."""
        x = self.codes_in(codes_BnC.to(self.codes_in.weight)) + self.register_positions
        gone = torch.arange(x.shape[1], device=x.device) >= kept_B[:, None]
        return torch.where(gone[..., None], self.absent.to(x), x)

    def no_condition(self, registers_BnD: torch.Tensor) -> torch.Tensor:
        """What stands for "no picture in particular", for guidance: one vector in every register's place."""
        null = torch.zeros_like(self.absent) if self.null is None else self.null
        return null.to(registers_BnD).expand_as(registers_BnD)

    def modulations(self, t: torch.Tensor) -> list[torch.Tensor]:
        """What times (R,) in [0, 1] do to each block, (R, kinds, 6 D), and to the output, (R, 2 D)."""
        time = F.silu(self.time(1000 * t))
        blocks: list[torch.Tensor] = [block.ada(time).unflatten(-1, (self.kinds, -1)) for block in self.blocks]  # type: ignore[operator]
        return [*blocks, self.ada_out(time)]

    def forward(
        self,
        x_BChw: torch.Tensor,
        registers_BmD: torch.Tensor,
        mods: list[torch.Tensor],
        copies: int = 1,
        hidden: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity (B, C, h, w), and the patches (B, P, D) behind block number `hidden`.

        Args:
            x_BChw: noisy latents.
            registers_BmD: what `condition` gives.
            mods: what `modulations` gives, of B times or of one for all.
            copies: how many registers the last one stands for. Equal registers stay equal through every block, so one
                that weighs as much in attention does for all of them.
            hidden: which block to tap; -1: none.
        """
        P, m = self.side**2, registers_BmD.shape[1]
        x = torch.cat([self.patch_in(patchify(x_BChw, self.patch)) + self.positions, registers_BmD], 1)
        mask, tapped = None, None
        if copies > 1:
            mask = x.new_zeros(1, 1, 1, P + m)
            mask[..., -1] = math.log(copies)  # added to the logits
        for i, block in enumerate(self.blocks):
            # patches take the first modulation, registers the last
            first, last = mods[i][:, :1], mods[i][:, -1:]
            each = torch.cat([first.expand(-1, P, -1), last.expand(-1, m, -1)], 1)
            x = block(x, mask, list(each.chunk(6, -1)))
            tapped = x[:, :P] if i == hidden else tapped
        shift, scale = mods[-1][:, None].chunk(2, -1)
        v = self.patch_out(modulate(norm(x[:, :P]), shift, scale))
        return unpatchify(v, self.patch, self.side), tapped

    def draw(
        self,
        codes_BnC: torch.Tensor,
        kept_B: torch.Tensor | None,
        start_BChw: torch.Tensor,
        *,
        steps: int,
        guidance: float,
        apg: APGConfig,
    ) -> torch.Tensor:
        """Latents (B, C, h, w) that the flow carries its start to: t = 1 to 0 in even Euler steps.

        Args:
            codes_BnC: codes.
            kept_B: how many of a row's codes count; None: all.
            start_BChw: noise.
            steps: how many.
            guidance: its scale; 1 is unguided.
            apg: how it is applied.

        Raises:
            ValueError: for fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        n = codes_BnC.shape[1]
        kept_B = torch.full((len(codes_BnC),), n) if kept_B is None else kept_B
        registers = self.condition(codes_BnC, kept_B.to(codes_BnC.device))
        free = self.no_condition(registers[:, :1])
        # behind the longest row's kept registers all are one vector: the first of them stands for the others
        most = int(kept_B.max())
        registers, copies = registers[:, : most + 1], max(1, n - most)
        guide, x = APG(apg), start_BChw.to(registers)
        mods = self.modulations(1 - torch.arange(steps, device=x.device) / steps)
        for i in range(steps):
            now = [m[i : i + 1] for m in mods]
            v, _ = self(x, registers, now, copies)
            if guidance != 1:
                v = guide(v, self(x, free, now, n)[0], guidance)
            x = x - v / steps
        return x
