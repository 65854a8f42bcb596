"""MAR: autoregression over continuous tokens with a diffusion head (Li et al., arXiv 2406.11838).

Two orders of generation:

- `masked`: a masked autoencoder. The encoder sees the known tokens, the decoder fills in mask tokens for the others,
  and any set of positions can be drawn next. This is the published model. It is bidirectional: nothing can be cached.
- `raster`: the same layers under a causal mask, one token at a time with a key-value cache (the paper's causal
  ablation; the layers' arrangement is ours). This is what speculative decoding wants.

Both start from `buffer` tokens that carry the class, or (our extension) a caption, embedded once a draw. What the
transformer says about a position conditions the diffusion head, which gives that token's distribution as a
`DiffusionChain`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.distributions import Chain
from genlab.nn.attention import KVCache, attend
from genlab.nn.diffusion_head import DiffusionChain, DiffusionHead
from genlab.noise import Noise
from genlab.processes import of_the_first_part
from genlab.tokens import Tokens, TokenSpec

from .base import AnyOrderState, Condition, Guidance
from .conditioned import ConditionConfig, ConditionedGenerator


@config
class MARConfig(ConditionConfig):
    """Sizes of a MAR, and its order. The defaults are MAR-B's."""

    kind: Literal["mar"] = "mar"
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token map."""
    channels: int = 16
    """Channels of a token."""
    order: Literal["masked", "raster"] = "masked"
    """Any order, bidirectional; or one token after the other, causal."""
    dim: int = 768
    """Width of the transformer."""
    encoder_depth: int = 12
    """Blocks before the middle projection."""
    decoder_depth: int = 12
    """Blocks behind it."""
    heads: int = 12
    """Attention heads."""
    buffer: int = 64
    """Tokens in front that carry the class or the caption (shorter ones are padded)."""
    head_width: int = 1024
    """Width of the diffusion head."""
    head_depth: int = 6
    """Its blocks."""
    head_steps: int = 100
    """Denoising steps a token, where the sampler doesn't say."""
    head_clip: float = 0.0
    """Largest magnitude of a clean token that a denoising step assumes; 0: any, as published."""
    head_repeats: int = 4
    """Training: draws of time and noise a token."""
    mask_ratio: float = 0.7
    """Training, masked order: least share of hidden tokens."""
    dropout: float = 0.1
    """Of attention's output and the MLP, in training."""


class Block(nn.Module):
    """A ViT block: attention and a GELU MLP behind layer normalisations."""

    def __init__(self, c: MARConfig) -> None:
        """Args: c: sizes."""
        super().__init__()
        self.heads = c.heads
        self.norm1 = nn.LayerNorm(c.dim, eps=1e-6)
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.proj = nn.Linear(c.dim, c.dim)
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(c.dim, 4 * c.dim), nn.GELU(), nn.Dropout(c.dropout), nn.Linear(4 * c.dim, c.dim)
        )
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x_RTD, mask=None, keep=None):
        """One block; mask: boolean, (R, 1, T or 1, L); keep: (k, v) -> (all k, all v), the cache."""
        q, k, v = rearrange(self.qkv(self.norm1(x_RTD)), "r t (three h d) -> three r h t d", three=3, h=self.heads)
        if keep is not None:
            k, v = keep(k, v)
        h = rearrange(attend(q, k, v, mask), "r h t d -> r t (h d)")
        x = x_RTD + self.dropout(self.proj(h))
        return x + self.dropout(self.mlp(self.norm2(x)))


@dataclass(eq=False)
class MARState(AnyOrderState):
    """Tokens so far, in their places; in raster order also the cache, and the drafts it has read."""

    x_BLC: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    buffer_RSD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The tokens in front; conditional rows, then unconditional ones where it is guided."""
    cache: KVCache | None = None
    guided: bool = False


class MAR(ConditionedGenerator):
    """See the module's docstring."""

    kind = "mar"
    Config = MARConfig
    predicts = Chain
    config: MARConfig

    def __init__(self, config: MARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        if c.dim % c.heads or c.buffer < 1:
            raise ValueError(f"dim {c.dim} must be a multiple of heads {c.heads}, and buffer at least 1 ({c.buffer})")
        self.L = self.n_groups = c.grid[0] * c.grid[1]
        self.any_order = c.order == "masked"

        self.make_condition(c, c.dim, c.buffer, pooled=False)
        self.z_proj = nn.Linear(c.channels, c.dim)
        self.z_proj_ln = nn.LayerNorm(c.dim, eps=1e-6)
        self.encoder_pos = nn.Parameter(torch.empty(c.buffer + self.L, c.dim))
        self.encoder_blocks = nn.ModuleList(Block(c) for _ in range(c.encoder_depth))
        self.encoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.decoder_embed = nn.Linear(c.dim, c.dim)
        if self.any_order:
            self.mask_token = nn.Parameter(torch.empty(c.dim))
        self.decoder_pos = nn.Parameter(torch.empty(c.buffer + self.L, c.dim))
        self.decoder_blocks = nn.ModuleList(Block(c) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.diffusion_pos = nn.Parameter(torch.empty(self.L, c.dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        for p in (*tables, *self.parameters(recurse=False)):
            nn.init.normal_(p, std=0.02)
        self.head = DiffusionHead(c.channels, c.dim, c.head_width, c.head_depth, c.head_clip)  # it has its own start

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens."""
        return TokenSpec(kind="continuous", grid=self.config.grid, dim=self.config.channels)

    @property
    def default_guidance(self) -> Guidance:
        """MAR-B's: up to 2.9, with the share of known tokens."""
        return Guidance(scale=2.9)

    def where(self, group: int) -> torch.Tensor:
        """The group-th position in raster order."""
        return torch.tensor([group], device=self.device)

    def progress(self, group: int) -> float:
        """The share of tokens that are known once this group is; the last counts as the last but one (as published)."""
        return min(group + 1, self.L - 1) / self.L

    # -- the network --------------------------------------------------------------------------------------

    def buffer(self, condition: Condition) -> torch.Tensor:
        """The tokens in front, (R, buffer, D): a checked class over and over, or a caption's."""
        tokens, vectors = self.embed_condition(condition)
        return vectors[:, None].expand(-1, self.config.buffer, -1) if tokens is None else tokens

    def fill(
        self, x_RLC: torch.Tensor, buffer_RSD: torch.Tensor, known_RV: torch.Tensor, count: list[int]
    ) -> torch.Tensor:
        """Masked order: what the transformer says about every position, (R, L, D).

        Args:
            x_RLC: tokens; only known ones are read.
            buffer_RSD: `buffer`.
            known_RV: known positions, V a row.
            count: how many of the V count, a row.
        """
        c, (R, V) = self.config, known_RV.shape
        even = min(count) == V
        real_RV = torch.arange(V, device=known_RV.device) < torch.tensor(count, device=known_RV.device)[:, None]
        x = self.z_proj(x_RLC.gather(1, known_RV[..., None].expand(-1, -1, c.channels)).to(self.z_proj.weight))
        first = buffer_RSD + self.encoder_pos[: c.buffer]
        x = self.z_proj_ln(torch.cat([first, x + self.encoder_pos[c.buffer + known_RV]], 1))
        mask = None if even else F.pad(real_RV, (c.buffer, 0), value=True)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, mask)
        x = self.decoder_embed(self.encoder_norm(x))
        # one place more, behind the last, takes what doesn't count
        to = torch.where(real_RV, known_RV, self.L)[..., None].expand(-1, -1, x.shape[-1])
        tokens = self.mask_token.to(x.dtype).expand(R, self.L + 1, -1).scatter(1, to, x[:, c.buffer :])[:, : self.L]
        x = torch.cat([x[:, : c.buffer], tokens], 1) + self.decoder_pos
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, c.buffer :] + self.diffusion_pos

    def read(self, x_RTD: torch.Tensor, at, mask=None, keep=None) -> torch.Tensor:
        """Raster order: the causal stack over embedded tokens at sequence places `at`, (T,) or (R, T).

        A token's place is `buffer` more than its position; what comes out at a place is about the position that
        follows, and lacks its `diffusion_pos` yet. keep: a function of the layer's number, to the block's `keep`.
        """
        x = self.z_proj_ln(x_RTD + self.encoder_pos[at])
        E = len(self.encoder_blocks)
        for i, block in enumerate(self.encoder_blocks):
            x = block(x, mask, keep and keep(i))
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos[at]
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, mask, keep and keep(E + i))
        return self.decoder_norm(x)

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """The diffusion head's loss: on hidden tokens (masked order), or on all (raster).

        The share of hidden tokens is one a batch: a normal of mean 1 and deviation 0.25, cut to mask_ratio … 1.
        """
        z, hidden, _ = self.hidden(tokens, self.buffer(self.drop_condition(labels, noise)), noise)
        x = tokens.gather(1, hidden[..., None].expand(-1, -1, self.config.channels))
        return self.head.loss(x, z, noise, self.config.head_repeats)

    def hidden(
        self, tokens: torch.Tensor, buffer: torch.Tensor, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Training's view: the transformer's words (B, N, D) on N tokens a row, their positions, and the tokens known.

        Raster: all tokens, each given those before it. Masked: a share of them, given the others.
        """
        c, B = self.config, len(tokens)
        if c.order == "raster":
            T = c.buffer + self.L - 1
            x = torch.cat([buffer, self.z_proj(tokens[:, :-1])], 1)
            seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[None, None]
            z = self.read(x, slice(0, T), seen)[:, c.buffer - 1 :] + self.diffusion_pos
            return z, torch.arange(self.L, device=x.device).expand(B, -1), 0
        u = of_the_first_part(noise.at(purpose="mask ratio").uniform(1)[0])
        least = torch.special.ndtr(torch.tensor((c.mask_ratio - 1) / 0.25, dtype=u.dtype))
        ratio = 1 + 0.25 * float(torch.special.ndtri(least + u.cpu() * (0.5 - least)))
        n = self.L - min(self.L, math.ceil(self.L * ratio))
        order = noise.at(purpose="mask").uniform(self.L).argsort(-1)
        z = self.fill(tokens, buffer, order[:, :n], [n] * B)
        return z.gather(1, order[:, n:, None].expand(-1, -1, c.dim)), order[:, n:], n

    # -- drawing ------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> MARState:
        """An empty state; conditional rows first, then (where guidance needs them) unconditional ones."""
        condition, guidance = self.check_condition(labels), guidance or self.default_guidance
        c, B, device = self.config, len(condition), self.device
        guided = any(guidance.at(self.progress(i)) != 1 for i in range(self.L))
        buffer = self.buffer(condition)
        if guided:
            buffer = torch.cat([buffer, self.buffer(self.no_condition(condition))])
        cache = None
        if c.order == "raster":
            layers = c.encoder_depth + c.decoder_depth
            rows, capacity = B * (1 + guided), c.buffer + self.L
            cache = KVCache(layers, rows, c.heads, capacity, c.dim // c.heads, like=self.encoder_pos)
        return MARState(
            labels_B=self.labels_of(condition),
            guidance=guidance,
            n=[0] * B,
            order_BL=torch.arange(self.L, device=device).repeat(B, 1),
            x_BLC=torch.zeros(B, self.L, c.channels, device=device),
            buffer_RSD=buffer,
            cache=cache,
            guided=guided,
        )

    def _chain(self, state: MARState, z_RGD: torch.Tensor, groups_B: list[int]) -> DiffusionChain:
        """The chain for conditions z, guided as its last position's group is."""
        scale = [state.guidance.at(self.progress(g)) for g in groups_B]
        embedded = self.head.cond_embed(z_RGD).unflatten(0, (1 + state.guided, -1))
        if state.guided and max(scale) == min(scale) == 1:
            embedded = embedded[:1]
        scale_B1 = torch.tensor(scale, dtype=torch.float64, device=z_RGD.device)[:, None]
        return DiffusionChain(self.head, embedded, scale_B1.expand(-1, z_RGD.shape[1]), self.config.head_steps)

    def predict(self, state: MARState, where: torch.Tensor | None = None) -> DiffusionChain:
        """Each row's next token; in masked order the tokens at the open positions where (B, G)."""
        return self.predict_many(state, [], None if where is None else [where])[0]

    def predict_many(
        self, state: MARState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[DiffusionChain]:
        """The next tokens' distributions, each given the drafts (B, G, C) before it.

        Rows may stand at different lengths. In raster order a row that is complete gives its last position again: to
        be ignored. `DiffusionChain.join` makes one chain of the list.
        """
        if self.any_order:
            return self._fill_many(state, drafts, where)
        if where is not None:
            raise ValueError("a MAR of raster order takes no `where`: it draws one token after the other")
        return self._read_many(state, drafts)

    def _fill_many(
        self, state: MARState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None
    ) -> list[DiffusionChain]:
        """Masked order: one forward, a row a draft."""
        if where is None or len(where) != len(drafts) + 1:
            raise ValueError(f"a MAR of masked order needs `where`, {len(drafts) + 1} sets of positions (B, G)")
        logs: list[AnyOrderState] = [state]
        x = state.x_BLC.clone()
        for event, at in zip(drafts, where, strict=False):
            logs.append(logs[-1].after(at))
            x.scatter_(1, at[..., None].expand_as(event), event.to(x))
        rows, halves = [n for log in logs for n in log.n], 1 + state.guided
        known = torch.cat([log.order_BL for log in logs])[:, : max(rows)]
        R = halves * len(rows)
        buffer = state.buffer_RSD.unflatten(0, (halves, 1, -1)).expand(-1, len(logs), -1, -1, -1).flatten(0, 2)
        z = self.fill(x.repeat(R // len(x), 1, 1), buffer, known.repeat(halves, 1), rows * halves)
        state.calls += 1
        state.rows_computed += R
        z = rearrange(z, "(two k b) l d -> k (two b) l d", two=halves, b=len(x))
        chains = []
        for z_RLD, log, at in zip(z, logs, where, strict=True):
            index = at.repeat(halves, 1)[..., None].expand(-1, -1, z.shape[-1])
            G = at.shape[1]
            chains.append(self._chain(state, z_RLD.gather(1, index), [n + G - 1 for n in log.n]))
        return chains

    def _read_many(self, state: MARState, drafts: list[torch.Tensor]) -> list[DiffusionChain]:
        """Raster order: one causal forward over what the cache hasn't read yet, and the drafts."""
        c, K, cache, device = self.config, len(drafts), state.cache, self.device
        assert cache is not None
        if drafts:
            self._write(state, torch.cat(drafts, 1))
        R, B, n = len(cache.lengths), len(state.n), [min(m, self.L - 1) for m in state.n]
        # the place before the next token is read (again) too: its output is what we are after
        begin = [min(m, c.buffer + i - 1) for m, i in zip(cache.lengths, n, strict=False)]
        T = max(c.buffer + min(i + K, self.L - 1) - b for i, b in zip(n, begin, strict=True))
        begin = [min(b, cache.capacity - T) for b in begin]
        cache.crop(begin * (R // B))
        at_BT = torch.tensor(begin, device=device)[:, None] + torch.arange(T, device=device)
        position = (at_BT - c.buffer).clamp(min=0)[..., None].expand(-1, -1, c.channels)
        x = self.z_proj(state.x_BLC.gather(1, position).to(self.z_proj.weight)).repeat(R // B, 1, 1)
        at_RT = at_BT.repeat(R // B, 1)
        before = state.buffer_RSD.gather(1, at_RT.clamp(max=c.buffer - 1)[..., None].expand(-1, -1, c.dim))
        x = torch.where(at_RT[..., None] < c.buffer, before.to(x), x)
        mask = None
        if T > 1 or min(begin) != max(begin):
            mask = (torch.arange(max(begin) + T, device=device) <= at_RT[..., None])[:, None]
        z = self.read(x, at_RT, mask, cache.keep(slice(0, R)))
        cache.advance(T, slice(0, R))
        state.calls += 1
        state.rows_computed += R
        chains = []
        for k in range(K + 1):
            next_B = [min(i + k, self.L - 1) for i in n]
            out = [c.buffer + i - 1 - b for i, b in zip(next_B, begin, strict=True)] * (R // B)
            z_RD = z[torch.arange(R, device=device), torch.tensor(out, device=device)]
            z_RD = z_RD + self.diffusion_pos[next_B].repeat(R // B, 1)
            chains.append(self._chain(state, z_RD[:, None], next_B))
        return chains

    def _write(self, state: MARState, event_BGC: torch.Tensor) -> None:
        """Raster order: put tokens behind each row's committed ones; what was read differently leaves the cache.

        So the cache always holds what `x_BLC` says, and a draft that is committed need not be read again.
        """
        cache, B = state.cache, len(state.n)
        assert cache is not None
        lengths = cache.lengths[:B]
        for b, n in enumerate(state.n):
            new = event_BGC[b, : self.L - n]
            place = slice(n, n + len(new))
            if lengths[b] > self.config.buffer + n:
                same = (state.x_BLC[b, place] == new).all(-1).tolist()
                if False in same:
                    lengths[b] = min(lengths[b], self.config.buffer + n + same.index(False))
            state.x_BLC[b, place] = new
        cache.crop(lengths * (len(cache.lengths) // B))

    def commit(self, state: MARState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix tokens (B, G, C): at the positions where (B, G), or in raster order each row's next G.

        In raster order what lies behind a row's end is ignored.
        """
        B, C = len(state.n), self.config.channels
        if event.ndim != 3 or (event.shape[0], event.shape[2]) != (B, C):
            raise ValueError(f"an event has shape ({B}, G, {C}), got {tuple(event.shape)}")
        event = event.to(state.x_BLC)
        if self.any_order:
            if where is None or where.shape != event.shape[:2]:
                raise ValueError(f"say where: positions of shape {tuple(event.shape[:2])}")
            state.record(where)
            state.x_BLC.scatter_(1, where[..., None].expand_as(event), event)
        else:
            self._write(state, event)
            state.n = [min(n + event.shape[1], self.L) for n in state.n]
            state.ticket += 1

    def crop(self, state: MARState, n: list[int]) -> None:
        """Keep only the first n[b] committed tokens of row b; the cache stays, `_write` compares."""
        state.keep_first(n)

    def tokens(self, state: MARState) -> Tokens:
        """The finished map (B, L, C), float32."""
        self.require_complete(state)
        return Tokens(state.x_BLC.to(torch.float32, copy=True), self.spec)
