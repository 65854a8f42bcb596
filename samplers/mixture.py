"""Plain sampling of generators that predict a `GaussianMixture` (Divot, arXiv 2412.04432)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

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
    temperature: float = 1.0
    """Of the components' weights; 0 takes the likeliest."""


def draw_token(dist: GaussianMixture, variance: float, noise: Noise, temperature: float = 1.0) -> torch.Tensor:
    """A component by its weight, then a point of it (B, G, C).

    Raises:
        ValueError: for a negative factor or temperature.
    """
    if temperature < 0:
        raise ValueError(f"a temperature is at least 0, got {temperature}")
    if temperature == 0:
        likeliest = F.one_hot(dist.logits_BGM.argmax(-1), dist.logits_BGM.shape[-1]).bool()
        dist = replace(dist, logits_BGM=torch.zeros_like(dist.logits_BGM).masked_fill(~likeliest, -torch.inf))
    elif temperature != 1:
        dist = replace(dist, logits_BGM=dist.logits_BGM / temperature)
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
        state = generator.start(labels, self.config.guidance)
        for group in range(generator.n_groups):
            dist = generator.predict(state)
            assert isinstance(dist, GaussianMixture)
            drawn = draw_token(
                dist, self.config.variance, noise.at(position=generator.where(group)), self.config.temperature
            )
            generator.commit(state, drawn)
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)
