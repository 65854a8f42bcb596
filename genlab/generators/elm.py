"""ELM: language models over a binary autoencoder's codes (Liu et al., arXiv 2410.16257).

A token is k sub-tokens of d bits. `ELM` draws position after position, its k heads in parallel, so that the
sub-tokens of a position are independent given what stands before it. `ELMMasked` is the masked variant: it sees
all positions, and predicts the masked ones in any order.

The published masked models have k = 1. For k > 1 the official code takes k times as many positions; here a
position stays one token, as in the causal model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Categorical
from genlab.nn.gpt import GPT
from genlab.noise import Noise
from genlab.processes import batch_mean
from genlab.tokens import Tokens, TokenSpec

from .base import AnyOrderState, Condition, Generator, Guidance
from .causal import CausalConfig, CausalLM


@config
class ELMConfig(CausalConfig):
    """Sizes of an ELM; the defaults are the paper's L with a 2-10 vocabulary."""

    kind: Literal["elm"] = "elm"
    dim: int = 1024
    """Width."""
    depth: int = 24
    """Blocks."""
    heads: int = 16
    """Attention heads."""
    sub_tokens: int = 2
    """Sub-tokens k of a token."""
    bits: int = 10
    """Bits d of a sub-token: a vocabulary of 2^d."""
    tokens: Literal["binary", "discrete", "residual"] = "binary"
    """Whose ids it takes: `binary`, a binary autoencoder's; `discrete`, of a codebook of 2^d, where k is 1 (the
    paper's comparison with VQ); `residual`, stacks of k codes of 2^d each (ours: a head a depth)."""

    @property
    def spec(self) -> TokenSpec:
        """A raster of k ids of d bits, or of ids.

        Raises:
            ValueError: for sub-tokens of a codebook.
        """
        if self.tokens == "discrete":
            if self.sub_tokens != 1:
                raise ValueError(
                    f"codebook ids are not cut up: tokens 'discrete' needs sub_tokens 1, got {self.sub_tokens}"
                )
            return TokenSpec(kind="discrete", grid=self.grid, vocab=2**self.bits)
        return TokenSpec(kind=self.tokens, grid=self.grid, vocab=2**self.bits, depth=self.sub_tokens)


class ELM(CausalLM):
    """The causal model."""

    kind = "elm"
    Config = ELMConfig
    config: ELMConfig

    @property
    def spec(self) -> TokenSpec:
        """A raster of k ids of d bits, or of a codebook's ids."""
        return self.config.spec

    @property
    def default_guidance(self) -> Guidance:
        """The scripts' for L: a linear ramp to 4."""
        return Guidance(scale=4.0, schedule="linear")

    def progress(self, group: int) -> float:
        """The official schedules' r: 1/N at the first position, 1 at the last."""
        return (group + 1) / self.n_groups


@config
class ELMMaskedConfig(ELMConfig):
    """Sizes of a masked ELM; the defaults are the paper's L with a 1-16 vocabulary."""

    kind: Literal["elm_masked"] = "elm_masked"  # type: ignore[assignment]
    sub_tokens: int = 1
    """Sub-tokens k of a token."""
    bits: int = 16
    """Bits d of a sub-token: a vocabulary of 2^d."""


@dataclass(eq=False)
class MaskedState(AnyOrderState):
    """Ids so far; the mask's id where there are none."""

    ids_BLK: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class ELMMasked(Generator):
    """The masked model: bidirectional, any positions at a call. Nothing can be cached: every id changes all."""

    kind = "elm_masked"
    Config = ELMMaskedConfig
    config: ELMMaskedConfig
    predicts = Categorical
    any_order = True

    def __init__(self, config: ELMMaskedConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together, or captions."""
        super().__init__(config)
        c = config
        if self.by_text:
            raise ValueError("elm_masked draws by class; for captions take elm, whose config also has condition='text'")
        self.num_classes, self.n_groups = c.num_classes, c.grid[0] * c.grid[1]
        self.K, self.V = self.spec.depth, self.spec.vocab or 0
        self.cls_embedding = nn.Embedding(c.num_classes + 1, c.dim)
        self.tok_embeddings = nn.ModuleList(nn.Embedding(self.V + 1, c.dim) for _ in range(self.K))  # id V: the mask
        self.proj = nn.Linear(self.K * c.dim, c.dim, bias=False) if self.K > 1 else None
        self.gpt = GPT(
            grid=c.grid, prefix=1, dim=c.dim, depth=c.depth, heads=c.heads, hidden=c.hidden, dropout=c.dropout
        )
        self.fc, self.ln = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim)
        self.bias = nn.Parameter(torch.zeros(self.K, self.V))
        for weight in (self.cls_embedding.weight, self.fc.weight, *(self.proj.parameters() if self.proj else ())):
            nn.init.normal_(weight, std=0.02)
        for table in self.tok_embeddings.parameters():
            # the head can't train its table, so start it at a size that gives it logits in small models too
            nn.init.normal_(table, std=c.dim**-0.5)
        nn.init.zeros_(self.fc.bias)

    @property
    def spec(self) -> TokenSpec:
        """A raster of k ids of d bits, or of a codebook's ids."""
        return self.config.spec

    @property
    def default_guidance(self) -> Guidance:
        """A constant 2."""
        return Guidance(scale=2.0, schedule="constant")

    def progress(self, group: int) -> float:
        """The r at which MaskGIT's cosine schedule has unmasked this many positions."""
        return 2 / math.pi * math.acos(1 - group / self.n_groups)

    def where(self, group: int) -> torch.Tensor:
        """The position itself, if they are taken in raster order."""
        return torch.tensor([group], device=self.device)

    def logits(self, ids_BLK: torch.Tensor, labels: torch.Tensor, where_BG: torch.Tensor) -> torch.Tensor:
        """Logits (B, G, K, V) at the positions (B, G), given ids of which id V is the mask; float32."""
        parts = [table(ids) for table, ids in zip(self.tok_embeddings, ids_BLK.unbind(-1), strict=True)]
        x = parts[0] if self.proj is None else self.proj(torch.cat(parts, -1))
        h = self.gpt(torch.cat([self.cls_embedding(labels)[:, None], x], 1), causal=False)
        h = h[torch.arange(len(h), device=h.device)[:, None], where_BG + 1]
        h = self.ln(F.gelu(self.fc(self.gpt.norm(h))))
        # the head is tied to the embeddings, which it doesn't train (as published)
        tables = [table[: self.V].detach().to(h.dtype) for table in self.tok_embeddings.parameters()]
        return torch.stack([h @ t.T + b for t, b in zip(tables, self.bias, strict=True)], 2).float()

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """Cross-entropy of the masked ids, nats; each row masks a share cos(pi u / 2), u uniform, at least one."""
        L = self.n_groups
        ids = tokens.view(len(tokens), L, self.K)
        u = noise.at(purpose="mask ratio").uniform(1)
        masked_B = (L * torch.cos(math.pi / 2 * u)).floor().clamp(min=1)
        rank = noise.at(purpose="mask").uniform(L).argsort(-1).argsort(-1)
        mask = rank < masked_B
        where = torch.arange(L, device=ids.device).expand(len(ids), L)
        seen = torch.where(mask[..., None], self.V, ids)
        logits = self.logits(seen, self.drop_labels(labels, self.config.label_drop, noise), where)
        nats = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape).mean(-1)
        hit = (logits.detach().argmax(-1) == ids).float().mean(-1)
        return {"loss": batch_mean(nats, mask), "accuracy": batch_mean(hit, mask)}

    # -- drawing ------------------------------------------------------------------------------------------------

    def start(self, labels: Condition, guidance: Guidance | None = None) -> MaskedState:
        """A state with every position masked."""
        labels = self.check_labels(labels)
        B, L = len(labels), self.n_groups
        return MaskedState(
            labels_B=labels,
            guidance=guidance or self.default_guidance,
            n=[0] * B,
            order_BL=torch.zeros(B, L, dtype=torch.long, device=self.device),
            ids_BLK=torch.full((B, L, self.K), self.V, device=self.device),
        )

    def predict(self, state: MaskedState, where: torch.Tensor | None = None) -> Categorical:
        """The K heads at the positions where (B, G), logits (B, G, K, V)."""
        return self.predict_many(state, [], None if where is None else [where])[0]

    def predict_many(
        self, state: MaskedState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Categorical]:
        """The distributions at each set of positions, given the drafts for the sets before: one row a draft.

        Args:
            state: what is committed.
            drafts: n events (B, G_i, K).
            where: n + 1 sets of positions (B, G_i).
        """
        if where is None or len(where) != len(drafts) + 1:
            raise ValueError(f"an elm_masked predicts at chosen positions: give {len(drafts) + 1} sets `where`, (B, G)")
        B, ids, rows, scales = len(state.n), state.ids_BLK, [], []
        done = list(state.n)
        for i, places in enumerate(where):
            rows.append(ids)
            scales.append([state.guidance.at(self.progress(min(n, self.n_groups))) for n in done])
            if i < len(drafts):
                ids = ids.scatter(1, places[..., None].expand_as(drafts[i]), drafts[i])
                done = [n + places.shape[1] for n in done]
        guided = any(s != 1 for row in scales for s in row)
        halves, widest = 1 + guided, max(w.shape[1] for w in where)
        at = torch.cat([F.pad(w, (0, widest - w.shape[1])) for w in where]).repeat(halves, 1)
        labels = state.labels_B.repeat(len(where))
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        logits = self.logits(torch.cat(rows).repeat(halves, 1, 1), labels, at)
        state.calls += 1
        state.rows_computed += len(logits)
        if guided:
            cond, uncond = logits.chunk(2)
            s = torch.tensor(scales, dtype=logits.dtype, device=logits.device).view(-1, 1, 1, 1)
            logits = cond + (s - 1) * (cond - uncond)
        ticket, parts = state.ticket, logits.split(B)
        return [
            Categorical(p[:, : w.shape[1]], check=lambda: state.check(ticket))
            for p, w in zip(parts, where, strict=True)
        ]

    def commit(self, state: MaskedState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the ids (B, G, K) at the positions where (B, G).

        Raises:
            ValueError: without positions, for an event of another shape, or a position that is taken.
        """
        if where is None or where.ndim != 2 or tuple(event.shape) != (*where.shape, self.K):
            shape = None if where is None else (*where.shape, self.K)
            raise ValueError(f"give positions `where` (B, G) and ids of shape {shape}, got {tuple(event.shape)}")
        state.record(where)
        state.ids_BLK.scatter_(1, where[..., None].expand_as(event), event)

    def crop(self, state: MaskedState, n: list[int]) -> None:
        """Mask again all but the first n[b] positions that row b committed.

        Raises:
            ValueError: for more than a row holds.
        """
        held = state.n
        state.keep_first(n)
        for b, (m, old) in enumerate(zip(n, held, strict=True)):
            state.ids_BLK[b, state.order_BL[b, m:old]] = self.V

    def peek(self, state: MaskedState) -> Tokens:
        """See `Generator.peek`."""
        return super().peek(replace(state, ids_BLK=state.ids_BLK.where(state.ids_BLK < self.V, 0)))

    def tokens(self, state: MaskedState) -> Tokens:
        """The finished ids, as the spec shapes them."""
        self.require_complete(state)
        return Tokens(state.ids_BLK.view(len(state.n), *self.spec.shape).clone(), self.spec)
