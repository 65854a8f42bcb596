"""xAR: autoregression over entities X by flow matching (Ren et al., arXiv 2502.20388).

An entity is a group of continuous tokens that is denoised at once: a patch, a cell of k x k neighbours, a
subsample of distant ones, a scale, the whole image. Which tokens form a group, and in which order, is all that
tells them apart; one block-causal transformer serves all five.

Noisy context learning: in training every group has a time of its own, and a group sees the *noisy* groups
before it. `context="clean"` is ordinary teacher forcing, for comparison.

By text (our extension): a caption's tokens stand before the first group, seen by all, their keys and values read once
a draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.distributions import Flow
from genlab.nn.attention import KVCache, attend, axial_rope, turn
from genlab.nn.layers import GatedMLP, Linear, TimestepEmbedding
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Guidance, State
from .conditioned import ConditionConfig, ConditionedGenerator

Keep = Callable[[int], Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]
Entity = Literal["patch", "cell", "subsample", "scale", "image"]


@config
class XARConfig(ConditionConfig):
    """Sizes of an xAR, and its entity."""

    kind: Literal["xar"] = "xar"
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token map."""
    channels: int = 16
    """Channels of a token."""
    text_length: int = 120
    """condition text: tokens of a caption; shorter ones are padded."""
    entity: Entity = "cell"
    """What is predicted at once."""
    size: int = 8
    """cell: its side. subsample: the stride. Others: unused."""
    scales: tuple[int, ...] = ()
    """entity scale: sides of the square maps, coarse to fine, the last being the grid's."""
    dim: int = 768
    """Width."""
    encoder_depth: int = 8
    """Blocks before the middle projection."""
    decoder_depth: int = 8
    """Blocks behind it."""
    heads: int = 12
    """Attention heads."""
    dropout: float = 0.1
    """Of attention's output and the MLP, in training."""
    guidance: float = 2.7
    """Guidance scale where the user names none (the paper: 2.7 base, 2.3 large, 2.2 huge)."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    """How guidance grows over the groups where the user names none: `linear` from none at the first (the paper's)."""
    steps: int = 25
    """Steps a group where the sampler doesn't say (the paper: 40 base, 50 large and huge)."""
    context: Literal["noisy", "clean"] = "noisy"
    """What a group sees of the groups before it while training: noisy (the paper's) or clean."""


def entity_groups(c: XARConfig) -> list[torch.Tensor]:
    """Raster positions of each group, in order of generation (entity scale: positions in its own map).

    Raises:
        ValueError: if the grid can't be cut that way.
    """
    h, w = c.grid
    raster = torch.arange(h * w).view(h, w)
    if c.entity == "image":
        return [raster.flatten()]
    if c.entity == "patch":
        return list(raster.flatten()[:, None])
    if c.entity == "scale":
        if h != w or not c.scales or c.scales[-1] != h or list(c.scales) != sorted(set(c.scales)):
            raise ValueError(f"entity 'scale' needs rising `scales` that end at the grid's side {h}, got {c.scales}")
        return [torch.arange(s * s) for s in c.scales]
    k = c.size
    if k < 1 or h % k or w % k:
        raise ValueError(f"a {h}x{w} grid can't be cut into {c.entity}s of size {k}: choose a size that divides both")
    if c.entity == "cell":
        return list(rearrange(raster, "(a i) (b j) -> (a b) (i j)", i=k, j=k))
    return list(rearrange(raster, "(a i) (b j) -> (i j) (a b)", i=k, j=k))


class Block(nn.Module):
    """Attention and GEGLU, modulated by class and time: pre-norm RMSNorm without gain, adaLN."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        """Args: dim: width. heads: of the attention. dropout: of attention's output and the MLP, in training."""
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.mlp = GatedMLP(dim, int(dim * 8 / 3), act="gelu", dropout=dropout)
        self.ada_lin = nn.Linear(dim, 6 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RgnD, mods, rope, mask, keep=None):
        """One block.

        Args:
            x_RgnD: g groups of n tokens; all tokens of a group share a condition.
            mods: ada_lin's six parts, each (R, g, 1, D), one added to the scales.
            rope: complex factors (g*n, 1, 1, d/2); None turns nothing.
            mask: boolean (R or 1, 1, g*n, L), or None where everything is seen.
            keep: (k, v) -> (all k, all v), the cache; None without one.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = mods
        R, g, n, D = x_RgnD.shape
        qkv = self.qkv(modulated(x_RgnD, shift1, scale1)).view(R, g * n, 3, self.heads, -1)
        qk = qkv[:, :, :2] if rope is None else turn(qkv[:, :, :2], rope)
        q, k, v = (x.transpose(1, 2) for x in (*qk.unbind(2), qkv[:, :, 2]))
        if keep is not None:
            k, v = keep(k, v)
        h = attend(q, k, v, mask).transpose(1, 2).reshape(R, g, n, D)
        x = torch.addcmul(x_RgnD, gate1, self.dropout(self.proj(h)))
        return torch.addcmul(x, gate2, self.dropout(self.mlp(modulated(x, shift2, scale2))))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """RMSNorm without gain (eps 1e-6, in float32), times scale, plus shift: three passes over x."""
    D = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.hypot(norm, norm.new_tensor((1e-6 * D) ** 0.5))  # over sqrt(D), which is put in where it costs nothing
    return torch.addcmul(shift, (x / norm).to(x), scale, value=D**0.5)


def modulation(blocks: Iterable[nn.Module], condition: torch.Tensor) -> torch.Tensor:
    """What each of L blocks does with a condition (…, D): gates, scales (one added) and shifts, (…, L, 6, D)."""
    mods = torch.stack([block.ada_lin(condition).unflatten(-1, (6, -1)) for block in blocks], -3)  # type: ignore[operator]
    mods[..., 2:4, :] += 1
    return mods


def spread(mods_RgL6D: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Modulation of groups of unequal size: a condition a token, (R, T, L, 6, D)."""
    parts = zip(mods_RgL6D.split(1, 1), sizes, strict=True)
    return torch.cat([m.expand(-1, n, -1, -1, -1) for m, n in parts], 1)  # its backward pass is quicker than indexing's


def run(blocks: nn.ModuleList, x_RgnD, mods_RgL6D, rope, mask=None, keep: Keep | None = None, first: int = 0):
    """Some blocks, one after the other; `first`: the number of the first among the layers of mods and keep."""
    for i, block in enumerate(blocks, first):
        x_RgnD = block(x_RgnD, mods_RgL6D[:, :, i, :, None].unbind(2), rope, mask, keep and keep(i))
    return x_RgnD


def collect(held: list[tuple[torch.Tensor, torch.Tensor]]) -> Keep:
    """A `keep` that notes every layer's keys and values."""

    def note(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held.append((k, v))
        return k, v

    return lambda i: note


def behind(held: list[tuple[torch.Tensor, torch.Tensor]]) -> Keep:
    """A `keep` that puts every layer's keys and values behind the noted ones."""
    return lambda i: lambda k, v: (torch.cat([held[i][0].to(k), k], 2), torch.cat([held[i][1].to(v), v], 2))


@dataclass(eq=False)
class XARState(State):
    """Clean tokens so far, and the keys and values of those that the network has read."""

    x_BNC: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cache: KVCache | None = None
    mods: dict[float, torch.Tensor] = field(default_factory=dict)
    """By time: what the blocks do with each distinct condition, (K, L, 6, D)."""
    vectors_KD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The distinct conditions, "nothing" among them."""
    row: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Of each row, conditional and then unconditional: which of the K is its."""
    context_time: float = 0.0
    """The time at which committed groups are read as context: 0 where they are clean."""


class XAR(ConditionedGenerator):
    """See the module's docstring."""

    kind = "xar"
    Config = XARConfig
    predicts = Flow
    config: XARConfig
    order: torch.Tensor
    group_of: torch.Tensor
    rope_cos: torch.Tensor
    rope_sin: torch.Tensor

    def __init__(self, config: XARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        if c.dim % c.heads:
            raise ValueError(f"dim {c.dim} is not a multiple of heads {c.heads}")
        groups = entity_groups(c)
        self.sizes = [len(g) for g in groups]
        self.ends = list(itertools.accumulate(self.sizes))
        self.n_groups, self.N = len(groups), self.ends[-1]
        self.equal = len(set(self.sizes)) == 1

        self.make_condition(c, c.dim, c.text_length)
        self.time_embed = TimestepEmbedding(c.dim)
        self.z_proj = nn.Linear(c.channels, c.dim)
        self.z_proj_ln = nn.RMSNorm(c.dim, eps=1e-6)
        self.encoder_pos = nn.Parameter(torch.zeros(self.N, c.dim))
        self.decoder_pos = nn.Parameter(torch.zeros(self.N, c.dim))
        self.encoder_blocks = nn.ModuleList(Block(c.dim, c.heads, c.dropout) for _ in range(c.encoder_depth))
        self.encoder_norm = nn.RMSNorm(c.dim, eps=1e-6)
        self.decoder_embed = nn.Linear(c.dim, c.dim)
        self.decoder_blocks = nn.ModuleList(Block(c.dim, c.heads, c.dropout) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.RMSNorm(c.dim, eps=1e-6)
        self.pred = nn.Linear(c.dim, c.channels)
        self._initialise()

        # sequence position -> place in its map, group, and rotary angles in units of the finest grid
        sides = c.scales if c.entity == "scale" else (c.grid[1],) * self.n_groups
        stretch = [c.grid[1] / side for side in sides]  # 1 but for coarser scales, whose tokens sit between finer ones
        pairs = list(zip(groups, sides, stretch, strict=True))
        y = torch.cat([(g // side + 0.5) * f - 0.5 for g, side, f in pairs])
        x = torch.cat([(g % side + 0.5) * f - 0.5 for g, side, f in pairs])
        angles = axial_rope(y, x, c.dim // c.heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.register_buffer("order", torch.cat(groups), persistent=False)
        group_of = torch.cat([torch.full((n,), g) for g, n in enumerate(self.sizes)])
        self.register_buffer("group_of", group_of, persistent=False)

    def _initialise(self) -> None:
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        for p in (*tables, self.encoder_pos, self.decoder_pos):
            nn.init.normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens, whatever the entity."""
        return TokenSpec(kind="continuous", grid=self.config.grid, dim=self.config.channels)

    @property
    def default_guidance(self) -> Guidance:
        """The paper's ramp over the groups; a single group takes a constant."""
        schedule = self.config.guidance_schedule if self.n_groups > 1 else "constant"
        return Guidance(scale=self.config.guidance, schedule=schedule)

    # -- tokens in the order of generation ----------------------------------------------------------------

    def pack(self, tokens_BLC: torch.Tensor) -> torch.Tensor:
        """Raster tokens to the sequence (B, N, C); entity scale puts area-averaged coarser maps in front."""
        c = self.config
        if c.entity != "scale":
            return tokens_BLC[:, self.order]
        x = rearrange(tokens_BLC, "b (h w) c -> b c h w", h=c.grid[0])
        return torch.cat([rearrange(F.adaptive_avg_pool2d(x, s), "b c h w -> b (h w) c") for s in c.scales], 1)

    def unpack(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """The sequence back to raster tokens (B, L, C); entity scale gives the finest map."""
        if self.config.entity == "scale":
            return x_BNC[:, -self.sizes[-1] :]
        return torch.empty_like(x_BNC).index_copy_(1, self.order, x_BNC)

    def where(self, group: int) -> torch.Tensor:
        """Raster positions of the group (entity scale: places in the sequence)."""
        span = slice(self.ends[group] - self.sizes[group], self.ends[group])
        return (
            torch.arange(self.N, device=self.order.device)[span] if self.config.entity == "scale" else self.order[span]
        )

    # -- the network --------------------------------------------------------------------------------------

    def modulation(self, vectors: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Every block's (…, L, 6, D) for conditions (…, D) and times (…); time is cut to thousandths, as published."""
        condition = F.silu(vectors + self.time_embed((t.float() * 1000).long()))
        return modulation([*self.encoder_blocks, *self.decoder_blocks], condition)

    def _rope(self, at) -> torch.Tensor:
        return torch.complex(self.rope_cos[at].float(), self.rope_sin[at].float())[:, None, None]

    def forward(self, x_RTC, at, mods, mask=None, keep: Keep | None = None, outputs=None):
        """Velocity of T tokens.

        Args:
            x_RTC: noisy or clean tokens.
            at: their places in the sequence: a slice or (T,) indices.
            mods: `modulation`, (R, g, L, 6, D), where g divides T: tokens share a condition in runs.
            mask: boolean, which keys each token sees; None: all.
            keep: a function of the layer's number, to the block's `keep`.
            outputs: slice of the tokens whose velocity is wanted.
        """
        g, rope, E = mods.shape[1], self._rope(at), len(self.encoder_blocks)
        x = self.z_proj_ln(self.z_proj(x_RTC) + self.encoder_pos[at])
        x = rearrange(x, "r (g n) d -> r g n d", g=g)
        x = run(self.encoder_blocks, x, mods, rope, mask, keep)
        x = self.decoder_embed(self.encoder_norm(x))
        x = x + rearrange(self.decoder_pos[at], "(g n) d -> g n d", g=g)
        x = run(self.decoder_blocks, x, mods, rope, mask, keep, first=E)
        x = rearrange(x, "r g n d -> r (g n) d")
        return self.pred(self.decoder_norm(x if outputs is None else x[:, outputs]))

    def read_text(self, tokens_RPD: torch.Tensor, vectors_RD: torch.Tensor, keep: Keep) -> None:
        """A caption's tokens through the stack, seeing each other alone, for the keys and values that `keep` gets."""
        mods = self.modulation(vectors_RD[:, None], torch.zeros_like(vectors_RD[:, :1]))
        x = run(self.encoder_blocks, self.z_proj_ln(tokens_RPD)[:, None], mods, None, None, keep)
        x = self.decoder_embed(self.encoder_norm(x))
        run(self.decoder_blocks, x, mods, None, None, keep, first=len(self.encoder_blocks))

    def _see(self, condition: Condition, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """A checked condition as vectors (R, D), and by text the mask and `keep` that put its tokens in front."""
        tokens, vectors = self.embed_condition(condition)
        if tokens is None:
            return vectors, mask, None
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.read_text(tokens, vectors, collect(held))
        return vectors, mask if mask is None else F.pad(mask, (self.prefix, 0), value=True), behind(held)

    def velocity(self, x_BNC: torch.Tensor, condition: Condition, t_Bg: torch.Tensor) -> torch.Tensor:
        """All groups at once under the block-causal mask: the training forward of noisy context learning.

        Args:
            x_BNC: noisy tokens in the order of generation.
            condition: checked, B rows.
            t_Bg: each group's time, (B, n_groups).
        """
        group = self.group_of
        mask = (group[:, None] >= group)[None, None] if self.n_groups > 1 else None
        vectors, mask, keep = self._see(condition, mask)
        return self.forward(x_BNC, slice(None), self._grouped(vectors, t_Bg), mask, keep)

    def velocity_given(
        self,
        context_BNC: torch.Tensor,
        context_t_Bg: torch.Tensor,
        x_BNC: torch.Tensor,
        condition: Condition,
        t_Bg: torch.Tensor,
    ) -> torch.Tensor:
        """All groups at once, each seeing its own noisy tokens and another stream's groups before it.

        Args:
            context_BNC: what is shown of the groups before: clean, noisy or drawn.
            context_t_Bg: its time, as the network is told.
            x_BNC: noisy tokens, whose velocity this is.
            condition: checked, B rows.
            t_Bg: their times.
        """
        group, N = self.group_of, self.N
        before, own = group[:, None] > group, group[:, None] == group
        mask = torch.cat([torch.cat([before | own, torch.zeros_like(own)], 1), torch.cat([before, own], 1)])
        vectors, see, keep = self._see(condition, mask[None, None])
        at = torch.arange(N, device=group.device).repeat(2)
        mods = self._grouped(vectors, torch.cat([context_t_Bg, t_Bg], 1))
        return self.forward(torch.cat([context_BNC, x_BNC], 1), at, mods, see, keep, outputs=slice(N, None))

    def _grouped(self, vectors_BD: torch.Tensor, t_Bg: torch.Tensor) -> torch.Tensor:
        mods = self.modulation(vectors_BD[:, None], t_Bg)
        return mods if self.equal else spread(mods, self.sizes * (t_Bg.shape[1] // self.n_groups))

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Flow matching, x_t = (1 - t) x + t eps, target eps - x; t = sigmoid(normal) a sample and group."""
        c = self.config
        x = self.pack(tokens)
        condition = self.drop_condition(labels, noise)
        t_Bg = noise.at(purpose="time").normal(self.n_groups).sigmoid().float()
        eps = noise.at(purpose="noise").normal(self.N, c.channels).float()
        t = t_Bg[:, self.group_of, None]
        x_t, target = (1 - t) * x + t * eps, eps - x
        if c.context == "noisy":
            v = self.velocity(x_t, condition, t_Bg)
        else:
            v = self.velocity_given(x, torch.zeros_like(t_Bg), x_t, condition, t_Bg)
        per_token = ((v.float() - target) ** 2).mean(-1)
        first, last = self.ends[0], self.sizes[-1]
        return {
            "loss": per_token.mean(),
            "loss_first_group": per_token[:, :first].mean().detach(),
            "loss_last_group": per_token[:, -last:].mean().detach(),
        }

    # -- drawing ------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> XARState:
        """An empty state; conditional rows first, then (where guidance needs them) unconditional ones."""
        condition, guidance = self.check_condition(labels), guidance or self.default_guidance
        B, c, P, like = len(condition), self.config, self.prefix, self.pred.weight
        guided = any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups))
        text, vectors, row = self.embed_rows(condition, guided)
        layers, R = c.encoder_depth + c.decoder_depth, len(row)
        cache = None
        if P or self.n_groups > 1:
            cache = KVCache(layers, R, c.heads, P + self.N, c.dim // c.heads, like=like)
        state = XARState(
            labels_B=self.labels_of(condition),
            guidance=guidance,
            n=[0] * B,
            x_BNC=like.new_zeros(B, self.N, c.channels, dtype=torch.float64),
            cache=cache,
            vectors_KD=vectors,
            row=row,
        )
        if text is not None:
            assert cache is not None
            self.read_text(text, vectors[row], cache.keep(slice(0, R)))
            cache.advance(P, slice(0, R))
            state.calls, state.rows_computed = 1, R
        return state

    def _prepare(self, state: XARState, times: Sequence[float]) -> None:
        """Modulation at these times, read from the weights in one go and kept for all groups, as far as memory goes."""
        K, D = state.vectors_KD.shape
        layers = len(self.encoder_blocks) + len(self.decoder_blocks)
        room = (1 << 28) // (layers * 6 * K * D * state.vectors_KD.element_size())  # a quarter of a gigabyte
        new = [t for t in dict.fromkeys(times) if t not in state.mods][: max(0, room - len(state.mods))]
        if new:
            state.mods |= zip(new, self._mods_at(state, new), strict=True)

    def _mods_at(self, state: XARState, times: Sequence[float]) -> torch.Tensor:
        """Modulation of every distinct condition at T times, (T, K, L, 6, D)."""
        t = torch.tensor(times, dtype=torch.float64, device=state.vectors_KD.device)
        return self.modulation(
            state.vectors_KD.expand(len(times), -1, -1), t[:, None].expand(-1, len(state.vectors_KD))
        )

    def _mods(self, state: XARState, t: float, rows: slice) -> torch.Tensor:
        """Modulation at time t, (R, 1, L, 6, D)."""
        self._prepare(state, [t])
        mods = state.mods[t] if t in state.mods else self._mods_at(state, [t])[0]  # no room: large, with many classes
        return mods[state.row[rows], None]

    def _read_context(self, state: XARState, rows: slice, stop: int) -> None:
        """Bring the cache of some rows up to sequence place `stop`, one group at a time."""
        cache = state.cache
        assert cache is not None
        B = len(state.labels_B)
        while (done := cache.lengths[rows][0] - self.prefix) < stop:
            end = next(e for e in self.ends if e > done)
            x = state.x_BNC[:, done:end].to(self.pred.weight)
            x = x.repeat((rows.stop - rows.start) // B, 1, 1)
            mods = self._mods(state, state.context_time, rows)
            self.forward(x, slice(done, end), mods, None, cache.keep(rows), slice(0, 0))
            cache.advance(end - done, rows)
            state.calls += 1
            state.rows_computed += len(x)

    def predict(self, state: XARState, where: torch.Tensor | None = None) -> Flow:
        """The next group's flow. Its first evaluation also reads the group committed last (one call, not two)."""
        g, ticket, B = state.group, state.ticket, len(state.labels_B)
        if g >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        scale, P = state.guidance.at(self.progress(g)), self.prefix
        R = B if scale == 1 else 2 * B
        rows, size, stop = slice(0, R), self.sizes[g], self.ends[g]
        begin, cache, dtype = stop - size, state.cache, self.pred.weight.dtype

        def velocity(x_BGC: torch.Tensor, t: float) -> torch.Tensor:
            state.check(ticket)
            x = x_BGC.to(dtype).repeat(R // B, 1, 1)
            mods, at, mask, keep, fresh = self._mods(state, t, rows), slice(begin, stop), None, None, 0
            if cache is not None and (g > 0 or P):
                previous = begin - self.sizes[g - 1] if g else 0
                for half in (slice(0, B), slice(B, R)) if R > B else (rows,):
                    self._read_context(state, half, previous)
                fresh = begin + P - cache.lengths[0]
                if fresh != begin + P - cache.lengths[R - 1]:  # one half has read it already (guidance began here)
                    self._read_context(state, slice(0, B), begin)
                    self._read_context(state, slice(B, R), begin)
                    fresh = 0
                if fresh:
                    context = state.x_BNC[:, previous:begin].to(dtype).repeat(R // B, 1, 1)
                    x, at = torch.cat([context, x], 1), slice(previous, stop)
                    clean = self._mods(state, state.context_time, rows)
                    mods = torch.cat([clean, mods], 1)
                    mods = mods if fresh == size else spread(mods, (fresh, size))
                    mask = torch.ones(fresh + size, P + stop, dtype=torch.bool, device=x.device)
                    mask[:fresh, P + begin :] = False
                    mask = mask[None, None]
                keep = cache.keep(rows)
            v = self.forward(x, at, mods, mask, keep, slice(fresh, None))
            if fresh:
                assert cache is not None
                cache.advance(fresh, rows)
            state.calls += 1
            state.rows_computed += R
            v = v.double()
            if R == B:
                return v
            c, u = v.chunk(2)
            return u + scale * (c - u)

        shape = (B, size, self.config.channels)
        return Flow(
            velocity, shape, state.x_BNC.device, steps=self.config.steps,
            prepare=lambda times: self._prepare(state, [state.context_time, *times]),
        )  # fmt: skip

    def points(
        self, state: XARState, group: int, x_PGC: torch.Tensor, row_P: torch.Tensor, times: list[float]
    ) -> torch.Tensor:
        """Velocities (P, G, C) of one group at P points in one forward, each of a row and at its own time; float64.

        The context is what the state holds of the groups before; nothing but that is kept in the cache.

        Args:
            state: its state.
            group: which group; those before it must be committed.
            x_PGC: the points.
            row_P: which row of the batch each belongs to.
            times: the time of each.
        """
        B, scale = len(state.labels_B), state.guidance.at(self.progress(group))
        halves, cache, P = 1 if scale == 1 else 2, state.cache, self.prefix
        stop, begin = self.ends[group], self.ends[group] - self.sizes[group]
        for h in range(halves):
            if cache is not None:
                self._read_context(state, slice(h * B, (h + 1) * B), begin)
        rows = torch.cat([row_P + h * B for h in range(halves)])
        known = sorted(set(times))
        which = torch.tensor([known.index(t) for t in times], device=rows.device).repeat(halves)
        mods = torch.stack([self._mods(state, t, slice(0, halves * B)) for t in known])[which, rows]
        keep: Any = None
        if cache is not None and begin + P:

            def keep(i: int) -> Any:
                past = cache.k[i, rows, :, : P + begin], cache.v[i, rows, :, : P + begin]
                return lambda k, v: (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))

        v = self.forward(x_PGC.to(self.pred.weight.dtype).repeat(halves, 1, 1), slice(begin, stop), mods, None, keep)
        state.calls += 1
        state.rows_computed += len(rows)
        v = v.double()
        if halves == 1:
            return v
        c, u = v.chunk(2)
        return u + scale * (c - u)

    def commit(self, state: XARState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next group's tokens (B, G, C).

        Raises:
            ValueError: for an event of another shape, or if all groups are committed.
        """
        g = state.group
        if g >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        stop, size = self.ends[g], self.sizes[g]
        if tuple(event.shape) != (len(state.n), size, self.config.channels):
            wanted = (len(state.n), size, self.config.channels)
            raise ValueError(f"group {g} needs an event of shape {wanted}, got {tuple(event.shape)}")
        state.x_BNC[:, stop - size : stop] = event
        state.n = [g + 1] * len(state.n)
        state.ticket += 1

    def crop(self, state: XARState, n: list[int]) -> None:
        """Forget groups; all rows to one number of groups."""
        if min(n) != max(n) or not 0 <= n[0] <= min(state.n):
            raise ValueError(f"can't crop rows at {state.n} groups to {n}")
        state.n = list(n)
        state.ticket += 1
        if state.cache is not None:
            end = self.prefix + (self.ends[n[0] - 1] if n[0] else 0)
            state.cache.crop([min(end, m) for m in state.cache.lengths])

    def tokens(self, state: XARState) -> Tokens:
        """The finished map (B, L, C), float32."""
        self.require_complete(state)
        return Tokens(self.unpack(state.x_BNC).float(), self.spec)
