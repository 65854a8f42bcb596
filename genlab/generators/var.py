"""VAR: autoregression over scales, each map of codes drawn at once (Tian et al., arXiv 2404.02905).

A scale sees the scales before it and itself. What a scale reads is not its own tokens but the map that the
scales before it add up to, averaged down to its size; so drawing needs the tokenizer's codebook, of which the
generator holds a frozen copy (`adopt`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Categorical
from genlab.nn.attention import KVCache, attend
from genlab.nn.layers import drop_path, modulate
from genlab.nn.scales import ScaleCodes
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec, require_fit

from .base import Condition, Guidance, State, Text
from .conditioned import ConditionConfig, ConditionedGenerator


@config
class VARConfig(ConditionConfig):
    """Sizes of a VAR; the defaults are the paper's d16 at 256x256."""

    kind: Literal["var"] = "var"
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side of each map, coarse to fine."""
    vocab: int = 4096
    """Codebook size."""
    code_dim: int = 32
    """Channels of a code."""
    phis: int = 4
    """The tokenizer's smoothing convolutions."""
    phi_ratio: float = 0.5
    """Their share: phi(x) = (1 - ratio) x + ratio conv(x)."""
    text_length: int = 16
    """text: embeddings a caption at most."""
    dim: int = 1024
    """Width; the paper's is 64 times the depth."""
    depth: int = 16
    """Blocks."""
    heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width inside the MLP, in units of dim."""
    l2_attention: bool = True
    """Attention over unit queries and keys, with a learned scale a head; otherwise over plain ones."""
    shared_modulation: bool = False
    """One modulation for all blocks, beside an offset each (the paper's d36 at 512x512)."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising from 0 at the first; the paper's is depth / 240."""
    gate_start: float = 1e-3
    """Size of the branches' gates at the start of training; the paper's is smaller for deeper models."""


class _Biased(nn.Linear):
    """A projection with a bias given from outside: that of the keys is no parameter."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class Block(nn.Module):
    """Attention and MLP, modulated by the class: LayerNorm without gain, adaLN."""

    def __init__(self, c: VARConfig, rate: float) -> None:
        """Args: c: sizes. rate: of stochastic depth."""
        super().__init__()
        self.heads, self.rate = c.heads, rate
        self.qkv = _Biased(c.dim, 3 * c.dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(c.dim)), nn.Parameter(torch.zeros(c.dim))
        self.scale = nn.Parameter(torch.full((c.heads,), math.log(4.0))) if c.l2_attention else None
        self.proj = nn.Linear(c.dim, c.dim)
        self.fc1, self.fc2 = nn.Linear(c.dim, round(c.dim * c.mlp_ratio)), nn.Linear(round(c.dim * c.mlp_ratio), c.dim)
        if c.shared_modulation:
            self.ada_offset = nn.Parameter(torch.randn(6 * c.dim) / c.dim**0.5)
        else:
            self.ada_lin = nn.Linear(c.dim, 6 * c.dim)

    def forward(self, x_RTD, mods, mask, keep=None):
        """One block.

        Args:
            x_RTD: T positions.
            mods: gates, scales and shifts of attention and MLP, each (R, 1, D).
            mask: boolean, which keys each position sees; None: all.
            keep: (k, v) -> (all k, all v), the cache; None without one.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = mods
        (R, T, D), H = x_RTD.shape, self.heads
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        h = modulate(F.layer_norm(x_RTD, (D,), eps=1e-6), shift1, scale1)
        q, k, v = self.qkv(h, bias).view(R, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        temperature = 0.25 * (D // H) ** -0.5
        if self.scale is not None:
            q = F.normalize(q, dim=-1) * self.scale.clamp(max=math.log(100)).exp()[:, None, None]
            k, temperature = F.normalize(k, dim=-1), 1.0
        if keep is not None:
            k, v = keep(k, v)
        h = attend(q.to(v), k.to(v), v, mask, scale=temperature).transpose(1, 2).reshape(R, T, D)
        x = x_RTD + drop_path(self.proj(h) * gate1, self.rate, self.training)
        h = modulate(F.layer_norm(x, (D,), eps=1e-6), shift2, scale2)
        h = self.fc2(F.gelu(self.fc1(h), approximate="tanh"))
        return x + drop_path(h * gate2, self.rate, self.training)


class CaptionVector(nn.Module):
    """A caption as one vector, where a class's would be: an MLP over the mean of its embeddings (our extension)."""

    def __init__(self, text_dim: int, dim: int) -> None:
        """Args: text_dim: channels in. dim: channels out."""
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(text_dim, dim), nn.Linear(dim, dim)

    def forward(self, text: Text) -> torch.Tensor:
        """Captions with a mask to (R, dim); one that is all padding, "no caption", to what the biases have learned."""
        assert text.mask_BT is not None
        real_RT1 = text.mask_BT[..., None]
        mean = torch.where(real_RT1, text.embeds_BTD.to(self.fc1.weight), 0).sum(1) / real_RT1.sum(1).clamp(min=1)
        return self.fc2(F.gelu(self.fc1(mean)))


@dataclass(eq=False)
class VARState(State):
    """Ids so far, the maps they add up to, and the keys and values of the scales that the network has read."""

    ids_BL: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    maps: list[torch.Tensor] = field(default_factory=list)
    """The map (B, C, H, W) behind each of the first scales."""
    condition_R: Condition = field(default_factory=lambda: torch.empty(0))
    """Classes or captions; conditional rows first."""
    mods: list[torch.Tensor] = field(default_factory=list)
    """Each block's modulation, and the head's: of all rows, computed once."""
    cache: KVCache | None = None


class VAR(ConditionedGenerator):
    """One scale a group."""

    kind = "var"
    Config = VARConfig
    config: VARConfig
    predicts = Categorical
    scale_of: torch.Tensor

    def __init__(self, config: VARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        if c.dim % c.heads:
            raise ValueError(f"dim {c.dim} is not a multiple of heads {c.heads}")
        if not c.scales or list(c.scales) != sorted(set(c.scales)):
            raise ValueError(f"scales must rise from coarse to fine, got {c.scales}")
        self.sizes = [s * s for s in c.scales]
        self.ends = list(accumulate(self.sizes))
        self.num_classes, self.n_groups, self.L = c.num_classes, len(c.scales), self.ends[-1]
        self.text_length = c.text_length if self.by_text else 0
        self.codes = ScaleCodes(
            codes=c.vocab, dim=c.code_dim, scales=self.spec.scales, phis=c.phis, phi_ratio=c.phi_ratio
        )
        self.word_embed = nn.Linear(c.code_dim, c.dim)
        if self.by_text:
            self.caption_vector = CaptionVector(c.text_dim, c.dim)
        else:
            self.class_emb = nn.Embedding(c.num_classes + 1, c.dim)
        self.pos_start = nn.Parameter(torch.empty(self.sizes[0], c.dim))
        self.pos = nn.Parameter(torch.empty(self.L, c.dim))
        self.scale_emb = nn.Embedding(self.n_groups, c.dim)
        self.shared_ada_lin = nn.Linear(c.dim, 6 * c.dim) if c.shared_modulation else None
        self.blocks = nn.ModuleList(Block(c, c.drop_path * i / max(c.depth - 1, 1)) for i in range(c.depth))
        self.head_ada_lin = nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Linear(c.dim, c.vocab)
        scale_of = torch.tensor([s for s, size in enumerate(self.sizes) for _ in range(size)])
        self.register_buffer("scale_of", scale_of, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As published: branches start almost closed, the head almost flat."""
        D, blocks = self.config.dim, cast(list[Block], list(self.blocks))
        std = (1 / D / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for p in (self.pos_start, self.pos):
            nn.init.trunc_normal_(p, std=std)
        with torch.no_grad():
            self.head.weight *= 0.02
            self.head_ada_lin.weight *= 0.5
            for block in blocks:
                block.proj.weight /= math.sqrt(2 * len(blocks))
                block.fc2.weight /= math.sqrt(2 * len(blocks))
                modulation = block.ada_offset if self.config.shared_modulation else block.ada_lin.weight
                modulation[: 2 * D] *= self.config.gate_start
                modulation[2 * D :] *= 0.5

    @property
    def spec(self) -> TokenSpec:
        """Maps of ids, coarse to fine."""
        scales = tuple((s, s) for s in self.config.scales)
        return TokenSpec(kind="discrete", grid=scales[-1], order="scale", scales=scales, vocab=self.config.vocab)

    @property
    def default_guidance(self) -> Guidance:
        """The published samplers': (1 + 1.5 r) c - 1.5 r u over the scales."""
        return Guidance(scale=2.5, schedule="linear")

    def adopt(self, tokenizer: Any) -> None:
        """Copy the codebook of the tokenizer whose tokens it reads: before training, or behind a conversion.

        Args:
            tokenizer: a model with `spec` and `quantiser` (`MSVQ`).

        Raises:
            ValueError: if its tokens, codes or convolutions are of another size.
        """
        require_fit(getattr(tokenizer, "kind", "tokenizer"), tokenizer.spec, self.kind, self.spec)
        from genlab.hub import load_strict

        load_strict(self.codes, tokenizer.quantiser.state_dict(), where="the tokenizer's quantiser")
        self.codes.phi_ratio = tokenizer.quantiser.phi_ratio

    def where(self, group: int) -> torch.Tensor:
        """Places in the row of all maps."""
        return torch.arange(self.ends[group] - self.sizes[group], self.ends[group], device=self.device)

    # -- the network --------------------------------------------------------------------------------------------

    def vector(self, condition: Condition) -> torch.Tensor:
        """Checked classes or captions as vectors (R, D)."""
        return self.caption_vector(condition) if isinstance(condition, Text) else self.class_emb(condition)

    def modulation(self, condition: Condition) -> list[torch.Tensor]:
        """What the condition does to each block, (R, 1, 6 D), and to the head, (R, 1, 2 D)."""
        c, blocks = F.silu(self.vector(condition))[:, None], cast(list[Block], list(self.blocks))
        if self.shared_ada_lin is not None:
            shared = self.shared_ada_lin(c)
            return [*(shared + block.ada_offset for block in blocks), self.head_ada_lin(c)]
        return [*(block.ada_lin(c) for block in blocks), self.head_ada_lin(c)]

    def embed(self, condition: Condition, x_RTC: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Embeddings (R, T, D) of scales first … stop - 1; x holds the inputs of those but the very first scale."""
        begin = self.ends[first] - self.sizes[first]
        at = slice(begin, self.ends[stop - 1])
        x = self.word_embed(x_RTC)
        if first == 0:
            x = torch.cat([self.vector(condition)[:, None] + self.pos_start.to(x), x], 1)
        return x + self.scale_emb(self.scale_of[at]) + self.pos[at]

    def forward(self, x_RTD, mods, mask=None, keep=None, outputs=None):
        """Embeddings to logits (R, T, V), float32; `outputs` is the slice of positions whose logits are wanted."""
        for i, block in enumerate(self.blocks):
            x_RTD = block(x_RTD, mods[i].chunk(6, -1), mask, keep and keep(i))
        x = x_RTD if outputs is None else x_RTD[:, outputs]
        scale, shift = mods[-1].chunk(2, -1)
        h = modulate(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6), shift, scale)
        return self.head(h.to(self.head.weight)).float()

    def logits(self, condition: Condition, x_BTC: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: logits (B, L, V) of all scales; x is the input of all but the first, (B, L - h_0 w_0, C)."""
        x = self.embed(condition, x_BTC, 0, self.n_groups)
        mask = self.scale_of[:, None] >= self.scale_of
        return self.forward(x, self.modulation(condition), mask)

    def inputs(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The inputs of all scales but the first, from all ids (B, L): (B, L - h_0 w_0, C)."""
        maps = self._extend([], ids_BL, self.n_groups - 1)
        none = self.codes.codebook.new_zeros(len(ids_BL), 0, self.config.code_dim)
        return torch.cat([none, *(self.codes.pool(f, s + 1) for s, f in enumerate(maps))], 1)

    def _extend(self, maps: list[torch.Tensor], ids_BL: torch.Tensor, n: int) -> list[torch.Tensor]:
        """The maps behind the first n scales, given those behind some of them."""
        maps = list(maps[:n])
        for s in range(len(maps), n):
            added = self.codes.contribution(ids_BL[:, self.ends[s] - self.sizes[s] : self.ends[s]], s)
            maps.append(maps[-1] + added if maps else added)
        return maps

    def require_codes(self) -> None:
        """Refuse to go on without a codebook.

        Raises:
            ValueError: if there is none.
        """
        if bool(self.codes.codebook[0, 0].isnan()):
            raise ValueError(
                "this VAR has no codebook yet: call adopt(tokenizer) with the msvq tokenizer whose tokens it reads"
            )

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Cross-entropy of every id given the coarser scales, nats; `accuracy`; both of the last scale too."""
        self.require_codes()
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            x = self.inputs(tokens)
        logits = self.logits(self.drop_condition(labels, noise), x)
        nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        hit = (logits.detach().argmax(-1) == tokens).float()
        last = self.sizes[-1]
        return {
            "loss": nats.mean(),
            "accuracy": hit.mean(),
            "loss_last_scale": nats[:, -last:].mean().detach(),
            "accuracy_last_scale": hit[:, -last:].mean(),
        }

    # -- drawing ------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None, *, cached: bool = True) -> VARState:
        """An empty state; `cached=False` recomputes everything at every prediction (benchmarks)."""
        self.require_codes()
        condition = self.check_condition(labels)
        guidance = guidance or self.default_guidance
        B, c, rows = len(condition), self.config, condition
        if any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups)):
            rows = stack_conditions(condition, self.no_condition(condition))
        like = self.head.weight
        return VARState(
            labels_B=self.labels_of(condition),
            guidance=guidance,
            n=[0] * B,
            ids_BL=torch.zeros(B, self.L, dtype=torch.long, device=self.device),
            condition_R=rows,
            mods=self.modulation(rows),
            cache=KVCache(c.depth, len(rows), c.heads, self.L, c.dim // c.heads, like=like) if cached else None,
        )

    def predict(self, state: VARState, where: torch.Tensor | None = None) -> Categorical:
        """The next scale's ids, logits (B, h w, 1, V)."""
        return self.predict_many(state, [])[0]

    def predict_many(
        self, state: VARState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Categorical]:
        """The distributions of the next n + 1 scales, each given the drafts before it, in one masked forward.

        Args:
            state: all rows at one scale.
            drafts: events (B, h w, 1) of the next n scales.
            where: unused; scales follow one another.
        """
        g, B, cache = state.group, len(state.n), state.cache
        stop = g + len(drafts) + 1
        if stop > self.n_groups:
            raise ValueError(
                f"{g} of {self.n_groups} scales are committed: no room for {len(drafts)} drafts and one more"
            )
        state.maps = self._extend(state.maps, state.ids_BL, g)
        begin, ids = self.ends[g] - self.sizes[g], state.ids_BL
        if drafts:
            ids = torch.cat([ids[:, :begin], *(d[..., 0] for d in drafts)], 1)
        maps = self._extend(state.maps, ids, stop - 1)

        scales = [state.guidance.at(self.progress(s)) for s in range(g, stop)]
        R = B if all(s == 1 for s in scales) else 2 * B
        read = min(cache.lengths[:R]) if cache is not None else 0
        first = min(g, sum(end <= read for end in self.ends))
        done = self.ends[first] - self.sizes[first]
        parts = [self.codes.pool(maps[s - 1], s) for s in range(max(first, 1), stop)]
        x = torch.cat([self.codes.codebook.new_zeros(B, 0, self.config.code_dim), *parts], 1)
        x = self.embed(state.condition_R[:R], x.repeat(R // B, 1, 1), first, stop)
        mods = [m[:R] for m in state.mods]
        rows, mask = slice(0, R), None
        if stop - first > 1:
            seen = self.scale_of[: self.ends[stop - 1]]
            mask = seen[done:, None] >= seen
        keep = None
        if cache is not None:
            rest = cache.lengths[R:]
            cache.crop([done] * R + rest)
            keep = cache.keep(rows)
        logits = self.forward(x, mods, mask, keep, slice(begin - done, None))
        if cache is not None:
            cache.advance(x.shape[1], rows)
            cache.crop([self.ends[g]] * R + rest)  # the committed scales, and what the next one reads of them
        state.calls += 1
        state.rows_computed += R

        ticket, out = state.ticket, []
        for p, s in zip(logits.split(self.sizes[g:stop], 1), scales, strict=True):
            if R > B:
                cond, uncond = p.chunk(2)
                p = cond + (s - 1) * (cond - uncond)
            out.append(Categorical(p[:, :, None], check=lambda: state.check(ticket)))
        return out

    def commit(self, state: VARState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next scale's ids (B, h w, 1)."""
        g = state.group
        if g >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        shape = (len(state.n), self.sizes[g], 1)
        if tuple(event.shape) != shape:
            raise ValueError(f"scale {g} needs an event of shape {shape}, got {tuple(event.shape)}")
        state.ids_BL[:, self.ends[g] - self.sizes[g] : self.ends[g]] = event[..., 0]
        state.n = [g + 1] * len(state.n)
        state.ticket += 1

    def crop(self, state: VARState, n: list[int]) -> None:
        """Keep the first n[b] scales of row b; `predict` wants all rows at one scale.

        Raises:
            ValueError: for more than a row holds.
        """
        state.keep_first(n)
        state.maps = state.maps[: min(n)]
        if state.cache is not None:
            # the keys of scale n depend on the ids before it alone
            ends = [self.ends[min(m, self.n_groups - 1)] for m in n] * 2
            state.cache.crop([min(m, e) for m, e in zip(state.cache.lengths, ends, strict=False)])

    def tokens(self, state: VARState) -> Tokens:
        """The finished ids (B, L), scale after scale."""
        self.require_complete(state)
        return Tokens(state.ids_BL.clone(), self.spec)


def stack_conditions(a: Condition, b: Condition) -> Condition:
    """Checked conditions of one kind, behind one another."""
    if isinstance(a, Text) and isinstance(b, Text):
        assert a.mask_BT is not None
        assert b.mask_BT is not None
        return Text(torch.cat([a.embeds_BTD, b.embeds_BTD]), torch.cat([a.mask_BT, b.mask_BT]))
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return torch.cat([a, b])
