"""Toy generators whose distribution is known exactly: what a sampler draws from them can be held against the truth.

`TabularAR` draws ids from tables of random logits, so few that every sequence can be enumerated. `GaussianAR`
draws vectors by chains of linear-Gaussian steps, so that all tokens together are one Gaussian. Both are ordinary
generators: guided, causal, with rows that stand at different positions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from genlab.config import config
from genlab.distributions import Categorical, Chain, Gaussian, along
from genlab.generators.base import AnyOrderState, Condition, Generator, Guidance
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec


@dataclass(eq=False)
class ToyState(AnyOrderState):
    """Events so far, (B, L, K) ids or (B, L, C) vectors."""

    events: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class ToyGenerator(Generator):
    """What both toys share: one position a group, a log of events, the conventions for ragged rows."""

    width: int

    def where(self, group: int) -> torch.Tensor:
        """The position itself."""
        return torch.tensor([group])

    def _blank(self, labels: Condition, guidance: Guidance | None, dtype: torch.dtype) -> ToyState:
        labels = self.check_labels(labels)
        B = len(labels)
        events = torch.zeros(B, self.n_groups, self.width, dtype=dtype)
        return ToyState(labels_B=labels, guidance=guidance or self.default_guidance, n=[0] * B, events=events)

    def _read(self, state: ToyState, drafts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Events with the drafts written behind each row's end, and the positions (B, n + 1) that are predicted.

        Beyond a row's last position, the last is predicted again: to be ignored.
        """
        if min(state.n) >= self.n_groups:
            raise ValueError(f"all {self.n_groups} groups are committed already")
        n_B1, rows = torch.from_numpy(np.array(state.n))[:, None], torch.arange(len(state.n))
        events = torch.cat([state.events, state.events[:, :1]], 1)  # one spare place for what is out of range
        for i, draft in enumerate(drafts):
            events[rows, (n_B1[:, 0] + i).clamp(max=self.n_groups)] = draft[:, 0].to(events)
        state.calls += 1
        state.rows_computed += len(rows) * (
            1 + any(state.guidance.at(self.progress(g)) != 1 for g in range(self.n_groups))
        )
        return events[:, :-1], (n_B1 + torch.arange(len(drafts) + 1)).clamp(max=self.n_groups - 1)

    def _scales(self, guidance: Guidance) -> torch.Tensor:
        return torch.tensor([guidance.at(self.progress(g)) for g in range(self.n_groups)], dtype=torch.float64)

    def commit(self, state: ToyState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix each row's next event (B, 1, K) or (B, 1, C); complete rows stay as they are.

        Raises:
            ValueError: for an event of another shape, or if all rows are complete.
        """
        B = len(state.n)
        if tuple(event.shape) != (B, 1, self.width) or min(state.n) >= self.n_groups:
            raise ValueError(f"need an event {(B, 1, self.width)} for rows that are open, got {tuple(event.shape)}")
        n = torch.from_numpy(np.array(state.n))
        rows = (n < self.n_groups).nonzero()[:, 0]
        state.events[rows, n[rows]] = event[rows, 0].to(state.events)
        state.n = (n + 1).clamp(max=self.n_groups).tolist()
        state.ticket += 1

    def crop(self, state: ToyState, n: list[int]) -> None:
        """Keep the first n[b] events of row b.

        Raises:
            ValueError: for more than a row holds.
        """
        if len(n) != len(state.n) or min(n) < 0 or not all(map(operator.le, n, state.n)):
            raise ValueError("can't crop rows to more than they hold")
        state.n = list(n)
        state.ticket += 1

    def tokens(self, state: ToyState) -> Tokens:
        """The finished tokens."""
        if min(state.n) < self.n_groups:
            raise ValueError(f"only {min(state.n)} of {self.n_groups} groups are committed")
        return Tokens(state.events.reshape(len(state.n), *self.spec.shape).clone(), self.spec)


@config
class TabularConfig:
    """Sizes of a tabular generator: (vocab ** heads) ** (rows * columns) sequences."""

    kind: Literal["toy_tabular"] = "toy_tabular"
    vocab: int = 3
    """Ids of a head."""
    heads: int = 1
    """Sub-tokens of a position."""
    grid: tuple[int, int] = (2, 2)
    """Rows and columns."""
    seed: int = 0
    """Of the tables."""
    spread: float = 1.2
    """Standard deviation of the logits."""
    blur: float = 0.0
    """Standard deviation of a further perturbation, seeded apart: makes a draft model of the same seed."""


class TabularAR(ToyGenerator):
    """Logits from a table over (class, everything before); class `num_classes` is the unconditional one."""

    kind = "toy_tabular"
    Config = TabularConfig
    config: TabularConfig
    predicts = Categorical
    num_classes = 2

    def __init__(self, config: TabularConfig | None = None) -> None:
        """Args: config: sizes."""
        super().__init__(config or TabularConfig())
        c = self.config
        self.n_groups, self.width, self.base = math.prod(c.grid), c.heads, c.vocab**c.heads
        shape = (self.num_classes + 1, self.n_groups, self.base ** (self.n_groups - 1), c.heads, c.vocab)
        draw = lambda purpose: Noise(torch.tensor([c.seed]), purpose=purpose).normal(*shape)[0]  # noqa: E731
        self.table = c.spread * draw("table") + c.blur * draw("blur")
        self.digits = c.vocab ** torch.arange(c.heads - 1, -1, -1)

    @property
    def spec(self) -> TokenSpec:
        """A raster of ids, or of sub-tokens."""
        c = self.config
        return TokenSpec(kind="discrete" if c.heads == 1 else "binary", grid=c.grid, vocab=c.vocab, depth=c.heads)

    def start(self, labels: Condition, guidance: Guidance | None = None) -> ToyState:
        """No ids."""
        return self._blank(labels, guidance, torch.long)

    def predict(self, state: ToyState, where: torch.Tensor | None = None) -> Categorical:
        """The heads of each row's next position, logits (B, 1, K, V)."""
        return self.predict_many(state, [])[0]

    def predict_many(
        self, state: ToyState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Categorical]:
        """The heads of the next len(drafts) + 1 positions of each row."""
        events, places = self._read(state, drafts)
        prefix = self._codes(events)
        rows, scales, ticket = torch.arange(len(events)), self._scales(state.guidance), state.ticket
        logits = [self._guided(state.labels_B, at, prefix[rows, at], scales) for at in places.unbind(1)]
        return [Categorical(x[:, None], check=lambda: state.check(ticket)) for x in logits]

    def _codes(self, events_BLK: torch.Tensor) -> torch.Tensor:
        """Number (B, L) that stands for all before each position, its last id the lowest digit."""
        codes = [torch.zeros(len(events_BLK), dtype=torch.long)]
        for ids in (events_BLK * self.digits).sum(-1).unbind(1)[:-1]:
            codes.append(codes[-1] * self.base + ids)
        return torch.stack(codes, 1)

    def _guided(self, labels: torch.Tensor, at: torch.Tensor, code: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        cond, free = self.table[labels, at, code], self.table[self.num_classes, at, code]
        return free + scales[at][:, None, None] * (cond - free)

    def law(
        self, label: int, guidance: Guidance | None = None, shape: Callable[[Categorical], Categorical] = lambda d: d
    ) -> torch.Tensor:
        """Probability of every sequence, (base ** L,), first position the highest digit.

        Args:
            label: class.
            guidance: as for `start`.
            shape: temperature, top-k, top-p: what is done to every distribution before it is drawn from.
        """
        scales, law = self._scales(guidance or self.default_guidance), torch.ones(1, dtype=torch.float64)
        for g in range(self.n_groups):
            code = torch.arange(len(law))
            logits = self._guided(torch.full_like(code, label), torch.full_like(code, g), code, scales)
            heads, joint = shape(Categorical(logits[:, None])).probs[:, 0], torch.ones(len(law), 1, dtype=torch.float64)
            for k in range(self.config.heads):
                joint = (joint[:, :, None] * heads[:, k, None]).flatten(1)
            law = (law[:, None] * joint).flatten()
        return law

    def cells(self, tokens: Tokens) -> torch.Tensor:
        """Index into `law` of each row."""
        ids = (tokens.values.view(len(tokens), self.n_groups, self.width) * self.digits).sum(-1)
        return (ids * self.base ** torch.arange(self.n_groups - 1, -1, -1)).sum(-1)


@config
class GaussianARConfig:
    """Sizes of a linear-Gaussian generator."""

    kind: Literal["toy_gaussian"] = "toy_gaussian"
    tokens: int = 2
    """Length of the sequence."""
    channels: int = 1
    """Of a token."""
    steps: int = 6
    """Of each token's chain."""
    last_std: float = 0.0
    """Standard deviation of the last step: 0 is noiseless, as MAR's and xAR's own samplers."""
    seed: int = 0
    """Of the matrices."""
    blur: float = 0.0
    """Size of a further perturbation of the means, seeded apart: makes a draft model of the same seed."""
    blur_std: float = 0.0
    """The same of the steps' standard deviations; 0: a draft's are the target's."""
    order: Literal["raster", "masked"] = "raster"
    """One token after the other; or any order, every token's mean linear in all that are known."""


class GaussianAR(ToyGenerator):
    """Token i's chain: x_0 ~ N(0, I), x' = x + h (R x - x + z_i) + sigma eps, z_i linear in class and known tokens."""

    kind = "toy_gaussian"
    Config = GaussianARConfig
    config: GaussianARConfig
    predicts = Chain
    num_classes = 2

    def __init__(self, config: GaussianARConfig | None = None) -> None:
        """Args: config: sizes."""
        super().__init__(config or GaussianARConfig())
        c = self.config
        L, C, S = c.tokens, c.channels, c.steps
        self.n_groups, self.width, self.any_order = L, C, c.order == "masked"

        def draw(purpose: str, *shape: int) -> torch.Tensor:
            return Noise(torch.tensor([c.seed]), purpose=purpose).normal(*shape)[0]

        def blurred(purpose: str, *shape: int) -> torch.Tensor:
            return draw(purpose, *shape) + c.blur * draw(f"{purpose} blur", *shape)

        self.turn_CC = 0.5 * blurred("turn", C, C) / C**0.5
        self.memory_LLCC = 0.8 * blurred("memory", L, L, C, C) / C**0.5
        self.bias_NLC = blurred("bias", self.num_classes + 1, L, C)
        ramp = torch.linspace(1.2, 0.6, S, dtype=torch.float64)[:, None]
        self.std_SC = 0.8 * S**-0.5 * ramp * (0.2 * draw("std", S, C) + c.blur_std * draw("std blur", S, C)).exp()
        self.std_SC[-1] = c.last_std

    @property
    def spec(self) -> TokenSpec:
        """A row of vectors."""
        return TokenSpec(kind="continuous", grid=(1, self.n_groups), dim=self.width)

    def start(self, labels: Condition, guidance: Guidance | None = None) -> ToyState:
        """No tokens."""
        state = self._blank(labels, guidance, torch.float64)
        state.order_BL = torch.arange(self.n_groups).repeat(len(state.n), 1)
        return state

    def predict(self, state: ToyState, where: torch.Tensor | None = None) -> Chain:
        """The chain of each row's next token, (B, 1, C); in masked order of the open positions where (B, G)."""
        return self.predict_many(state, [], None if where is None else [where])[0]

    def predict_many(
        self, state: ToyState, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Chain]:
        """The chains of the next len(drafts) + 1 tokens of each row; in masked order of sets at these positions."""
        if self.any_order:
            return self._fill(state, drafts, where or [])
        events, places = self._read(state, drafts)
        scales, rows = self._scales(state.guidance), torch.arange(len(events))
        past_LL = torch.ones(self.n_groups, self.n_groups, dtype=torch.float64).tril(-1)
        carried_BLC = torch.einsum("ij,ijcd,bjd->bic", past_LL, self.memory_LLCC, events)
        cond, free = self.bias_NLC[state.labels_B], self.bias_NLC[self.num_classes]
        z_BLC = free + scales[:, None] * (cond - free) + carried_BLC
        return [self.chain(z_BLC[rows, at][:, None]) for at in places.unbind(1)]

    def _fill(self, state: ToyState, drafts: list[torch.Tensor], where: list[torch.Tensor]) -> list[Chain]:
        """Masked order: every set given what is known before it."""
        if len(where) != len(drafts) + 1:
            raise ValueError(f"masked order needs `where`, {len(drafts) + 1} sets of positions (B, G)")
        log: AnyOrderState = state
        events, scales, chains = state.events.clone(), self._scales(state.guidance), []
        cond, free = self.bias_NLC[state.labels_B], self.bias_NLC[self.num_classes]
        state.calls += 1
        state.rows_computed += len(where) * len(events)
        for i, at in enumerate(where):
            n_B = torch.tensor(log.n)
            known_BL = torch.zeros(events.shape[:2], dtype=torch.float64)
            known_BL.scatter_add_(1, log.order_BL, (torch.arange(self.n_groups) < n_B[:, None]).double())
            apart_LL = 1 - torch.eye(self.n_groups, dtype=torch.float64)
            carried = torch.einsum("bj,ij,ijcd,bjd->bic", known_BL, apart_LL, self.memory_LLCC, events)
            scale = scales[n_B + at.shape[1] - 1][:, None, None]  # a set is guided as its last token, as MAR's
            index = at[..., None].expand(-1, -1, self.width)
            chains.append(self.chain((free + scale * (cond - free) + carried).gather(1, index)))
            if i < len(drafts):
                events = events.scatter(1, index, drafts[i].to(events))
                log = log.after(at)
        return chains

    def commit(self, state: ToyState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """As the toys'; in masked order at the positions where (B, G)."""
        if not self.any_order:
            return super().commit(state, event)
        assert where is not None
        state.record(where)
        state.events = state.events.scatter(1, where[..., None].expand_as(event), event.to(state.events))
        return None

    def chain(self, z_BGC: torch.Tensor) -> Chain:
        """The chain of tokens whose context is z."""
        h = 1 / self.config.steps

        def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
            at = along(torch.as_tensor(step), x)
            at = at[..., 0] if at.ndim else at
            return Gaussian(x + h * (x @ self.turn_CC.T - x + z_BGC), self.std_SC[at].expand_as(x))

        def hold(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Callable[..., Gaussian]:
            drift = p.mean - x
            return lambda x, step: Gaussian(x + drift, self.std_SC[along(step, x)[..., 0]].expand_as(x))

        zero = torch.zeros_like(z_BGC)
        return Chain(Gaussian(zero, torch.ones_like(zero)), transition, self.config.steps, hold)

    def law(
        self,
        label: int,
        guidance: Guidance | None = None,
        shape: Callable[[Chain], Chain] = lambda c: c,
        sets: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (L C,) and covariance (L C, L C) of all tokens together.

        Args:
            label: class.
            guidance: as for `start`.
            shape: temperature and the like; it must leave the steps affine, with a spread that doesn't hang on x.
            sets: positions that are drawn together, in their order; None: one after the other.
        """
        C, L, eye = self.width, self.n_groups, torch.eye(self.width, dtype=torch.float64)
        zero = torch.zeros(C + 1, 1, C, dtype=torch.float64)
        basis = torch.cat([zero[:1, 0], eye])[:, None]
        still, moved = shape(self.chain(zero)), shape(self.chain(basis))
        # push x_0 = e_k (context 0) and context e_k (x_0 = 0) through the affine steps, and add up the noise
        carry_CC, gain_CC, noise_CC = (
            eye,
            torch.zeros(C, C, dtype=torch.float64),
            torch.zeros(C, C, dtype=torch.float64),
        )
        for s in range(still.steps):
            p = still.transition(basis, s)
            a_CC = (p.mean[1:, 0] - p.mean[:1, 0]).T
            b_CC = (moved.transition(zero, s).mean[1:, 0] - p.mean[:1, 0]).T
            std = p.std.expand_as(p.mean)[0, 0]
            carry_CC, gain_CC = a_CC @ carry_CC, a_CC @ gain_CC + b_CC
            noise_CC = a_CC @ noise_CC @ a_CC.T + torch.diag(std**2)
        start = still.start.std.expand(C + 1, 1, C)[0, 0]
        own_CC = carry_CC @ torch.diag(start**2) @ carry_CC.T + noise_CC
        at_group, scales = self._scales(guidance or self.default_guidance), torch.ones(L, dtype=torch.float64)
        before_LL, seen = torch.zeros(L, L, dtype=torch.float64), 0
        for i, some in enumerate(sets := sets or [[i] for i in range(L)]):
            for position in some:
                scales[position] = at_group[seen + len(some) - 1]
                before_LL[position, [j for earlier in sets[:i] for j in earlier]] = 1.0
            seen += len(some)
        free, cond = self.bias_NLC[self.num_classes], self.bias_NLC[label]
        mean_LC = (free + scales[:, None] * (cond - free)) @ gain_CC.T
        # x_i = mean_i + sum_j gain M_ij x_j + own noise: solve for all tokens
        link = torch.einsum("cd,ijde->icje", gain_CC, self.memory_LLCC)
        link = link * before_LL[:, None, :, None]
        solve = torch.linalg.inv(torch.eye(L * C, dtype=torch.float64) - link.reshape(L * C, L * C))
        return solve @ mean_LC.flatten(), solve @ torch.block_diag(*[own_CC] * L) @ solve.T
