"""Plain sampling of generators that predict a `Categorical`: group after group (LlamaGen, ELM, VAR)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from genlab.config import config
from genlab.distributions import Categorical
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Known, Sampler, SamplerConfig, Stats


@config
class CategoricalConfig(SamplerConfig):
    """How ids are drawn; applied in this order, guidance first."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest id."""
    top_k: int = 0
    """Keep the k likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of ids whose mass reaches p; 1 keeps all."""

    def shape(self, dist: Categorical) -> Categorical:
        """The distribution that ids are drawn from."""
        return dist.temperature(self.temperature).top_k(self.top_k).top_p(self.top_p)


@config
class AncestralConfig(CategoricalConfig):
    """The plain sampler."""

    naive: bool = False
    """Recompute everything for each group, without a cache: the same tokens, for benchmarks."""


class AncestralSampler(Sampler):
    """Group by group: predict, draw, commit."""

    name = "ancestral"
    Config = AncestralConfig
    config: AncestralConfig
    completes = True

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators over ids whose groups follow one another."""
        return generator.predicts is Categorical and not generator.any_order

    def draw(self, generator: Any, labels: Condition, noise: Noise, known: Known | None = None) -> tuple[Tokens, Stats]:
        """One batch, all groups.

        Raises:
            ValueError: for `naive` and a generator that can't do without its cache.
        """
        if self.config.naive and "cached" not in signature(generator.start).parameters:
            raise ValueError(f"a {generator.kind} has no way without its cache: leave naive out")
        options = {"cached": False} if self.config.naive else {}
        state = self.start(generator, labels, known, **options)
        groups = [generator.where(g) for g in range(state.n[0], generator.n_groups)]
        if not groups:
            return generator.tokens(state), Stats()
        # all at once: a hundred small calls a group otherwise, and the same numbers
        uniforms = noise.at(position=torch.cat(groups)).uniform(generator.event_ids)
        for u in uniforms.split([len(g) for g in groups], 1):
            generator.commit(state, self.config.shape(generator.predict(state)).pick(u))
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
