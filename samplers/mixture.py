"""Plain sampling of generators that predict a `GaussianMixture` (Divot, arXiv 2412.04432)."""

from __future__ import annotations

import torch

from genlab.config import config
from genlab.distributions import Categorical, GaussianMixture
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Sampler, SamplerConfig, Stats


@config
class MixtureConfig(SamplerConfig):
    """How tokens are drawn from mixtures."""

    variance: float = 0.1
    """Factor of every component's variance, which the release sets to 0.1; 1 draws from the mixture itself, 0 takes the
    mean of the component drawn."""
    temperature: float | None = None
    """Of the components' weights; 0 takes the likeliest; None: the generator's own."""


def draw_token(dist: GaussianMixture, variance: float, noise: Noise) -> torch.Tensor:
    """A component by its weight, then a point of it, narrowed: (B, G, C)."""
    if variance:
        return dist.scale_variance(variance).sample(noise)
    k = Categorical(dist.logits_BGM[:, :, None]).sample(noise.at(purpose=f"{noise.purpose}/component"))
    return dist.mean_BGMC.gather(2, k[..., None].expand(-1, -1, 1, dist.mean_BGMC.shape[-1]))[:, :, 0]


class MixtureSampler(Sampler):
    """Group by group: a component, then its Gaussian, narrowed."""

    name = "mixture"
    Config = MixtureConfig
    config: MixtureConfig

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators that predict mixtures, group after group."""
        return generator.predicts is GaussianMixture and not generator.any_order

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch."""
        state, temperature = generator.start(labels, self.config.guidance), self.config.temperature
        if temperature is None:
            temperature = getattr(generator.config, "temperature", 1.0)
        for group in range(generator.n_groups):
            dist = generator.predict(state)
            assert isinstance(dist, GaussianMixture)
            at = noise.at(position=generator.where(group))
            drawn = draw_token(dist.temperature(temperature), self.config.variance, at)
            generator.commit(state, drawn)
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
