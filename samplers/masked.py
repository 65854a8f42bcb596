"""MaskGIT's iterative sampler (Chang et al., arXiv 2202.04200), for generators of any order over ids: ELM's MLM.

Each step draws all masked positions at once, independently, and keeps those it is surest of. So it is a plain
sampler, but no exact one: positions that are kept together were drawn without regard for each other.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Sampler, Stats


@config
class MaskedConfig(CategoricalConfig):
    """How positions are unmasked."""

    steps: int = 10
    """Steps, each a network evaluation; ELM's author finds about 10 best."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Share masked behind step i of N, r = i / N: `cosine` cos(pi r / 2), `linear` 1 - r."""
    confidence_temperature: float = 1.0
    """Gumbel noise on the confidence log p(id), times 1 - r: 0 keeps the surest, more is more diverse."""

    def masked(self, step: int, length: int, open_now: int) -> int:
        """Positions that stay masked behind a step (from 0): fewer than before, none behind the last.

        Raises:
            ValueError: for fewer than one step.
        """
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        r = (step + 1) / self.steps
        if r == 1:
            return 0
        share = math.cos(math.pi / 2 * r) if self.schedule == "cosine" else 1 - r
        return max(min(int(length * share), open_now - 1), 0)


class MaskedSampler(Sampler):
    """Draw all masked positions, keep the surest, mask the rest again."""

    name = "masked"
    Config = MaskedConfig
    config: MaskedConfig
    exact = False

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids in any order."""
        return generator.predicts is Categorical and generator.any_order

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch, all steps (fewer where there are fewer positions than steps)."""
        c, L = self.config, generator.n_groups
        state = generator.start(labels, c.guidance)
        open_BM = torch.arange(L, device=generator.device).expand(len(labels), L)
        for step in range(c.steps):
            M = open_BM.shape[1]
            stay = c.masked(step, L, M)
            dist = generator.predict(state, open_BM)
            assert isinstance(dist, Categorical)
            dist = c.shape(dist)
            here = noise.at(position=open_BM, step=step)
            event = dist.sample(here)
            sure = dist.log_prob(event) / event.shape[-1]
            sure = sure + c.confidence_temperature * (1 - (step + 1) / c.steps) * here.at(purpose="confidence").gumbel()
            order = (-sure).argsort(dim=1, stable=True)
            keep, left = order[:, : M - stay], order[:, M - stay :]
            index = keep[..., None].expand(-1, -1, event.shape[-1])
            generator.commit(state, event.gather(1, index), open_BM.gather(1, keep))
            open_BM = open_BM.gather(1, left)
            if not stay:
                break
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
