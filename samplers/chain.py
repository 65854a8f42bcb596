"""Plain sampling of generators that predict a `Chain`: MAR, in random order or raster (arXiv 2406.11838)."""

from __future__ import annotations

import math

import torch

from genlab.config import config
from genlab.distributions import Chain
from genlab.generators.base import Condition, Generator
from genlab.nn.diffusion_head import DiffusionChain
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Known, Sampler, SamplerConfig, Stats


@config
class ChainConfig(SamplerConfig):
    """How many tokens at a time, and how each is denoised."""

    calls: int = 64
    """Generators of any order: in how many calls the tokens are drawn, fewer at first (a cosine). Raster takes one a
    token."""
    denoising_steps: int | None = None
    """Steps of the diffusion head; None takes the generator's own number."""
    temperature: float = 1.0
    """Factor of the noise in every denoising step; MAR's unguided models take 0.95."""
    last_std: float = 0.0
    """Standard deviation of the last denoising step; MAR's is noiseless."""


def cosine_counts(length: int, calls: int) -> list[int]:
    """How many tokens each call draws: floor(L cos(pi/2 (i + 1)/N)) stay hidden after call i, at least one less a call.

    Raises:
        ValueError: for fewer than one call.
    """
    if calls < 1:
        raise ValueError(f"drawing takes at least one call, got {calls}")
    counts, hidden = [], length
    for i in range(calls if length else 0):
        left = max(1, min(hidden - 1, math.floor(length * math.cos(math.pi / 2 * (i + 1) / calls))))
        left = 0 if i == calls - 1 else left
        counts.append(hidden - left)
        hidden = left
    return [n for n in counts if n]


def prepare(chain: Chain, config: ChainConfig) -> Chain:
    """The chain as the config wants it.

    Raises:
        ValueError: if another number of steps is asked of a chain that can't give it.
    """
    if config.denoising_steps not in (None, chain.steps):
        if not isinstance(chain, DiffusionChain):
            raise ValueError(f"the chain has {chain.steps} steps and no other number: leave denoising_steps out")
        chain = chain.respaced(config.denoising_steps)
    chain = chain.temperature(config.temperature)
    return chain.last_std(config.last_std) if config.last_std else chain


class ChainSampler(Sampler):
    """Set by set in a random order of the image's own, or group by group."""

    name = "chain"
    Config = ChainConfig
    config: ChainConfig
    completes = True

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators that predict chains."""
        return issubclass(generator.predicts, Chain)

    def draw(
        self, generator: Generator, labels: Condition, noise: Noise, known: Known | None = None
    ) -> tuple[Tokens, Stats]:
        """One batch."""
        state, stats = self.start(generator, labels, known), Stats()

        def step(here: torch.Tensor, where: torch.Tensor | None) -> None:
            chain = prepare(generator.predict(state, where), self.config)  # type: ignore[arg-type]
            stats.head_calls += chain.steps
            generator.commit(state, chain.sample(noise.at(position=here)), where)

        if generator.any_order:
            open_BM = state.open()
            rank = noise.at(purpose="order").uniform(generator.n_groups).gather(1, open_BM)
            order = open_BM.gather(1, rank.argsort(stable=True, dim=-1))
            for where in order.split(cosine_counts(order.shape[1], self.config.calls), 1):
                step(where, where)
        else:
            for group in range(state.n[0], generator.n_groups):
                step(generator.where(group), None)
        stats.model_calls, stats.rows = state.calls, state.rows_computed
        return generator.tokens(state), stats
