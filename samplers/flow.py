"""Plain sampling of generators that predict a `Flow`: Euler-Maruyama (xAR's), Euler, Heun."""

from __future__ import annotations

from typing import Literal

import torch

from genlab.config import config
from genlab.distributions import Flow
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Known, Sampler, SamplerConfig, Stats


@config
class FlowConfig(SamplerConfig):
    """How each group's flow is integrated."""

    method: Literal["euler-maruyama", "euler", "heun"] | None = None
    """xAR's stochastic sampler, or the ODE by Euler or Heun (two evaluations a step); None: the generator's own."""
    steps: int | tuple[int, ...] | None = None
    """Steps a group, one number for all or one each; None takes the generator's own. Euler-Maruyama's last one, from
    `last` to 0, has no noise."""
    last: float = 0.04
    """Euler-Maruyama: the time before the last step."""

    def steps_of(self, group: int, n_groups: int, own: int) -> int:
        """How many steps a group takes; `own` is what its generator recommends.

        Raises:
            ValueError: for fewer than one, or as many numbers as there are no groups.
        """
        if isinstance(self.steps, tuple) and len(self.steps) not in (1, n_groups):
            raise ValueError(f"steps {self.steps} names {len(self.steps)} groups; the generator has {n_groups}")
        steps = self.steps[group % len(self.steps)] if isinstance(self.steps, tuple) else self.steps
        steps = own if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return steps

    def times(self, steps: int, method: str) -> list[float]:
        """The time grid, from 1 to 0, `steps` intervals.

        Raises:
            ValueError: for `last` outside (0, 1).
        """
        if not 0 < self.last < 1:
            raise ValueError(f"last must be in (0, 1), got {self.last}")
        end = self.last if method == "euler-maruyama" else 1 / steps
        noisy = torch.linspace(1.0, end, steps, dtype=torch.float64) if steps > 1 else torch.ones(1)
        return [*noisy.tolist(), 0.0]


class FlowSampler(Sampler):
    """Group by group: integrate the flow, commit, go on."""

    name = "flow"
    Config = FlowConfig
    config: FlowConfig
    completes = True

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over continuous tokens that predict flows."""
        return generator.predicts is Flow

    def draw(
        self, generator: Generator, labels: Condition, noise: Noise, known: Known | None = None
    ) -> tuple[Tokens, Stats]:
        """One batch, all groups."""
        state = self.start(generator, labels, known)
        for group in range(state.n[0], generator.n_groups):
            flow = generator.predict(state)
            assert isinstance(flow, Flow)
            here = noise.at(position=generator.where(group))
            method = self.config.method or flow.method
            times = self.config.times(self.config.steps_of(group, generator.n_groups, flow.steps), method)
            if method == "euler-maruyama":
                event = flow.chain(times).sample(here)
            else:
                event = flow.integrate(here, times, heun=method == "heun")
            generator.commit(state, event)
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
