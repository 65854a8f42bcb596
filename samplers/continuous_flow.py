"""Continuous speculation for xAR: the steps of its stochastic sampler are Gaussian, too, and their spread is known.

A group of tokens is denoised at once, so a transition is one step of the whole group: a Gaussian over all its numbers,
whose standard deviation the grid of times fixes. Draft and target share it, and every residual is a reflection. All
points of a window are evaluated in one forward, each at a time of its own (`XAR.points`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from genlab.distributions import Chain, Flow, Gaussian
from genlab.generators.base import Condition, Generator, Guidance
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Sampler, Stats
from .continuous_walk import Models, Walk
from .flow import FlowConfig


def grid_of_times(steps: int | None, own: int, least: int = 1) -> list[float]:
    """The plain sampler's: from 1 to 0, `last` before the noiseless step.

    Raises:
        ValueError: for less than the least number of steps.
    """
    if steps is not None and steps < least:
        raise ValueError(f"denoising_steps must be at least {least} here, got {steps}")
    return FlowConfig().times(own if steps is None else steps, "euler-maruyama")


def group_chain(generator: Any, state: Any, group: int, times: list[float], noisy: bool = False) -> Chain:
    """The chain of a group's tokens side by side, (B, 1, n C); it holds its place, and reads the state's context.

    Args:
        generator: an xAR, or what else has `points`.
        state: its state.
        group: which group; those before it must be committed when the chain is evaluated.
        times: of its steps.
        noisy: leave out the last step, which has no noise.
    """
    n, C, B = generator.sizes[group], generator.config.channels, len(state.n)
    at = torch.tensor(times, dtype=torch.float64, device=state.x_BNC.device)
    length, dt = at.diff().abs(), at.diff()
    std = torch.where(at[1:] > 0, (2 * at[:-1] * length).sqrt(), 0.0)  # w = 2 t, xAR's diffusion
    steps = len(times) - 1 - noisy

    def broadcast(step: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        s = torch.as_tensor(step, device=x.device)
        s = s[(...,) + (None,) * (x.ndim - 1 - s.ndim)] if s.ndim else s
        return s.expand(x.shape[:-1])

    def mean_of(x: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        # dx = (v + E[eps | x]) dt with E[eps | x] = (1 - t) v + x
        return x + dt[s][..., None] * ((2 - at[s])[..., None] * v + x)

    def transition(x: torch.Tensor, step: int | torch.Tensor) -> Gaussian:
        s = broadcast(step, x)
        row = torch.arange(B, device=x.device)[:, None].expand(s.shape).flatten()
        v = generator.points(state, group, x.reshape(-1, n, C), row, [times[i] for i in s.flatten().tolist()])
        return Gaussian(mean_of(x, v.reshape(x.shape), s), std[s][..., None].expand_as(x))

    def hold(x: torch.Tensor, step: torch.Tensor, p: Gaussian) -> Any:
        """The clean tokens that the network saw at (x, step), held."""
        s = broadcast(step, x)
        v = ((p.mean - x) / dt[s][..., None] - x) / (2 - at[s])[..., None]
        clean = x - at[s][..., None] * v

        def later(y: torch.Tensor, step: torch.Tensor) -> Gaussian:
            s = broadcast(step, y)
            return Gaussian(mean_of(y, (y - clean) / at[s][..., None], s), std[s][..., None].expand_as(y))

        return later

    zero = torch.zeros(B, 1, n * C, dtype=torch.float64, device=at.device)
    return Chain(Gaussian(zero, torch.ones_like(zero[..., :1])), transition, steps, hold)


class Groups:
    """An xAR as a generator of chains, a group a token, whose context is taken at the last noisy time.

    What is committed is noisy; `tokens` does the last step of every group aside. One row: rows of an xAR stand at one
    group.
    """

    any_order = False

    def __init__(self, generator: Any, steps: int | None) -> None:
        """Args: generator: an xAR with groups of equal size. steps: denoising steps, None for its own."""
        if not generator.equal:
            raise ValueError("last=aside needs groups of equal size: entity 'scale' has none; take last=target")
        self.xar, self.times = generator, grid_of_times(steps, generator.config.steps, least=2)
        self.n_groups: int = generator.n_groups
        self.spec: TokenSpec = generator.spec

    def start(self, labels: Condition, guidance: Guidance | None = None) -> Any:
        """An empty state."""
        state = self.xar.start(labels, guidance)
        state.context_time = self.times[-2]
        return state

    def predict(self, state: Any, where: torch.Tensor | None = None) -> Chain:
        """The next group's noisy steps."""
        return group_chain(self.xar, state, state.group, self.times, noisy=True)

    def predict_many(
        self, state: Any, drafts: list[torch.Tensor], where: list[torch.Tensor] | None = None
    ) -> list[Chain]:
        """The next groups', given drafts of those before, which stay in the state's context until it is cropped."""
        n, parts = list(state.n), [self.predict(state)]
        for draft in drafts:
            self.commit(state, draft)
            parts.append(self.predict(state))
        state.n = n
        return parts

    def commit(self, state: Any, event: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Fix the next group's noisy tokens (1, 1, n C)."""
        self.xar.commit(state, event.unflatten(-1, (-1, self.xar.config.channels))[:, 0])

    def crop(self, state: Any, n: list[int]) -> None:
        """Forget groups."""
        state.n = [max(state.n[0], n[0])]
        self.xar.crop(state, n)

    def tokens(self, state: Any) -> Tokens:
        """The last step of every group, in its context."""
        clean, last = [], len(self.times) - 2
        for g, (size, end) in enumerate(zip(self.xar.sizes, self.xar.ends, strict=True)):
            x = state.x_BNC[:, end - size : end].flatten(1)[:, None]
            chain = group_chain(self.xar, state, g, self.times)
            clean.append(chain.transition(x, last).mean.reshape(len(x), size, -1))
        state.x_BNC = torch.cat(clean, 1)
        return self.xar.tokens(state)


def draw_flow(
    generator: Any, draft: Any, labels: Condition, noise: Noise, c: Any, verify: Any
) -> tuple[list[Tokens], Stats]:
    """One batch: the tokens, in parts, and their cost.

    Raises:
        ValueError: for options that flows don't have.
    """
    if c.temperature != 1 or c.last_std or c.last == "spread" or c.mode == "paper":
        raise ValueError(
            f"a {generator.kind} is sampled at temperature 1, with its noiseless last step: mode=exact, and "
            "last=target or last=aside"
        )
    stats = Stats()
    if c.last == "aside":
        # every step that is left is noisy: drafts may cross
        parts, noisy = [], replace(c, denoising_steps=None, last="spread")
        for b in range(len(labels)):
            row, cost = slice(b, b + 1), Stats()
            pair = [None if m is None else Groups(m, c.denoising_steps) for m in (generator, draft)]
            where = torch.arange(generator.n_groups, device=noise.seeds_B.device)[None]
            models = Models(pair[0], pair[1], labels[row], noisy, where)  # type: ignore[arg-type]
            walk = Walk(noisy, verify, noise.rows(row), where, cost, models=models)
            walk.run()
            cost.by_step, cost.by_position = walk.tallies()
            parts.append(models.target.tokens(models.state))
            cost.model_calls, cost.rows = models.cost()
            stats = stats + cost
        return parts, stats
    times = grid_of_times(c.denoising_steps, generator.config.steps)
    state = generator.start(labels, c.guidance)
    ahead = None if draft is None else draft.start(labels, c.guidance)
    for g in range(generator.n_groups):
        p = group_chain(generator, state, g, times)
        q = None if draft is None else group_chain(draft, ahead, g, times)
        position = torch.full((len(labels), 1), g, device=noise.seeds_B.device)
        walk = Walk(c, verify, noise, position, stats, chains=(p, q))
        event = walk.run()[:, 0].unflatten(-1, (-1, generator.config.channels))
        by_step, by_position = walk.tallies(g)
        stats = stats + Stats(by_step=by_step, by_position=by_position)
        for model, one in ((generator, state), (draft, ahead)):
            if model is not None:
                model.commit(one, event)
    stats.model_calls = state.calls + (0 if ahead is None else ahead.calls)
    stats.rows = state.rows_computed + (0 if ahead is None else ahead.rows_computed)
    stats.head_calls = 0  # a flow has no head: its evaluations are calls of the model
    return [generator.tokens(state)], stats


class AsideSampler(Sampler):
    """The plain sampler of an xAR whose context is taken at the last noisy time: group by group, step by step."""

    name = "flow, the last step aside"
    Config = FlowConfig
    config: FlowConfig

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators whose context may be noisy."""
        return hasattr(generator, "points")

    def draw(self, generator: Any, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch, all groups."""
        state = generator.start(labels, self.config.guidance)
        own = self.config.steps if isinstance(self.config.steps, int) else None
        times, clean = grid_of_times(own, generator.config.steps, least=2), []
        state.context_time = times[-2]
        for group in range(generator.n_groups):
            flow = generator.predict(state)
            assert isinstance(flow, Flow)
            path = flow.chain(times).path(noise.at(position=generator.where(group)))
            clean.append(path[-1])
            generator.commit(state, path[-2])
        state.x_BNC = torch.cat(clean, 1)
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
