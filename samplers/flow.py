"""Plain sampling of generators that predict a `Flow`: Euler-Maruyama (xAR's), Euler, Heun."""

from __future__ import annotations

from typing import Literal

import torch

from genlab.config import config
from genlab.distributions import Flow
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Sampler, SamplerConfig, Stats


@config
class FlowConfig(SamplerConfig):
    """How each group's flow is integrated."""

    method: Literal["euler-maruyama", "euler", "heun"] = "euler-maruyama"
    """xAR's stochastic sampler, or the ODE by Euler or Heun (two evaluations a step)."""
    steps: int = 25
    """Steps a group; Euler-Maruyama's last one, from `last` to 0, has no noise."""
    last: float = 0.04
    """Euler-Maruyama: the time before the last step."""

    def times(self) -> list[float]:
        """The time grid, from 1 to 0, `steps` intervals.

        Raises:
            ValueError: for fewer than one step, or `last` outside (0, 1).
        """
        if self.steps < 1 or not 0 < self.last < 1:
            raise ValueError(f"steps must be at least 1 and last in (0, 1), got {self.steps} and {self.last}")
        end = self.last if self.method == "euler-maruyama" else 1 / self.steps
        noisy = torch.linspace(1.0, end, self.steps, dtype=torch.float64) if self.steps > 1 else torch.ones(1)
        return [*noisy.tolist(), 0.0]


class FlowSampler(Sampler):
    """Group by group: integrate the flow, commit, go on."""

    name = "flow"
    Config = FlowConfig
    config: FlowConfig

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over continuous tokens that predict flows."""
        return generator.predicts is Flow

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch, all groups."""
        times = self.config.times()
        state = generator.start(labels, self.config.guidance)
        for group in range(generator.n_groups):
            flow = generator.predict(state)
            assert isinstance(flow, Flow)
            here = noise.at(position=generator.where(group))
            if self.config.method == "euler-maruyama":
                event = flow.chain(times).sample(here)
            else:
                event = flow.integrate(here, times, heun=self.config.method == "heun")
            generator.commit(state, event)
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
