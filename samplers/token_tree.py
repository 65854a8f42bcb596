"""Several drafts a position, verified together: sequences side by side, or a tree that grows where it is promising.

- `spectr`: k sequences drawn independently; k-sequential selection (Sun et al., arXiv 2310.15141).
- `distinct`: k sequences whose first ids differ (drawn without replacement); recursive rejection (arXiv 2402.14160).
- `tree`: as many nodes, each put where its estimated chance to be tested and taken is largest: under the node that the
  draft holds likely, or beside it (Xiong et al., DySpec, arXiv 2410.11744); siblings without replacement.

One forward reads all nodes, each of which sees its own path alone. From the root on, a node's children are the
candidates for its place (samplers/multi_draft.py); the path that is taken stays in the cache. It is exact though the
tree's shape hangs on what was drawn: whether a node gets another child is decided before that child is drawn, a test
looks at a place's candidates up to the one it takes, and what was drawn under that one came later, from noise of its
own (docs/exactness.md, 'One place' for each test in turn).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Stats
from .multi_draft import MOST_IDS, best_acceptance, choose, joint
from .speculative_draft import DraftConfig, DraftSampler
from .window import Count


@config
class MultiDraftConfig(DraftConfig):
    """How many drafts, and in what shape."""

    rule: Literal["spectr", "distinct", "tree"] = "tree"
    """Independent sequences, sequences that begin differently, or a tree of as many nodes."""
    candidates: int = 4
    """Sequences."""
    window: int = 4
    """Drafts of a sequence; a forward reads candidates * window nodes."""
    bound: bool = False
    """Compute what no rule can beat: the share of places, on average, where one of the candidates is taken. Slow; the
    sampler's `upper_bound` then says."""


class MultiDraftSampler(DraftSampler):
    """Draft a tree, verify it in one forward, take a path. `proposed` counts nodes."""

    name = "multi-draft"
    Config = MultiDraftConfig
    config: MultiDraftConfig
    choose = staticmethod(choose)
    bound_of: tuple[float, int] = (0.0, 0)
    """Sum of the places' bounds, and how many places."""

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids, one position after the other, whose heads make few enough joint ids for a table."""
        spec = generator.spec
        return super().supports(generator) and (spec.vocab or 0) ** spec.depth <= MOST_IDS

    @property
    def upper_bound(self) -> float:
        """The largest acceptance a place, on average, of any exact rule on these candidates; NaN without `bound`."""
        return self.bound_of[0] / self.bound_of[1] if self.bound_of[1] else float("nan")

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch; `model_calls` counts both models' evaluations (n-grams have none).

        Raises:
            ValueError: if no drafts are asked for, the draft doesn't fit, or heads make too many joint ids.
        """
        c, L, K, V = self.config, generator.n_groups, generator.spec.depth, generator.spec.vocab or 0
        if c.window < 1 or c.candidates < 1:
            raise ValueError(f"candidates and window must be at least 1, got {c.candidates} and {c.window}")
        drafter = self.drafter(generator)
        state, ahead = generator.start(labels, c.guidance), drafter.start(labels, c.guidance)
        position, count, nodes = torch.cat([generator.where(g) for g in range(L)]), Count(L), 0
        digits = torch.tensor([V**k for k in reversed(range(K))], device=position.device)
        split = lambda ids: ids[..., None] // digits % V  # noqa: E731
        round_ = 0
        while min(state.n) < L:
            here = noise.at(step=round_)
            tree = _Tree(c, drafter, ahead, split, [max(0, L - 1 - n) for n in state.n], here.at(purpose="draft"))
            tree.grow()
            if tree.size:
                dist = generator.predict_tree(state, split(tree.ids()), tree.parents())
            else:
                dist = generator.predict(state)  # type: ignore[assignment]
            p = joint(c.shape(Categorical(dist.logits_BGKV)))
            new_BT, path_BD, tested_B = self._walk(
                p, tree, torch.tensor(state.n, device=position.device), position, here
            )
            stood_B = (path_BD >= 0).sum(1)
            running_B = torch.tensor([n < L for n in state.n], device=position.device)
            count.add(state.n, (stood_B + tested_B).tolist(), stood_B.tolist())
            nodes += int(tree.count.sum())
            if tree.size:
                generator.keep_path(state, path_BD)
            take, event = ((stood_B + 1) * running_B).tolist(), split(new_BT)
            generator.advance(state, event, take)
            drafter.advance(ahead, event, take)
            round_ += 1
        tokens, stats = self.finish(generator, state, ahead, count)
        stats.proposed = nodes
        return tokens, stats

    def _walk(
        self, p_BNJ: Categorical, tree: _Tree, n_B: torch.Tensor, position: torch.Tensor, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Follow each row's path.

        Returns: its tokens (B, T), the nodes among them (B, T), -1 behind the path's end, and whether the last token's
        place had candidates (B,).
        """
        rule, rows, N = self.config.rule, torch.arange(len(n_B), device=n_B.device), tree.size
        law = torch.from_numpy(tree.law) if N else torch.ones(len(rows), 1, 1, dtype=torch.float64)
        q_BNJ = law.to(n_B.device).log()
        ids, parent, there = tree.ids(), tree.parents(), tree.there()
        at_BN = torch.zeros(len(n_B), N + 1, dtype=torch.bool, device=n_B.device)  # nodes that share the path so far
        at_BN[:, 0] = True
        node, open_, tested = rows * 0, rows >= 0, rows < 0  # node 0 is the row's end
        new: list[torch.Tensor] = []
        path: list[torch.Tensor] = []
        while bool(open_.any()):
            kid_BN = at_BN.gather(1, parent + 1) & there & open_[:, None]
            most = max(1, int(kid_BN.sum(1).max())) if N else 1
            kids = (~kid_BN).int().argsort(dim=1, stable=True)[:, :most]  # a row's own come first, in the order drawn
            drafts = torch.where(kid_BN, ids, -1).gather(1, kids) if N else torch.full_like(rows[:, None], -1)
            p = Categorical(p_BNJ.logits_BGKV[rows, node][:, None])
            q = Categorical(q_BNJ[rows, node][:, None, None])
            place = position[(n_B + len(new)).clamp(max=len(position) - 1)][:, None]
            here = noise.at(position=place, purpose="verify")
            choice = self.choose(p, q, drafts[:, None], here, replace=rule == "spectr")
            index, token = choice.index[:, 0], choice.ids[:, 0]
            if self.config.bound:
                self._bound(p, q, (drafts >= 0).sum(1))
            taken = open_ & (index < most)
            tested = torch.where(open_ & ~taken, (drafts >= 0).any(1), tested)
            new.append(token)
            if N:
                found = kids.gather(1, index.clamp(max=most - 1)[:, None])[:, 0]
                path.append(torch.where(taken, found, -1))
                node = torch.where(taken, found + 1, node)
                at_BN = F.pad(kid_BN & (ids == token[:, None]), (1, 0))
            open_ = taken
        none = torch.full_like(rows, -1)
        return torch.stack(new, 1), torch.stack(path or [none], 1), tested

    def _bound(self, p: Categorical, q: Categorical, many_B: torch.Tensor) -> None:
        for n in many_B.unique().tolist():
            if n:
                some = many_B == n
                mine, drafted = Categorical(p.logits_BGKV[some]), Categorical(q.logits_BGKV[some])
                best = best_acceptance(mine, drafted, n, replace=self.config.rule == "spectr")
                self.bound_of = self.bound_of[0] + float(best.sum()), self.bound_of[1] + len(best)


class _Tree:
    """Drafts behind each row's end, and what they were drawn from. Node -1 is the row's end; parents come first."""

    def __init__(
        self,
        c: MultiDraftConfig,
        drafter: Generator,
        state: Any,
        split: Callable[[torch.Tensor], torch.Tensor],
        room: list[int],
        noise: Noise,
    ) -> None:
        self.config, self.drafter, self.state, self.split, self.room = c, drafter, state, split, np.array(room)
        self.device = noise.seeds_B.device
        B, N = len(room), c.candidates * c.window
        slots = noise.at(position=torch.arange(N, device=self.device)).uniform(1)
        self.u = slots[..., 0].cpu().numpy()  # one number a node, whatever becomes of it
        self.id, self.parent = np.zeros((B, N), dtype=np.int64), np.full((B, N), -1)
        self.depth, self.count = np.zeros((B, N + 1), dtype=np.int64), np.zeros(B, dtype=np.int64)
        # what follows each node, the row's end first; and what is left of it behind the children drawn
        self.law, self.left = np.empty((B, N + 1, 0)), np.empty((B, N + 1, 0))
        self.known = np.full(B, -1)  # the last node whose law has been asked for

    @property
    def size(self) -> int:
        """Nodes of the largest row."""
        return int(self.count.max())

    def ids(self) -> torch.Tensor:
        """Joint ids (B, size), 0 behind a row's last."""
        return torch.from_numpy(self.id[:, : self.size]).to(self.device)

    def parents(self) -> torch.Tensor:
        """(B, size); -1 behind a row's last."""
        return torch.from_numpy(self.parent[:, : self.size]).to(self.device)

    def there(self) -> torch.Tensor:
        """Which nodes are there, (B, size)."""
        return torch.from_numpy(np.arange(self.size) < self.count[:, None]).to(self.device)

    def look(self) -> None:
        """Ask the draft what follows the rows' ends and all nodes so far."""
        if self.size:
            dist = self.drafter.predict_tree(self.state, self.split(self.ids()), self.parents())
        else:
            dist = self.drafter.predict(self.state)  # type: ignore[assignment]
        laws = joint(self.config.shape(Categorical(dist.logits_BGKV))).probs[:, :, 0].cpu().numpy()
        if not self.law.shape[-1]:
            self.law, self.left = (np.zeros((*self.law.shape[:2], laws.shape[-1])) for _ in range(2))
        column = np.arange(laws.shape[1])
        new = (column > self.known[:, None]) & (column <= self.count[:, None])
        self.law[:, : len(column)][new] = self.left[:, : len(column)][new] = laws[new]
        self.known = self.count.copy()

    def add(self, rows: np.ndarray, column: np.ndarray, replace: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a child of each of these rows' nodes, given by the law's column.

        Returns: the rows where the draft had an id left, the child's columns and its probabilities.
        """
        laws = self.left[rows, column]
        total = laws.cumsum(-1)
        some = total[:, -1] > 0
        rows, column, laws, total = rows[some], column[some], laws[some], total[some]
        i = self.count[rows]
        x = (total <= (self.u[rows, i] * total[:, -1])[:, None]).sum(-1)
        self.id[rows, i], self.parent[rows, i] = x, column - 1
        self.depth[rows, i + 1] = self.depth[rows, column] + 1
        self.count[rows] += 1
        if not replace:
            self.left[rows, column, x] = 0.0
        return rows, i + 1, laws[np.arange(len(x)), x] / total[:, -1]

    def grow(self) -> None:
        """Draw all nodes."""
        if self.room.any():
            self._best_first() if self.config.rule == "tree" else self._side_by_side()

    def _side_by_side(self) -> None:
        replace, tips = self.config.rule == "spectr", np.zeros((len(self.room), self.config.candidates), dtype=np.int64)
        alive = np.ones_like(tips, dtype=bool)
        for depth in range(min(self.config.window, int(self.room.max()))):
            self.look()
            for k in range(tips.shape[1]):
                # behind the first place each sequence goes on alone, as the only child of its node
                rows, column, _ = self.add(
                    (alive[:, k] & (depth < self.room)).nonzero()[0],
                    tips[alive[:, k] & (depth < self.room), k],
                    replace,
                )
                alive[:, k], tips[rows, k] = np.isin(np.arange(len(tips)), rows), column

    def _best_first(self) -> None:
        chance = np.full(self.left.shape[:2], -1.0)  # that the node's next child will be tested
        chance[self.room > 0, 0] = 1.0
        while True:
            self.look()
            while True:
                best = chance.argmax(1)
                open_ = (self.count < self.id.shape[1]) & (chance.max(1) > 0)
                rows = (open_ & (best <= self.known)).nonzero()[0]
                if not len(rows):
                    break
                column = best[rows]
                had = chance[rows, column]
                chance[rows, column] = -1.0  # unless a child is found
                there, child, share = self.add(rows, column, False)
                some = np.isin(rows, there)
                chance[there, column[some]] = had[some] * (1 - share)
                deeper = self.depth[there, child] < self.room[there]
                chance[there[deeper], child[deeper]] = (had[some] * share)[deeper]
            if not open_.any():
                return
