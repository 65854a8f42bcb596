"""Generators that draw a raster of ids one position at a time: what LlamaGen and ELM share.

A position holds K ids (ELM's sub-tokens; 1 for LlamaGen), which K heads predict from one hidden state. Rows may
stand at different lengths: every call reads, for all rows, the last T positions that one of them still lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Categorical
from genlab.nn.attention import KVCache
from genlab.nn.gpt import GPT
from genlab.nn.layers import Linear
from genlab.noise import Noise
from genlab.tokens import Tokens

from . import tree
from .base import Condition, Generator, Guidance, State, Text


@config
class CausalConfig:
    """Sizes of a causal transformer over a raster of ids."""

    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the token map."""
    num_classes: int = 1000
    """Classes; one more row of the table stands for "no class"."""
    dim: int = 768
    """Width."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 0
    """Width inside the MLP; 0: 8/3 of dim, rounded up to a multiple of 256."""
    dropout: float = 0.1
    """Of embeddings, attention's output and the MLP, in training."""
    condition: Literal["class", "text"] = "class"
    """What it draws by: a class, or a caption (as LlamaGen's text models)."""
    text_dim: int = 2048
    """text: channels of the encoder's embeddings."""
    text_length: int = 120
    """text: embeddings in front of the image; shorter captions are padded on the left."""
    label_drop: float = 0.1
    """Share of training conditions replaced by "no class", or by no caption."""


class CaptionEmbedding(nn.Module):
    """An MLP over caption embeddings, and the embeddings that stand for no caption (fixed noise, as published)."""

    uncond: torch.Tensor

    def __init__(self, text_dim: int, dim: int, length: int) -> None:
        """Args: text_dim: channels in. dim: channels out. length: embeddings a caption."""
        super().__init__()
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        self.register_buffer("uncond", torch.randn(length, text_dim) / text_dim**0.5)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, text_dim) to (B, T, dim)."""
        return self.fc2(F.gelu(self.fc1(x_BTC), approximate="tanh"))


@dataclass(eq=False)
class CausalState(State):
    """Ids so far, what stands in front of them, and the keys and values of what the network has read."""

    ids_BLK: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Committed ids; behind a row's end, drafts."""
    prefix_RPD: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """The condition, embedded; conditional rows first."""
    beside: Any = None
    """What the network reads beside the sequence, of as many rows."""
    seen_RP: torch.Tensor | None = None
    """Which positions of the prefix count; None: all."""
    cache: KVCache | None = None
    """Its lengths may reach behind a row's end: then drafts have been read."""
    tree: tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
    """The nodes `predict_tree` read, and each layer's keys and values of them."""


class CausalLM(Generator):
    """One position a group, by class or by text. Subclasses give `spec`."""

    config: CausalConfig
    cls_embedding: Any
    gpt: Any
    predicts = Categorical
    prefix = 1
    """Positions of the condition."""

    def __init__(self, config: CausalConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c, spec = config, self.spec
        self.num_classes, self.n_groups = c.num_classes, spec.length
        self.K, self.V = spec.depth, spec.vocab or 0
        self.make_condition()
        self.tok_embeddings = nn.ModuleList(nn.Embedding(self.V, c.dim) for _ in range(self.K))
        self.proj = nn.Linear(self.K * c.dim, c.dim, bias=False) if self.K > 1 else None
        self.make_network()
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.proj is not None:
            nn.init.normal_(self.proj.weight, std=0.02)
        for head in self.output:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]

    def make_network(self) -> None:
        """The blocks, and a head for each id of a position."""
        c = self.config
        self.gpt = GPT(
            grid=c.grid,
            prefix=self.prefix,
            dim=c.dim,
            depth=c.depth,
            heads=c.heads,
            hidden=c.hidden,
            dropout=c.dropout,
        )
        self.output = nn.ModuleList(Linear(c.dim, self.V, bias=False) for _ in range(self.K))

    # -- the condition ----------------------------------------------------------------------------------------

    def make_condition(self) -> None:
        """A table of classes, or an MLP over captions."""
        c = self.config
        if c.condition == "class":
            self.cls_embedding = nn.Embedding(c.num_classes + 1, c.dim)
        else:
            self.prefix = self.text_length = c.text_length
            self.cls_embedding = CaptionEmbedding(c.text_dim, c.dim, c.text_length)

    def check_condition(self, condition: Condition) -> Condition:
        """Classes as they are; captions padded on the left to `text_length`; on this device.

        Raises:
            ValueError: for classes where captions are wanted or the other way round, or captions of another size.
        """
        if not self.by_text:
            return self.check_labels(condition)
        text = self.check_captions(condition, "left")
        return Text(text.embeds_BTD.to(self.cls_embedding.fc1.weight), text.mask_BT)

    def embed_condition(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A checked condition as a prefix (B, P, D), and which of its positions count (B, P), None for all.

        A class is one position; a caption `text_length`, of which the padding doesn't count.
        """
        if isinstance(condition, Text):
            return self.cls_embedding(condition.embeds_BTD), condition.mask_BT
        return self.cls_embedding(condition)[:, None], None

    def read_beside(self, conditions: Sequence[Condition]) -> Any:
        """What the network reads of checked conditions, one behind the other, beside the sequence; None: nothing."""

    def no_condition(self, condition: Condition) -> Condition:
        """What stands for the absence of a checked condition, as many rows.

        No class; or the fixed embeddings, under the caption's own mask (as LlamaGen published it).
        """
        if isinstance(condition, Text):
            uncond = self.cls_embedding.uncond.to(condition.embeds_BTD)
            return Text(uncond.expand_as(condition.embeds_BTD), condition.mask_BT)
        return torch.full_like(condition, self.num_classes)

    def drop_condition(self, condition: Condition, noise: Noise) -> Condition:
        """Replace a share of checked conditions by `no_condition`, for guidance."""
        if not isinstance(condition, Text):
            return self.drop_labels(condition, self.config.label_drop, noise)
        drop = noise.at(purpose="label drop").uniform(1) < self.config.label_drop
        free, drop = self.no_condition(condition), drop.to(self.device)
        assert isinstance(free, Text)
        assert free.mask_BT is not None
        assert condition.mask_BT is not None
        return Text(
            torch.where(drop[..., None], free.embeds_BTD, condition.embeds_BTD),
            torch.where(drop, free.mask_BT, condition.mask_BT),
        )

    # -- the network ------------------------------------------------------------------------------------------

    def where(self, group: int) -> torch.Tensor:
        """The position itself."""
        return torch.tensor([group], device=self.device)

    def embed(self, ids_BTK: torch.Tensor) -> torch.Tensor:
        """Ids to (B, T, D)."""
        parts = [table(ids) for table, ids in zip(self.tok_embeddings, ids_BTK.unbind(-1), strict=True)]
        return parts[0] if self.proj is None else self.proj(torch.cat(parts, -1))

    def run(self, x_RTD: torch.Tensor, beside: Any, *where: Any, **how: Any) -> torch.Tensor:
        """The blocks over embeddings (R, T, D), `where` and `how` as `GPT.forward` takes them."""
        return self.gpt(x_RTD, *where, **how)

    def heads(self, h_RTD: torch.Tensor) -> torch.Tensor:
        """The last block's output to logits (R, T, K, V), float32."""
        h = self.gpt.norm(h_RTD)
        return torch.stack([head(h) for head in self.output], 2).float()

    @staticmethod
    def visible(at: torch.Tensor, keys: int, seen_RP: torch.Tensor | None) -> torch.Tensor:
        """Which of the first `keys` positions those at (T,) or (R, T) see: (R or 1, 1, T, keys)."""
        key = torch.arange(keys, device=at.device)
        mask = torch.atleast_2d(at)[..., None] >= key
        if seen_RP is not None:  # padding is seen by itself alone
            padding = F.pad(~seen_RP, (0, keys - seen_RP.shape[1]))[:, None]
            mask = mask & (~padding | (torch.atleast_2d(at)[..., None] == key))
        return mask[:, None]

    def logits(self, ids_BTK: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Teacher forcing: logits (B, T + 1, K, V) of the first T + 1 positions, given the first T's ids."""
        prefix, seen = self.embed_condition(condition)
        x = torch.cat([prefix, self.embed(ids_BTK)], 1)
        mask = None if seen is None else self.visible(torch.arange(x.shape[1], device=x.device), x.shape[1], seen)
        return self.heads(self.run(x, self.read_beside([condition]), mask=mask)[:, self.prefix - 1 :])

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Cross-entropy of every id given those before it, nats; `accuracy` is the share of likeliest ids that hit."""
        ids = tokens.view(len(tokens), self.n_groups, self.K)
        logits = self.logits(ids[:, :-1], self.drop_condition(self.check_condition(labels), noise))
        return {
            "loss": F.cross_entropy(logits.flatten(0, 2), ids.flatten()),
            "accuracy": (logits.detach().argmax(-1) == ids).float().mean(),
        }

    # -- drawing ------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None, *, cached: bool = True) -> CausalState:
        """An empty state; `cached=False` recomputes everything at every prediction (benchmarks)."""
        condition = self.check_condition(labels)
        guidance = guidance or self.default_guidance
        B = len(condition)
        prefix, seen = self.embed_condition(condition)
        read = [condition]
        if any(guidance.at(self.progress(g)) != 1 for g in range(self.n_groups)):
            read.append(self.no_condition(condition))
            free, free_seen = self.embed_condition(read[1])
            prefix = torch.cat([prefix, free])
            seen = None if seen is None or free_seen is None else torch.cat([seen, free_seen])
        return CausalState(
            labels_B=self.labels_of(condition),
            guidance=guidance,
            n=[0] * B,
            ids_BLK=torch.zeros(B, self.n_groups, self.K, dtype=torch.long, device=self.device),
            prefix_RPD=prefix,
            beside=self.read_beside(read),
            seen_RP=seen,
            cache=self.new_cache(len(prefix), prefix) if cached else None,
        )

    def new_cache(self, rows: int, like: torch.Tensor) -> KVCache:
        """Room for the condition and all positions of so many rows."""
        c = self.config
        return KVCache(c.depth, rows, c.heads, self.prefix + self.n_groups, c.dim // c.heads, like=like)

    def predict(self, state: CausalState, where: torch.Tensor | None = None) -> Categorical:
        """The K heads at each row's next position (a complete row: at its last), logits (B, 1, K, V)."""
        return self.predict_many(state, [])[0]

    def predict_many(
        self,
        state: CausalState,
        drafts: list[torch.Tensor] | torch.Tensor,
        where: list[torch.Tensor] | None = None,
    ) -> list[Categorical]:
        """The distributions of the next n + 1 positions, each given the drafts before it, in one masked forward.

        Committing a draft later costs no second reading. Beyond a row's last position, the last one's
        distribution is repeated.

        Args:
            state: rows may stand at different positions.
            drafts: n events (B, 1, K), or one tensor (B, n, K).
            where: unused; positions follow one another.

        Raises:
            ValueError: if all rows are complete.
        """
        n_drafts, last = (drafts.shape[1] if isinstance(drafts, torch.Tensor) else len(drafts)), self.n_groups - 1
        if min(state.n) > last:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        places = [[min(n + i, last) for i in range(n_drafts + 1)] for n in state.n]
        scales = [[state.guidance.at(self.progress(g)) for g in row] for row in places]
        guided = any(s != 1 for row in scales for s in row)
        if n_drafts:
            self._write(state, drafts if isinstance(drafts, torch.Tensor) else torch.cat(drafts, 1))
        logits = self.heads(self._read(state, places, 2 if guided else 1))
        if guided:
            cond, uncond = logits.chunk(2)
            s: float | torch.Tensor = scales[0][0]
            if any(x != s for row in scales for x in row):
                s = torch.tensor(scales, dtype=logits.dtype, device=logits.device)[..., None, None]
            logits = cond + (s - 1) * (cond - uncond)
        ticket = state.ticket
        return [Categorical(p, check=lambda: state.check(ticket)) for p in logits.split(1, 1)]

    def predict_tree(self, state: CausalState, ids_BNK: torch.Tensor, parent_BN: torch.Tensor) -> Categorical:
        """The distributions behind each row's end and behind each node of a tree, in one masked forward."""
        if state.cache is None:
            return super().predict_tree(state, ids_BNK, parent_BN)
        if min(state.n) >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        dist, fresh = tree.read_tree(self, state, ids_BNK, parent_BN)
        state.tree = ids_BNK, fresh
        return dist

    def keep_path(self, state: CausalState, path_BD: torch.Tensor) -> None:
        """Keep what was computed for a path of the tree just read; committing it costs no second reading."""
        if state.cache is not None:
            tree.keep_path(self, state, path_BD)

    def _write(self, state: CausalState, ids_BnK: torch.Tensor) -> None:
        """Put ids behind each row's end, as far as there is room."""
        if ids_BnK.shape[0] != len(state.n) or ids_BnK.shape[2] != self.K:
            raise ValueError(f"an event must be ids of shape ({len(state.n)}, ·, {self.K}), got {tuple(ids_BnK.shape)}")
        n, T = state.n, ids_BnK.shape[1]
        if min(n) == max(n):
            T = min(T, self.n_groups - n[0])
            state.ids_BLK[:, n[0] : n[0] + T] = ids_BnK[:, :T]
            return
        at = torch.tensor(n, device=ids_BnK.device)[:, None] + torch.arange(T, device=ids_BnK.device)
        row, i = (at < self.n_groups).nonzero(as_tuple=True)
        state.ids_BLK[row, at[row, i]] = ids_BnK[row, i]

    def _read(self, state: CausalState, places: list[list[int]], halves: int) -> torch.Tensor:
        """Run the network over what each row lacks up to its last place: outputs (R, places, D) that predict them."""
        P, cache, device = self.prefix, state.cache, state.ids_BLK.device
        places = places * halves
        R, rows = len(places), slice(0, len(places))
        held = cache.lengths if cache is not None else [0] * R
        # the output at position P + g - 1 predicts place g; a row that has read it already reads it again
        lack = [min(m, P + p[0] - 1) for m, p in zip(held, places, strict=False)]
        T = max(P + p[-1] - m for m, p in zip(lack, places, strict=True))
        begin = [max(0, P + p[-1] - T) for p in places]
        level = min(begin) == max(begin)
        at: torch.Tensor | slice = slice(begin[0], begin[0] + T)
        mask = None
        if level and begin[0] >= P and T == 1 and state.seen_RP is None:
            # plain drawing: no mask, and both halves read the same id; few small calls count where rows are few
            x = self.embed(state.ids_BLK[:, begin[0] - P : begin[0] - P + 1]).repeat(halves, 1, 1)
        else:
            if level:
                at = torch.arange(begin[0], begin[0] + T, device=device)
            else:
                at = torch.tensor(begin, device=device)[:, None] + torch.arange(T, device=device)
            if T > 1 or not level or state.seen_RP is not None:
                mask = self.visible(at, max(begin) + T, None if state.seen_RP is None else state.seen_RP[rows])
            x = self._inputs(state, at, R, min(begin) < P)
        if cache is None:
            h = self.run(x, state.beside, at, mask)
        else:
            cache.crop(begin + cache.lengths[R:])
            h = self.run(x, state.beside, at, mask, causal=False, keep=cache.keep(rows))
            cache.advance(T, rows)
            cache.crop([P + p[-1] for p in places] + cache.lengths[R:])
        state.calls += 1
        state.rows_computed += R
        out = [[P + g - 1 - b for g in p] for b, p in zip(begin, places, strict=True)]
        if all(o == out[0] for o in out):
            first, count = out[0][0], len(out[0])
            return h[:, first : first + count] if out[0][-1] == first + count - 1 else h[:, out[0]]
        return h[torch.arange(R, device=device)[:, None], torch.tensor(out, device=device)]

    def _inputs(self, state: CausalState, at: torch.Tensor, R: int, with_prefix: bool) -> torch.Tensor:
        """Embeddings (R, T, D) of the positions at (T,) or (R, T)."""
        P, B = self.prefix, len(state.n)
        row = torch.arange(R, device=at.device)[:, None]
        x = self.embed(state.ids_BLK[row % B, (at - P).clamp(min=0)])
        if with_prefix:
            x = torch.where((at < P)[..., None], state.prefix_RPD[row, at.clamp(max=P - 1)].to(x), x)
        return x

    def commit(self, state: CausalState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the ids (B, 1, K) of each row's next position; complete rows stay as they are.

        Raises:
            ValueError: for an event of another shape, or if all rows are complete.
        """
        B, cache = len(state.n), state.cache
        if tuple(event.shape) != (B, 1, self.K):
            raise ValueError(f"a position needs an event of shape {(B, 1, self.K)}, got {tuple(event.shape)}")
        if min(state.n) >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        ends = [self.prefix + n for n in state.n]
        if cache is not None and any(m > e for m, e in zip(cache.lengths, ends * 2, strict=False)):
            at = torch.tensor(state.n, device=event.device).clamp(max=self.n_groups - 1)
            read = state.ids_BLK[torch.arange(B, device=event.device), at]
            same = (read == event[:, 0]).all(-1).tolist()
            cache.crop([m if s else min(m, e) for m, s, e in zip(cache.lengths, same * 2, ends * 2, strict=False)])
        self._write(state, event)
        state.n = [min(n + 1, self.n_groups) for n in state.n]
        state.ticket += 1

    def advance(self, state: CausalState, events_BTK: torch.Tensor, take_B: list[int]) -> None:
        """Fix the first take_B[b] of row b's ids at once; what was read of drafts that were right is kept.

        Raises:
            ValueError: for events of another shape, or more than a row has room for.
        """
        n, cache = state.n, state.cache
        if len(take_B) != len(n) or any(not 0 <= t <= self.n_groups - m for m, t in zip(n, take_B, strict=True)):
            raise ValueError(f"rows at {n} of {self.n_groups} positions can't take {take_B} more")
        T = max(take_B)
        if cache is not None:
            device = events_BTK.device
            at = torch.tensor(n, device=device)[:, None] + torch.arange(T, device=device)
            read = state.ids_BLK[torch.arange(len(n), device=device)[:, None], at.clamp(max=self.n_groups - 1)]
            right = (read == events_BTK[:, :T]).all(-1).long().cumprod(1).sum(1).tolist()
            ends = [self.prefix + m + min(r, t) for m, r, t in zip(n, right, take_B, strict=True)] * 2
            cache.crop([min(m, e) for m, e in zip(cache.lengths, ends, strict=False)])
        self._write(state, events_BTK[:, :T])
        state.n = [m + t for m, t in zip(n, take_B, strict=True)]
        state.ticket += 1

    def crop(self, state: CausalState, n: list[int]) -> None:
        """Keep the first n[b] positions of row b.

        Raises:
            ValueError: for more than a row holds.
        """
        state.keep_first(n)
        if state.cache is not None:
            ends = [self.prefix + m for m in n] * 2
            state.cache.crop([min(m, e) for m, e in zip(state.cache.lengths, ends, strict=False)])

    def tokens(self, state: CausalState) -> Tokens:
        """The finished ids, as the spec shapes them."""
        self.require_complete(state)
        return Tokens(state.ids_BLK.view(len(state.n), *self.spec.shape).clone(), self.spec)
