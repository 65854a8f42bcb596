"""xAR: autoregression over entities X by flow matching (Ren et al., arXiv 2502.20388).

An entity is a group of continuous tokens that is denoised at once: a patch, a cell of k x k neighbours, a
subsample of distant ones, a scale, the whole image. Which tokens form a group, and in which order, is all that
tells them apart; one block-causal transformer serves all five.

Noisy context learning: in training every group has a time of its own, and a group sees the *noisy* groups
before it. `context="clean"` is ordinary teacher forcing, for comparison.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.distributions import Flow
from genlab.nn.attention import KVCache, attend, axial_rope, rotate
from genlab.nn.layers import GatedMLP, TimestepEmbedding, modulate
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Generator, Guidance, State

Entity = Literal["patch", "cell", "subsample", "scale", "image"]


@config
class XARConfig:
    """Sizes of an xAR, and its entity."""

    kind: Literal["xar"] = "xar"
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token map."""
    channels: int = 16
    """Channels of a token."""
    num_classes: int = 1000
    """Classes; one more row of the table stands for "no class"."""
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
    label_drop: float = 0.1
    """Share of training labels replaced by "no class"."""
    guidance: float = 2.7
    """Guidance scale where the user names none (the paper: 2.7 base, 2.3 large, 2.2 huge)."""
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
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = GatedMLP(dim, int(dim * 8 / 3), act="gelu", dropout=dropout)
        self.ada_lin = nn.Linear(dim, 6 * dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RgnD, mods, rope, mask, keep=None):
        """One block.

        Args:
            x_RgnD: g groups of n tokens; all tokens of a group share a condition.
            mods: ada_lin's six parts, each (R, g, 1, D).
            rope: cos and sin, (g*n, d/2).
            mask: boolean (R or 1, 1, g*n, L), or None where everything is seen.
            keep: (k, v) -> (all k, all v), the cache; None without one.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = mods
        R, g, n, D = x_RgnD.shape
        h = modulate(F.rms_norm(x_RgnD, (D,), eps=1e-6), shift1, scale1)
        q, k, v = rearrange(self.qkv(h), "r g n (three h d) -> three r h (g n) d", three=3, h=self.heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if keep is not None:
            k, v = keep(k, v)
        h = rearrange(attend(q, k, v, mask), "r h (g n) d -> r g n (h d)", g=g)
        x = x_RgnD + gate1 * self.dropout(self.proj(h))
        h = modulate(F.rms_norm(x, (D,), eps=1e-6), shift2, scale2)
        return x + gate2 * self.dropout(self.mlp(h))


@dataclass(eq=False)
class XARState(State):
    """Clean tokens so far, and the keys and values of those that the network has read."""

    x_BNC: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cache: KVCache | None = None
    mods: dict[float, list[torch.Tensor]] = field(default_factory=dict)
    classes: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    row_class: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class XAR(Generator):
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
        self.n_groups, self.num_classes, self.N = len(groups), c.num_classes, self.ends[-1]
        self.equal = len(set(self.sizes)) == 1

        self.class_emb = nn.Embedding(c.num_classes + 1, c.dim)
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
        for p in (self.class_emb.weight, self.encoder_pos, self.decoder_pos):
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
        return Guidance(scale=self.config.guidance, schedule="linear" if self.n_groups > 1 else "constant")

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

    def modulation(self, labels: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
        """Every block's (…, 6 D) for classes and times of one shape; time is cut to thousandths, as published."""
        time = self.time_embed((t.float() * 1000).long())
        condition = F.silu(self.class_emb(labels) + time)
        return [block.ada_lin(condition) for block in (*self.encoder_blocks, *self.decoder_blocks)]

    def forward(self, x_RTC, at, mods, mask=None, keep=None, outputs=None):
        """Velocity of T tokens.

        Args:
            x_RTC: noisy or clean tokens.
            at: their places in the sequence: a slice or (T,) indices.
            mods: `modulation` of each block, (R, g, 6 D), where g divides T: tokens share a condition in runs.
            mask: boolean, which keys each token sees; None: all.
            keep: a function of the layer's number, to the block's `keep`.
            outputs: slice of the tokens whose velocity is wanted.
        """
        g = mods[0].shape[1]
        parts = [[p[:, :, None] for p in m.chunk(6, -1)] for m in mods]
        rope = self.rope_cos[at], self.rope_sin[at]
        x = self.z_proj_ln(self.z_proj(x_RTC) + self.encoder_pos[at])
        x = rearrange(x, "r (g n) d -> r g n d", g=g)
        E = len(self.encoder_blocks)
        for i, block in enumerate(self.encoder_blocks):
            x = block(x, parts[i], rope, mask, keep and keep(i))
        x = self.decoder_embed(self.encoder_norm(x))
        x = x + rearrange(self.decoder_pos[at], "(g n) d -> g n d", g=g)
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, parts[E + i], rope, mask, keep and keep(E + i))
        x = rearrange(x, "r g n d -> r (g n) d")
        return self.pred(self.decoder_norm(x if outputs is None else x[:, outputs]))

    def velocity(self, x_BNC: torch.Tensor, labels: torch.Tensor, t_Bg: torch.Tensor) -> torch.Tensor:
        """All groups at once under the block-causal mask: the training forward of noisy context learning.

        Args:
            x_BNC: noisy tokens in the order of generation.
            labels: (B,).
            t_Bg: each group's time, (B, n_groups).
        """
        group = self.group_of
        mask = (group[:, None] >= group)[None, None] if self.n_groups > 1 else None
        return self.forward(x_BNC, slice(None), self._grouped(labels, t_Bg), mask)

    def _grouped(self, labels: torch.Tensor, t_Bg: torch.Tensor) -> list[torch.Tensor]:
        mods = self.modulation(labels[:, None].expand(-1, t_Bg.shape[1]), t_Bg)
        return mods if self.equal else [m[:, self.group_of.repeat(t_Bg.shape[1] // self.n_groups)] for m in mods]

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Flow matching, x_t = (1 - t) x + t eps, target eps - x; t = sigmoid(normal) a sample and group."""
        c = self.config
        x = self.pack(tokens)
        labels = self.drop_labels(labels, c.label_drop, noise)
        t_Bg = noise.at(purpose="time").normal(self.n_groups).sigmoid().float()
        eps = noise.at(purpose="noise").normal(self.N, c.channels).float()
        t = t_Bg[:, self.group_of, None]
        x_t, target = (1 - t) * x + t * eps, eps - x
        if c.context == "noisy":
            v = self.velocity(x_t, labels, t_Bg)
        else:  # a clean stream and a noisy one: a noisy token sees the clean groups before it, and its own
            group, N = self.group_of, self.N
            before, own = group[:, None] > group, group[:, None] == group
            mask = torch.cat([torch.cat([before | own, torch.zeros_like(own)], 1), torch.cat([before, own], 1)])
            at = torch.arange(N, device=x.device).repeat(2)
            mods = self._grouped(labels, torch.cat([torch.zeros_like(t_Bg), t_Bg], 1))
            v = self.forward(torch.cat([x, x_t], 1), at, mods, mask[None, None], outputs=slice(N, None))
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
        labels = self.check_labels(labels)
        guidance = guidance or self.default_guidance
        B, c = len(labels), self.config
        classes, row_class = torch.cat([labels, labels.new_tensor([self.num_classes])]).unique(return_inverse=True)
        like = self.pred.weight
        guided = any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups))
        rows, layers = B * (1 + guided), c.encoder_depth + c.decoder_depth
        return XARState(
            labels_B=labels,
            guidance=guidance,
            n=[0] * B,
            x_BNC=like.new_zeros(B, self.N, c.channels, dtype=torch.float64),
            cache=KVCache(layers, rows, c.heads, self.N, c.dim // c.heads, like=like) if self.n_groups > 1 else None,
            classes=classes,
            row_class=torch.cat([row_class[:-1], row_class[-1:].expand(B)]),
        )

    def _mods(self, state: XARState, t: float, rows: slice) -> list[torch.Tensor]:
        """Modulation at time t, (R, 1, 6 D): computed once a class and time, kept for the groups to come."""
        if t not in state.mods:
            times = torch.full(state.classes.shape, t, device=state.classes.device)
            fresh = self.modulation(state.classes, times)
            held = sum(m.numel() * m.element_size() for ms in state.mods.values() for m in ms)
            if held > 1 << 28:  # a quarter of a gigabyte: large models with many classes compute them anew
                return [m[state.row_class[rows]][:, None] for m in fresh]
            state.mods[t] = fresh
        return [m[state.row_class[rows]][:, None] for m in state.mods[t]]

    def _read_context(self, state: XARState, rows: slice, stop: int) -> None:
        """Bring the cache of some rows up to sequence place `stop`, one group at a time."""
        cache = state.cache
        assert cache is not None
        B = len(state.labels_B)
        while (done := cache.lengths[rows][0]) < stop:
            end = next(e for e in self.ends if e > done)
            x = state.x_BNC[:, done:end].to(self.pred.weight)
            x = x.repeat((rows.stop - rows.start) // B, 1, 1)
            mods = self._mods(state, 0.0, rows)
            self.forward(
                x,
                slice(done, end),
                mods,
                None,
                lambda i: lambda k, v, i=i: cache.put(i, k, v, rows),
                slice(0, 0),
            )
            cache.advance(end - done, rows)
            state.calls += 1
            state.rows_computed += len(x)

    def predict(self, state: XARState, where: torch.Tensor | None = None) -> Flow:
        """The next group's flow. Its first evaluation also reads the group committed last (one call, not two)."""
        g, ticket, B = state.group, state.ticket, len(state.labels_B)
        if g >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        scale = state.guidance.at(self.progress(g))
        R = B if scale == 1 else 2 * B
        rows, size, stop = slice(0, R), self.sizes[g], self.ends[g]
        begin, cache, dtype = stop - size, state.cache, self.pred.weight.dtype

        def velocity(x_BGC: torch.Tensor, t: float) -> torch.Tensor:
            state.check(ticket)
            x = x_BGC.to(dtype).repeat(R // B, 1, 1)
            mods, at, mask, keep, fresh = self._mods(state, t, rows), slice(begin, stop), None, None, 0
            if cache is not None and g > 0:
                previous = begin - self.sizes[g - 1]
                for half in (slice(0, B), slice(B, R)) if R > B else (rows,):
                    self._read_context(state, half, previous)
                fresh = begin - cache.lengths[0]
                if fresh != begin - cache.lengths[R - 1]:  # one half has read it already (guidance began here)
                    self._read_context(state, slice(0, B), begin)
                    self._read_context(state, slice(B, R), begin)
                    fresh = 0
                if fresh:
                    context = state.x_BNC[:, previous:begin].to(dtype).repeat(R // B, 1, 1)
                    x, at = torch.cat([context, x], 1), slice(previous, stop)
                    clean = self._mods(state, 0.0, rows)
                    runs = (1, 1) if fresh == size else (fresh, size)  # groups of unequal size: a condition a token
                    mods = [
                        torch.cat([a.expand(-1, runs[0], -1), b.expand(-1, runs[1], -1)], 1)
                        for a, b in zip(clean, mods, strict=True)
                    ]
                    mask = torch.ones(fresh + size, stop, dtype=torch.bool, device=x.device)
                    mask[:fresh, begin:] = False
                    mask = mask[None, None]
                keep = lambda i: lambda k, v: cache.put(i, k, v, rows)  # noqa: E731
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

        return Flow(velocity, (B, size, self.config.channels), state.x_BNC.device)

    def commit(self, state: XARState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next group's tokens (B, G, C)."""
        g = state.group
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
            end = self.ends[n[0] - 1] if n[0] else 0
            state.cache.crop([min(end, m) for m in state.cache.lengths])

    def tokens(self, state: XARState) -> Tokens:
        """The finished map (B, L, C), float32."""
        if min(state.n) < self.n_groups:
            raise ValueError(f"only {min(state.n)} of {self.n_groups} groups are committed")
        return Tokens(self.unpack(state.x_BNC).float(), self.spec)
