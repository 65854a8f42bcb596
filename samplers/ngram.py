"""A draft without a model: n-grams of the ids drawn so far, counted as decoding goes on.

A position's context are its neighbours that come before it: left, above and above left in a raster, the last ids in
one dimension. Counts of longer contexts are backed by those of shorter ones, down to the uniform distribution
(Dirichlet smoothing, MacKay and Peto 1995), so every id stays possible.

It speaks a generator's calls, so that samplers can't tell it from a small model. It counts ids that stand before the
place it predicts, its own drafts among them, so what it drafts from is a function of what came before: all that
exactness needs (docs/exactness.md, 'A sequence of places').
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator, Guidance, State
from genlab.generators.tree import paths
from genlab.tokens import Tokens, TokenSpec


@config
class NGramConfig:
    """What is counted."""

    order: int = 2
    """Neighbours in the longest context: left, above, above left (one dimension: the last ids)."""
    strength: float = 1.0
    """Weight of a shorter context's distribution, in counts."""
    memory: int = 0
    """Finished images whose ids are counted too, the newest. An image then depends on those drawn before it, not on
    its own seed alone; its distribution stays the same."""


@dataclass(eq=False)
class NGramState(State):
    """Ids so far."""

    ids_BLK: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class NGram(Generator):
    """Counts where a generator would have a network; its `calls` stay 0."""

    kind = "ngram"
    Config = NGramConfig
    config: NGramConfig
    predicts = Categorical

    def __init__(self, config: NGramConfig, target: Generator) -> None:
        """Count ids of `target`, which draws them one position after the other.

        Raises:
            ValueError: for a negative order or memory, or a strength that isn't positive.
        """
        if config.order < 0 or config.memory < 0 or config.strength <= 0:
            raise ValueError(f"order and memory must be at least 0 and strength positive, got {config}")
        super().__init__(config)
        self._spec = spec = target.spec
        self.num_classes, self.n_groups = target.num_classes, spec.length
        columns = spec.grid[-1]
        raster = spec.order == "raster" and len(spec.grid) > 1
        self.offsets = ([1, columns, columns + 1] if raster else [])[: config.order]
        self.offsets += [o for o in range(1, config.order + 1) if not raster]
        self.digits = [(spec.vocab or 0) ** k for k in reversed(range(spec.depth))]
        self.memory_MLK = torch.empty(0, spec.length, spec.depth, dtype=torch.long, device=target.device)

    @property
    def spec(self) -> TokenSpec:
        """The target's."""
        return self._spec

    def where(self, group: int) -> torch.Tensor:
        """The position itself."""
        return torch.tensor([group], device=self.memory_MLK.device)

    def start(self, labels: Condition, guidance: Guidance | None = None) -> NGramState:
        """No ids; neither the condition nor guidance matters here."""
        B, L, K = len(labels), self.n_groups, self._spec.depth
        device = self.memory_MLK.device
        return NGramState(
            labels_B=torch.zeros(B, dtype=torch.long, device=device),
            guidance=guidance or Guidance(),
            n=[0] * B,
            ids_BLK=torch.zeros(B, L, K, dtype=torch.long, device=device),
        )

    def predict(self, state: NGramState, where: torch.Tensor | None = None) -> Categorical:
        """The distribution of each row's next position, logits (B, 1, K, V)."""
        n_B = torch.tensor(state.n, device=state.ids_BLK.device)
        ticket = state.ticket
        return Categorical(self.law(state.ids_BLK, n_B).log()[:, None], check=lambda: state.check(ticket))

    def predict_many(
        self, state: NGramState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Categorical]:
        """The distributions of each row's next len(drafts) + 1 positions, each given the drafts before it."""
        ids, dists = state.ids_BLK.clone(), []
        n_B, rows = torch.tensor(state.n, device=ids.device), torch.arange(len(ids), device=ids.device)
        for draft in [*drafts, None]:
            dists.append(Categorical(self.law(ids, n_B).log()[:, None]))
            if draft is not None:
                room = n_B < self.n_groups
                ids[rows[room], n_B[room]] = draft[room, 0]
                n_B = n_B + 1
        return dists

    def predict_tree(self, state: NGramState, ids_BNK: torch.Tensor, parent_BN: torch.Tensor) -> Categorical:
        """The distributions behind each row's end and behind each node of its tree, logits (B, N + 1, K, V)."""
        (B, N), L, device = parent_BN.shape, self.n_groups, parent_BN.device
        # a row a node: its path written behind the row's end; one place more takes what is out of range
        ids = F.pad(state.ids_BLK, (0, 0, 0, 1))[:, None].repeat(1, N + 1, 1, 1)
        n_B1, path_BND = torch.tensor(state.n, device=device)[:, None], paths(parent_BN)
        b, i, d = (path_BND >= 0).nonzero(as_tuple=True)
        ids[b, i + 1, (n_B1[b, 0] + d).clamp(max=L)] = ids_BNK[b, path_BND[b, i, d]]
        n_BN = torch.cat([n_B1, n_B1 + (path_BND >= 0).sum(-1)], 1)
        return Categorical(self.law(ids[:, :, :L].flatten(0, 1), n_BN.flatten()).log().unflatten(0, (B, N + 1)))

    def law(self, ids_RLK: torch.Tensor, n_R: torch.Tensor) -> torch.Tensor:
        """Probabilities (R, K, V) of position n[r] (of the last, beyond it), given the ids before it."""
        (R, L, K), V = ids_RLK.shape, self._spec.vocab or 0
        n_R1 = n_R.clamp(max=L - 1)[:, None]
        q_RKV = torch.full((R, K, V), 1 / V, dtype=torch.float64, device=ids_RLK.device)
        own, shared = self._contexts(ids_RLK), self._contexts(self.memory_MLK).flatten(0, 1)
        here = own.gather(1, n_R1[..., None].expand(-1, -1, own.shape[-1]))
        hit = torch.arange(L, device=ids_RLK.device) < n_R1
        hit_shared = hit.new_ones(R, len(shared))
        for level in range(len(self.offsets) + 1):
            if level:
                hit = hit & (own[..., level - 1] == here[..., level - 1])
                hit_shared = hit_shared & (shared[:, level - 1] == here[..., level - 1])
            counts = self._count(ids_RLK.transpose(1, 2), hit, V)
            if len(shared):
                counts = counts + self._count(self.memory_MLK.flatten(0, 1).T.expand(R, K, -1), hit_shared, V)
            s = self.config.strength
            q_RKV = (counts + s * q_RKV) / (counts.sum(-1, keepdim=True) + s)
        return q_RKV

    def _contexts(self, ids_RLK: torch.Tensor) -> torch.Tensor:
        """A number for each neighbour of each position, -1 where there is none: (R, L, order)."""
        code = (ids_RLK * torch.tensor(self.digits, device=ids_RLK.device)).sum(-1)
        L = code.shape[1]
        parts = [F.pad(code, (o, 0), value=-1)[:, :L] for o in self.offsets]
        return torch.stack(parts, -1) if parts else code.new_empty(*code.shape, 0)

    @staticmethod
    def _count(ids_RKT: torch.Tensor, hit_RT: torch.Tensor, V: int) -> torch.Tensor:
        R, K, _ = ids_RKT.shape
        zero = torch.zeros(R, K, V, dtype=torch.float64, device=ids_RKT.device)
        return zero.scatter_add(-1, ids_RKT, hit_RT[:, None].expand(ids_RKT.shape).double())

    def commit(self, state: NGramState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the ids (B, 1, K) of each row's next position; complete rows stay as they are."""
        n_B = torch.tensor(state.n, device=event.device)
        rows = (n_B < self.n_groups).nonzero()[:, 0]
        state.ids_BLK[rows, n_B[rows]] = event[rows, 0]
        state.n = [min(n + 1, self.n_groups) for n in state.n]
        state.ticket += 1

    def crop(self, state: NGramState, n: list[int]) -> None:
        """Keep the first n[b] positions of row b."""
        if len(n) != len(state.n) or any(not 0 <= m <= old for m, old in zip(n, state.n, strict=True)):
            raise ValueError(f"can't crop rows at {state.n} positions to {n}")
        state.n = list(n)
        state.ticket += 1

    def remember(self, tokens: Tokens) -> None:
        """Count finished images from now on, as many of the newest as `memory` says."""
        if self.config.memory:
            new = tokens.values.view(-1, self.n_groups, self._spec.depth)
            self.memory_MLK = torch.cat([self.memory_MLK, new])[-self.config.memory :]
