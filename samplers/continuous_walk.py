"""The machine behind exact continuous speculative decoding: rows that walk along chains, token after token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from genlab.distributions import Chain, Gaussian
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise

from .base import Stats, Tally
from .chain import prepare


def prepare_draft(chain: Chain, c: Any, steps: int) -> Chain:
    """The draft's chain on the target's grid of times, its spread widened.

    Raises:
        ValueError: if it has another grid and can't change.
    """
    chain = prepare(chain, replace(c, denoising_steps=steps))
    return chain if c.widen == 1 else widened(chain, c.widen)


def widened(chain: Chain, factor: float) -> Chain:
    """Every step's standard deviation times a factor."""

    def wide(p: Gaussian) -> Gaussian:
        return Gaussian(p.mean, p.std * factor)

    def hold(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Any:
        held = holding(chain)(x, step, Gaussian(p.mean, p.std / factor))
        return lambda y, s: wide(held(y, s))

    return Chain(chain.start, lambda x, step: wide(chain.transition(x, step)), chain.steps, hold)


def holding(chain: Chain) -> Any:
    """The chain's `hold`; where it has none, drift and spread as they were."""

    def drift(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Any:
        return lambda y, _: Gaussian(y + (p.mean - x), p.std)

    return drift if chain.hold is None else chain.hold


class Models:
    """Target and draft over one batch in single file: their states are kept at the same tokens."""

    def __init__(
        self, target: Generator, draft: Generator | None, labels: Condition, config: Any, order_BL: torch.Tensor
    ) -> None:
        """Args: target, draft: models; without a draft the target is its own. order_BL: each row's positions."""
        self.target, self.draft, self.config, self.order_BL = target, draft, config, order_BL
        self.state: Any = target.start(labels, config.guidance)
        self.ahead: Any = self.state if draft is None else draft.start(labels, config.guidance)
        self.steps = 0

    @property
    def n_B(self) -> torch.Tensor:
        """Tokens the target holds, a row."""
        return torch.tensor(self.state.n, device=self.order_BL.device)

    def _where(self, state: Any, k: int = 0) -> torch.Tensor | None:
        if not self.target.any_order:
            return None
        n = torch.tensor(state.n, device=self.order_BL.device) + k
        return self.order_BL.gather(1, n[:, None])

    def next(self) -> Chain:
        """The target's chain of each row's next token, as it is predicted."""
        return self.target.predict(self.state, self._where(self.state))  # type: ignore[return-value]

    def many(self, drafts: list[torch.Tensor]) -> list[Chain]:
        """The target's chains of the next tokens, each given the drafts before it."""
        where = [self._where(self.state, k) for k in range(len(drafts) + 1)] if self.target.any_order else None
        return list(self.target.predict_many(self.state, drafts, where))  # type: ignore[arg-type]

    def own(self, chain: Chain) -> Chain:
        """The target's chain as the config wants it."""
        chain = prepare(chain, self.config)
        self.steps = chain.steps
        return chain

    def drafted(self) -> Chain:
        """The draft model's chain of each row's next token, on the target's grid."""
        assert self.draft is not None
        chain = self.draft.predict(self.ahead, self._where(self.ahead))
        return prepare_draft(chain, self.config, self.steps)  # type: ignore[arg-type]

    def settle(self, state: Any, event_B1C: torch.Tensor, rows_B: torch.Tensor) -> None:
        """Commit the next token of some rows; the others stay."""
        if not bool(rows_B.any()):
            return
        model, n = self.target if state is self.state else self.draft, list(state.n)
        assert model is not None
        model.commit(state, event_B1C, self._where(state))
        model.crop(state, [m + r for m, r in zip(n, rows_B.tolist(), strict=True)])

    def rewind(self, n_B: torch.Tensor) -> None:
        """Both back to what was final."""
        self.target.crop(self.state, n_B.tolist())
        if self.draft is not None:
            self.draft.crop(self.ahead, n_B.tolist())

    def cost(self) -> tuple[int, int]:
        """Calls and rows of both."""
        calls, rows = self.state.calls, self.state.rows_computed
        return (calls, rows) if self.draft is None else (calls + self.ahead.calls, rows + self.ahead.rows_computed)


@dataclass(eq=False)
class _Path:
    """What a draft left behind: a list a transition, and at the end the point it came to."""

    points: list[torch.Tensor] = field(default_factory=list)
    """Where each transition begins, (B, G, C)."""
    steps: list[torch.Tensor] = field(default_factory=list)
    """Its step, (B, G); S at the end of a token."""
    token: list[torch.Tensor] = field(default_factory=list)
    """How many tokens further than at the beginning, (B, G)."""
    part: list[torch.Tensor] = field(default_factory=list)
    """Which of `parts` is the token's chain, (B, G)."""
    mean: list[torch.Tensor] = field(default_factory=list)
    std: list[torch.Tensor] = field(default_factory=list)
    drawn: list[torch.Tensor] = field(default_factory=list)
    """The draft."""
    valid: list[torch.Tensor] = field(default_factory=list)
    """Whether the row drafted at all, (B, G)."""
    own: list[torch.Tensor] = field(default_factory=list)
    """Whether the target itself was evaluated there, so that its numbers are both p and q, (B, G)."""
    tokens: list[torch.Tensor] = field(default_factory=list)
    """Tokens that were finished on the way, (B, G, C)."""
    parts: list[Chain] = field(default_factory=list)
    """The target's chains as far as they are known, in single file as they were predicted."""

    def stand(self, x: torch.Tensor, s: torch.Tensor, token: torch.Tensor, part: torch.Tensor) -> None:
        """Note where it is."""
        for log, what in ((self.points, x), (self.steps, s), (self.token, token), (self.part, part)):
            log.append(what)

    def note(self, q: Gaussian, drawn: torch.Tensor, valid: torch.Tensor, own: torch.Tensor) -> None:
        """Note a draft and what it was drawn from."""
        std = q.std.expand_as(drawn)
        for log, what in (
            (self.mean, q.mean),
            (self.std, std),
            (self.drawn, drawn),
            (self.valid, valid),
            (self.own, own),
        ):
            log.append(what)

    def finish(self, x: torch.Tensor, over: torch.Tensor, token: torch.Tensor) -> None:
        """Note tokens that end here."""
        for i in range(int(token[over].max()) + 1):
            if i == len(self.tokens):
                self.tokens.append(torch.zeros_like(x))
            self.tokens[i] = torch.where((over & (token == i))[..., None], x, self.tokens[i])


class Walk:
    """Rows (B, G) at a token and a step each; a round drafts, verifies and moves them.

    With `models` G is 1, and rows go from token to token, every one conditioned on those before it. With `chains`
    each (b, g) is one token, whose context is settled.
    """

    def __init__(
        self,
        config: Any,
        verify: Any,
        noise: Noise,
        position: torch.Tensor,
        stats: Stats,
        models: Models | None = None,
        chains: tuple[Chain, Chain | None] | None = None,
    ) -> None:
        """A walk from the start.

        Args:
            config: a `ContinuousSpeculativeConfig`.
            verify: the verifier.
            noise: of the batch.
            position: in single file the positions of the tokens to come, (B, L); else of each place, (B, G).
            stats: where the cost is noted.
            models: target and draft in single file.
            chains: the target's chain of all places, and the draft's (None: the target drafts).
        """
        self.c, self.verify, self.models, self.stats = config, verify, models, stats
        self.chain: Chain | None = None  # the target's, of each row's token; raw in single file
        self.q: Chain | None = None
        if models is not None:
            self.chain = models.next()
            first = models.own(self.chain)
        else:
            assert chains is not None
            first, self.q = chains
            self.chain = first
        self.own_q = self.q
        self.S, self.start = first.steps, first.start
        B, G, C = first.start.mean.shape
        self.shape = (B, G, C)
        self.L = position.shape[1] if models is not None else 1
        self.position_RL = position if models is not None else position.reshape(-1, 1)
        self.seeds_R = noise.seeds_B[:, None].expand(B, G).flatten()
        starts = Noise(self.seeds_R, self.position_RL, purpose="start").normal(C)
        self.starts_LBGC = starts.transpose(0, 1).unflatten(1, (B, G))
        self.n_BG = torch.zeros(B, G, dtype=torch.long, device=position.device)
        self.s_BG = torch.zeros_like(self.n_BG)
        self.x = self._begin(self.n_BG)
        # what the target last said: where, at which step, its Gaussian; and which rows have such
        self.anchor = (self.x, self.s_BG, self.x, torch.ones_like(self.x))
        self.held_BG = torch.zeros_like(self.n_BG, dtype=torch.bool)
        self.rounds = 0
        self.tested = torch.zeros(2, self.L, self.S, dtype=torch.long)  # transitions tested, and accepted

    def _begin(self, n_BG: torch.Tensor) -> torch.Tensor:
        """x_0 of the n-th token. Chains of one generator share their start, whatever the context."""
        at = n_BG.clamp(max=self.L - 1)[None, ..., None].expand(1, *self.shape)
        return self.start.at(self.starts_LBGC.gather(0, at)[0].to(self.start.mean))

    def run(self) -> torch.Tensor:
        """Walk to the end: the last token of each place, (B, G, C). In single file the states hold all."""
        while bool((self.n_BG < self.L).any()):
            self.round()
        return self.x

    def tallies(self, first: int = 0) -> tuple[Tally, Tally]:
        """Transitions tested and accepted, by step and by number of the token, the walk's first token being `first`."""
        by_step, by_token = self.tested.sum(1).T.tolist(), self.tested.sum(2).T.tolist()
        return [(a, b) for a, b in by_step], [(0, 0)] * first + [(a, b) for a, b in by_token]

    def round(self) -> None:
        """Draft up to `window` transitions a row, verify them in one call of the head, and move."""
        if self.self_made and self.chain is None:
            assert self.models is not None
            self.chain = self.models.next()
        z, places = self._noise(self.c.window + 1)
        path = self._draft(z)
        p = self._target(path)
        self._move(path, p, z, places)
        self.rounds += 1

    # -- draft ----------------------------------------------------------------------------------------------

    def _draft(self, z: torch.Tensor) -> _Path:
        c, S, models = self.c, self.S, self.models
        limit = S if c.last == "spread" else S - 1
        live, path, q = self.n_BG < self.L, _Path(), self._drafting()
        path.parts = [] if self.chain is None else [self.chain]
        x, s, k, part = self.x, self.s_BG, torch.zeros_like(self.s_BG), torch.zeros_like(self.s_BG)
        anchor, held, age, hold, j = self.anchor, self.held_BG, torch.zeros_like(self.s_BG), None, 0
        while j < c.window:
            over = live & (s == S) & (self.n_BG + k + 1 < self.L)
            if models is not None and bool(over.any()):
                path.finish(x, over, k)
                models.settle(models.ahead, x, over[:, 0])
                k = k + over
                x, s, held = torch.where(over[..., None], self._begin(self.n_BG + k), x), s * ~over, held & ~over
                if self.self_made:
                    path.parts.append(models.next())
                    part = torch.full_like(part, len(path.parts) - 1)
                    q = self._widen(models.own(path.parts[-1]))
                else:
                    q = models.drafted()
            running = live & (s < limit)
            if not bool(running.any()):
                break
            need = running & (~held | (age >= c.every)) if c.every else running & ~held
            if bool(need.any()):
                said = q.transition(x, s.clamp(max=S - 1))
                self.stats.head_calls += 1
                fresh = (x, s, said.mean, said.std.expand_as(x))
                anchor = tuple(  # type: ignore[assignment]
                    torch.where(need if new.ndim == 2 else need[..., None], new, old)
                    for new, old in zip(fresh, anchor, strict=True)
                )
                held, age, hold = held | need, age * ~need, None
            if hold is None:
                at_x, at_s, mean, std = anchor
                hold = holding(q)(at_x, at_s, Gaussian(mean, std))
            # on to where a row crosses into its next token or the draft is evaluated; a row that has stopped goes on
            # with the others, and what it does then is not looked at
            n = c.window - j
            if models is not None and limit == S:
                n = min(n, int((S - s)[running].min()))
            if c.every:
                n = min(n, c.every - int(age[running].max()))
            ahead = s + torch.arange(n, device=s.device)[:, None, None]
            own = need & (self.self_made and c.widen == 1)
            for at, runs in zip(ahead, live & (ahead < limit), strict=True):
                d = hold(x, at.clamp(max=S - 1))
                path.stand(x, at, k, part if self.self_made else k)
                x = d.mean + d.std * z[j]
                path.note(d, x, runs, own)
                own, j = torch.zeros_like(own), j + 1
            s, age = (s + n).clamp(max=limit), age + n
        path.stand(x, s, k, part if self.self_made else k)
        return path

    @property
    def self_made(self) -> bool:
        """Whether the target drafts for itself."""
        return self.own_q is None if self.models is None else self.models.draft is None

    def _drafting(self) -> Chain:
        """The chain that drafts."""
        models = self.models
        if self.self_made:
            assert self.chain is not None
            return self._widen(self.chain if models is None else models.own(self.chain))
        if self.q is None:
            assert models is not None
            self.q = models.drafted()
        return self.q

    def _widen(self, chain: Chain) -> Chain:
        return chain if self.c.widen == 1 else widened(chain, self.c.widen)

    def _noise(self, width: int) -> tuple[torch.Tensor, Noise]:
        """Numbers (width, B, G, C) for the places ahead, never used before; and those places' addresses, (R, width)."""
        B, G, C = self.shape
        place = self.s_BG.flatten()[:, None] + torch.arange(width, device=self.s_BG.device)
        if self.models is None:
            token, step = torch.zeros_like(place), place.clamp(max=self.S - 1)
        else:
            token, step = self.n_BG.flatten()[:, None] + place // self.S, place % self.S
        noise = Noise(self.seeds_R, self.position_RL.gather(1, token.clamp(max=self.L - 1)), step)
        z = noise.at(purpose=f"draft{self.rounds}").normal(C).to(self.x)
        return z.transpose(0, 1).unflatten(1, (B, G)), noise.at(purpose=f"verify{self.rounds}")

    # -- verify ---------------------------------------------------------------------------------------------

    def _target(self, path: _Path) -> Gaussian:
        """The target's Gaussians at all points of a path, (J, B, G, C): one call of its head."""
        points, steps, models = torch.stack(path.points), torch.stack(path.steps).clamp(max=self.S - 1), self.models
        self.stats.head_calls += 1
        if models is not None and not self.self_made and (path.tokens or not path.parts):
            path.parts = models.many(path.tokens)
        first, *others = path.parts
        if not others:
            p = (first if models is None else models.own(first)).transition(points, steps)
            return self._shared(path, Gaussian(p.mean, p.std.expand_as(points)))
        # points of several tokens, one row each: side by side, as positions of one chain
        assert models is not None
        side = models.own(first.select(others, torch.stack(path.part)[..., 0].T))
        p = side.transition(points[:, :, 0].transpose(0, 1), steps[..., 0].T)
        mean, std = (v.expand(self.shape[0], len(points), -1).transpose(0, 1)[:, :, None] for v in (p.mean, p.std))
        return self._shared(path, Gaussian(mean, std.expand_as(mean)))

    @staticmethod
    def _shared(path: _Path, p: Gaussian) -> Gaussian:
        """Where the target drafted from an evaluation of its own, that is p as well: else they differ by rounding."""
        if not any(bool(own.any()) for own in path.own):
            return p
        own = torch.stack([*path.own, torch.zeros_like(path.own[0])])[..., None]
        mean, std = (torch.stack([*q, q[0]]) for q in (path.mean, path.std))
        return Gaussian(torch.where(own, mean, p.mean), torch.where(own, std, p.std))

    def _test(self, path: _Path, p: Gaussian, places: Noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Drafts and how many stand before the first rejection, (B, G); what the rejected ones become, (J, B, G, C)."""
        B, G, C = self.shape
        rows = lambda v: v.flatten(1, 2).transpose(0, 1)  # noqa: E731  (J, B, G, ·) to a row a place, (R, J, ·)
        valid = rows(torch.stack(path.valid)[..., None])[..., 0]
        J, q_std = valid.shape[1], torch.stack(path.std)
        places = replace(places, position=places.position[:, :J], step=places.step[:, :J])  # type: ignore[index]
        v = self.verify(
            # a place without a draft is not looked at
            Gaussian(rows(p.mean[:-1]), rows(p.std[:-1]).masked_fill(~valid[..., None], 1.0)),
            Gaussian(rows(torch.stack(path.mean)), rows(q_std).masked_fill(~valid[..., None], 1.0)),
            rows(torch.stack(path.drawn)),
            places,
            in_order=True,
            where=valid,
        )
        tested = valid & (torch.arange(J, device=valid.device) <= v.leading[:, None])
        number, step = (rows(torch.stack(t[:-1])[..., None])[..., 0] for t in (path.token, path.steps))
        at = (self.n_BG.flatten()[:, None] + number) * self.S + step
        for i, which in enumerate((tested, tested & v.accepted)):
            self.tested[i] += torch.bincount(at[which].cpu(), minlength=self.L * self.S).view(self.L, self.S)
        self.stats.proposed += int(valid.sum())
        self.stats.accepted += int(v.leading.sum())
        self.stats.trials += int(v.trials.sum())
        replaced = v.replacement.transpose(0, 1).unflatten(1, (B, G))
        return valid.sum(1).view(B, G), v.leading.view(B, G), replaced

    # -- move -----------------------------------------------------------------------------------------------

    def _move(self, path: _Path, p: Gaussian, z: torch.Tensor, places: Noise) -> None:
        S, live, before = self.S, self.n_BG < self.L, self.n_BG
        B, G, C = self.shape
        drafted = leading = torch.zeros_like(self.s_BG)
        if path.valid:
            drafted, leading, replaced = self._test(path, p, places)
        at = leading[None, ..., None].expand(1, B, G, C)
        here, mean, std, free = (t.gather(0, at)[0] for t in (torch.stack(path.points), p.mean, p.std, z))
        s, k, part = (torch.stack(t).gather(0, leading[None])[0] for t in (path.steps, path.token, path.part))
        # all stand: one step more, which the target draws itself, but at a token's end
        more = s < S
        x = torch.where(more[..., None], mean + std * free, here)
        if path.valid:
            fixed = replaced.gather(0, at.clamp(max=len(path.valid) - 1))[0]
            x = torch.where((leading < drafted)[..., None], fixed, x)
        x, k = torch.where(live[..., None], x, self.x), k * live
        done = live & (s + more == S)
        spread = std * self.c.widen if self.self_made else std  # as `_drafting` has it
        self.anchor = here, s.clamp(max=S - 1), mean, spread
        self.held_BG = live & ~done & (self.c.restart == "target")
        self.n_BG = before + k + done
        again = done & (self.n_BG < self.L)
        if self.models is not None:
            self._settle(path, x, k, done, part, before, bool(again.any()))
        self.x = torch.where(again[..., None], self._begin(self.n_BG), x)
        self.s_BG = torch.where(live, (s + more) * ~again, S)

    def _settle(
        self,
        path: _Path,
        x: torch.Tensor,
        k: torch.Tensor,
        done: torch.Tensor,
        part: torch.Tensor,
        before: torch.Tensor,
        stale: bool,
    ) -> None:
        """Bring the states to what is final, and keep the target's chains where they hold still."""
        models = self.models
        assert models is not None
        self.chain = path.parts[0]
        if not (path.tokens or bool(done.any())):
            return
        models.rewind(before[:, 0])
        for state in [models.state] if self.self_made else [models.state, models.ahead]:
            for i, token in enumerate(path.tokens):
                models.settle(state, token, k[:, 0] > i)
            models.settle(state, x, done[:, 0])
        self.q = None
        if stale:
            self.chain = None
        elif len(path.parts) > 1:
            self.chain = path.parts[0].select(path.parts[1:], part)
