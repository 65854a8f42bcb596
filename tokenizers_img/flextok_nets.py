"""The two transformers of FlexTok (Bachmann et al., arXiv 2502.13967): latents to registers, registers to a velocity.

Pre-norm blocks without biases or learned gains: LayerNorm, normalised queries and keys, attention scaled by 8 / d
(muP), SwiGLU. No rotary positions: patches carry fixed sines, the decoder's registers learned vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.nn.apg import APG, APGConfig
from genlab.nn.attention import attend
from genlab.nn.layers import GatedMLP, Linear, TimestepEmbedding, modulate

Parts = tuple[torch.Tensor, torch.Tensor]
"""What belongs to patches, and what to registers."""


def norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm of the last axis, without gain or bias; its sums are in float32 whatever x is."""
    return F.layer_norm(x, x.shape[-1:]).to(x)


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


class Rows:
    """Rows of different lengths as one sequence without gaps: first every row's patches, then its registers.

    Whatever treats each place alone sees no padding; only attention spreads the rows out.
    """

    def __init__(self, patches: int, there_Bn: torch.Tensor, copies_B: torch.Tensor) -> None:
        """Args: patches: a row. there_Bn: which registers a row has, its first. copies_B: its last one stands for."""
        B, m = len(there_Bn), int(there_Bn.sum(1).max())
        there = there_Bn[:, :m]
        self.shape = (B, patches + m)
        place = torch.arange(B * (patches + m), device=there.device).view(self.shape)
        self.places = torch.cat([place[:, :patches].flatten(), place[:, patches:][there]])
        self.of_register = there.nonzero()[:, 0]
        # Equal registers stay equal through every block, so one that weighs as much in attention does for all of them
        weight = there.float()
        weight[torch.arange(B, device=there.device), there.sum(1) - 1] = copies_B.float()
        bias = F.pad(weight, (patches, 0), value=1.0).log()  # what is not there weighs nothing
        self.bias = bias[:, None, None] if bool((weight != 1).any()) else None
        self.single = B == 1

    def spread(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The sequence as rows (B, T, D), zeros behind the shorter ones."""
        if self.single:
            return x_ND[None]
        B, T = self.shape
        return x_ND.new_zeros(B * T, x_ND.shape[-1]).index_copy(0, self.places, x_ND).view(B, T, -1)

    def gather(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """`spread` undone."""
        return x_BTD[0] if self.single else x_BTD.flatten(0, 1).index_select(0, self.places)


class Block(nn.Module):
    """Attention and SwiGLU."""

    def __init__(self, dim: int, head_dim: int) -> None:
        """Args: dim: width. head_dim: of a head."""
        super().__init__()
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)
        self.mlp = GatedMLP(dim, int(2 * 4 * dim / 3), bias=False)

    def attention(self, qkv_RTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention, queries, keys and values (R, T, 3 D) to (R, T, D)."""
        qkv = qkv_RTD.unflatten(-1, (3, self.heads, self.head_dim))
        q, k = norm(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)
        h = attend(q, k, qkv[:, :, 2].transpose(1, 2), mask, scale=8 / self.head_dim)
        return h.transpose(1, 2).flatten(2)

    def forward(self, x_RTD: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One block; mask is boolean."""
        x = x_RTD + self.proj(self.attention(self.qkv(norm(x_RTD)), mask))
        return x + self.mlp(norm(x))


class ModulatedBlock(Block):
    """The same over `Rows`, modulated by time (adaLN-zero), each kind of token on its own."""

    def __init__(self, dim: int, head_dim: int, kinds: int) -> None:
        """Args: dim, head_dim: sizes. kinds: of tokens that are modulated apart."""
        super().__init__(dim, head_dim)
        self.kinds = kinds
        self.ada = nn.Linear(dim, kinds * 6 * dim)

    def modulations(self, time_RD: torch.Tensor) -> torch.Tensor:
        """Both gates, then shift and scale before attention and before the MLP: (6, R, kinds, D)."""
        return rearrange(self.ada(time_RD), "r (kinds six d) -> six r kinds d", kinds=self.kinds, six=6)

    def forward(self, parts: Parts, mods: list[Parts], rows: Rows) -> Parts:  # type: ignore[override]
        """Patches (B, P, D) and registers (S, D); mods are six, each for both."""
        gate1, gate2, shift1, scale1, shift2, scale2 = mods
        h = rows.spread(self.qkv(join(modulated(parts, shift1, scale1))))
        parts = add(parts, gate1, self.proj(rows.gather(self.attention(h, rows.bias))))
        return add(parts, gate2, self.mlp(join(modulated(parts, shift2, scale2))))


def modulated(parts: Parts, shifts: Parts, scales: Parts) -> Parts:
    """Adaptive normalisation of both parts."""
    x, y = (modulate(norm(part), shift, scale) for part, shift, scale in zip(parts, shifts, scales, strict=True))
    return x, y


def join(parts: Parts) -> torch.Tensor:
    """Patches and registers as one sequence (N, D)."""
    return torch.cat([parts[0].flatten(0, 1), parts[1]])


def add(parts: Parts, gates: Parts, h_ND: torch.Tensor) -> Parts:
    """Both parts plus what their gates let through of a sequence."""
    hs = h_ND.split([parts[0].shape[:2].numel(), len(parts[1])])
    x, y = (torch.addcmul(x, gate, h.view_as(x)) for x, gate, h in zip(parts, gates, hs, strict=True))
    return x, y


def start_small(module: nn.Module) -> None:
    """Xavier for matrices, zero for biases and for all that modulates."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for m in module.modules():
        if isinstance(m, ModulatedBlock):
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
        x = self.patch_in(patchify(z_BChw, self.patch).to(self.patch_in.weight.dtype)) + self.positions
        x = torch.cat([x, self.registers.to(x).expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x, self.mask)
        return self.out(norm(x[:, -len(self.registers) :]))


class Reader(nn.Module):
    """All kept codes at once to one vector and to a draft of the latents."""

    def __init__(self, codes: int, hidden: int, dim: int, patches: int, channels: int) -> None:
        """Args: codes: numbers that are read. hidden: width. dim: of the vector. patches, channels: of the draft."""
        super().__init__()
        self.patches = patches
        self.read = nn.Sequential(nn.Linear(codes, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.vector = nn.Linear(hidden, dim)
        self.draft = nn.Linear(hidden, patches * channels)
        self.draft_in = nn.Linear(channels, dim, bias=False)

    def forward(self, codes_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, dim) and patches (B, P, channels)."""
        h = self.read(codes_BN)
        return self.vector(h), self.draft(h).unflatten(1, (self.patches, -1))


class Given(NamedTuple):
    """What a decoder is given beside noisy latents."""

    registers_SD: torch.Tensor
    """All rows' registers, one after the other."""
    rows: Rows
    """Which row each is in."""
    vector_BD: torch.Tensor | None = None
    """A row's codes in one vector, where the decoder drafts."""
    draft_BChw: torch.Tensor | None = None
    """The latents as that vector has them."""


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
        draft: int = 0,
        precondition: bool = False,
    ) -> None:
        """Args: as `Encoder`; code_dim: channels of a code. The others: see `FlexTokConfig`."""
        super().__init__()
        self.precondition = precondition
        self.patch, self.side, self.kinds = patch, side, kinds
        self.codes_in = nn.Linear(code_dim, dim)
        self.reader = Reader(registers * code_dim, draft, dim, side**2, channels * patch**2) if draft else None
        self.register_positions = nn.Parameter(torch.randn(registers, dim) * 0.02)
        self.absent = nn.Parameter(torch.randn(dim) * 0.02)
        self.null = nn.Parameter(torch.randn(dim) * 0.02) if learned_null else None
        self.patch_in = nn.Linear(channels * patch**2, dim)
        self.time = TimestepEmbedding(dim, max_period=256)
        self.blocks = nn.ModuleList(ModulatedBlock(dim, head_dim, kinds) for _ in range(depth))
        self.ada_out = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, channels * patch**2)
        start_small(self)
        for layer in (self.ada_out, self.patch_out):
            nn.init.zeros_(layer.weight)
        self.register_buffer("positions", sincos_2d(side, dim), persistent=False)

    def condition(self, codes_BnC: torch.Tensor, kept_B: torch.Tensor, free_B: torch.Tensor | None = None) -> Given:
        """Registers of codes, the rows they are in, and their vector.

        Those behind a row's first kept_B[b] are one learned vector, and only one of them is there; so is the one vector
        in every register's place that stands for "no picture in particular", for guidance, in rows where free_B.
        """
        codes = codes_BnC.to(self.codes_in.weight)
        x = self.codes_in(codes) + self.register_positions
        B, n = x.shape[:2]
        number = torch.arange(n, device=x.device)
        x = torch.where((number >= kept_B[:, None])[..., None], self.absent.to(x), x)
        if free_B is not None:
            null = torch.zeros_like(self.absent) if self.null is None else self.null
            x = torch.where(free_B[:, None, None], null.to(x), x)
            kept_B = kept_B.masked_fill(free_B, 0)
        vector = draft = None
        if self.reader is not None:
            vector, patches = self.reader((codes * (number < kept_B[:, None])[..., None]).flatten(1))
            draft = unpatchify(patches, self.patch, self.side)
        there = number < kept_B[:, None] + 1
        rows = Rows(self.side**2, there, (n - kept_B).clamp_min(1))
        return Given(x.flatten(0, 1).index_select(0, there.flatten().nonzero()[:, 0]), rows, vector, draft)

    def modulations(self, t: torch.Tensor, vector_RD: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What times (R,) in [0, 1], with their rows' vectors, do to each block, (6, R, kinds, D), and to the output,
        (2, R, D); last, the shares (2, R) of the noisy latents and of the network in the velocity.
        """
        time = self.time(1000 * t)
        time = F.silu(time if vector_RD is None else time + vector_RD)
        blocks: list[torch.Tensor] = [block.modulations(time) for block in self.blocks]  # type: ignore[operator]
        return [*blocks, torch.stack(self.ada_out(time).chunk(2, -1)), self.shares(t)]

    def shares(self, t: torch.Tensor) -> torch.Tensor:
        """How much of the velocity the noisy latents are, and how much the network, (2, R).

        Of latents and noise of unit variance, x_t has the variance d = t^2 + (1 - t)^2, the best linear guess of
        eps - z is (2 t - 1) / d of it, and what is left of eps - z has the variance 1 / d.
        """
        if not self.precondition:
            return torch.stack([torch.zeros_like(t), torch.ones_like(t)])
        d = t.square() + (1 - t).square()
        return torch.stack([(2 * t - 1) / d, d.rsqrt()])

    def forward(
        self, x_BChw: torch.Tensor, given: Given, mods: list[torch.Tensor], hidden: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity (B, C, h, w), and the patches (B, P, D) behind block number `hidden`.

        Args:
            x_BChw: noisy latents.
            given: what `condition` gives.
            mods: what `modulations` gives, of B times or of one for all.
            hidden: which block to tap; -1: none.
        """
        rows = given.rows
        like = given.registers_SD
        patches = self.patch_in(patchify(x_BChw, self.patch).to(like)) + self.positions.to(like)
        if self.reader is not None and given.draft_BChw is not None:
            patches = patches + self.reader.draft_in(patchify(given.draft_BChw, self.patch))
        parts: Parts = (patches, given.registers_SD)
        tapped = None
        for i, block in enumerate(self.blocks):
            # patches take the first modulation, registers the last
            first, last = mods[i][:, :, :1], mods[i][:, :, -1]
            if last.shape[1] > 1:
                last = last.index_select(1, rows.of_register)
            parts = block(parts, list(zip(first, last, strict=True)), rows)
            tapped = parts[0] if i == hidden else tapped
        shift, scale = mods[-2][:, :, None]
        v = unpatchify(self.patch_out(modulate(norm(parts[0]), shift, scale)), self.patch, self.side)
        if self.precondition:
            of_x, of_v = mods[-1][..., None, None, None]
            v = of_x * x_BChw + of_v * v
        return v.to(x_BChw.dtype), tapped

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
        B, n = codes_BnC.shape[:2]
        kept_B = torch.full((B,), n) if kept_B is None else kept_B
        kept_B = kept_B.to(codes_BnC.device)
        given = self.condition(codes_BnC, kept_B)
        free = self.condition(codes_BnC, kept_B, torch.ones_like(kept_B, dtype=torch.bool)) if guidance != 1 else None
        guide = APG(apg)
        x = start_BChw.float()  # many small steps are summed, whatever the network's own arithmetic
        times = 1 - torch.arange(steps, device=x.device) / steps
        shared = self.modulations(times) if given.vector_BD is None else None

        def velocity(given: Given, i: int) -> torch.Tensor:
            if shared is not None:
                return self(x, given, [m[:, i : i + 1] for m in shared])[0]
            return self(x, given, self.modulations(times[i].expand(B), given.vector_BD))[0]

        for i in range(steps):
            v = velocity(given, i)
            if free is not None:
                v = guide(v, velocity(free, i), guidance)
            x = x - v / steps
        return x
