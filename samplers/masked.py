"""MaskGIT's iterative sampler (Chang et al., arXiv 2202.04200), for generators of any order: ELM's MLM, ResGen.

Each step draws all masked positions at once, independently, and keeps those it is surest of. So it is a plain
sampler, but no exact one: positions that are kept together were drawn without regard for each other.

Over stacks of residual codes (ResGen, arXiv 2412.10208) the unit that is kept is a code: a code is as sure as the sum
it comes from, and a position that keeps some of its missing codes keeps the coarsest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch

from genlab.config import config
from genlab.distributions import Categorical, LowRankMixture
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens

from .ancestral import CategoricalConfig
from .base import Known, Sampler, Stats


@config
class MaskedConfig(CategoricalConfig):
    """How positions are unmasked."""

    steps: int | None = None
    """Steps, each a network evaluation; None: 10 over ids (what ELM's author finds best), 32 over stacks of codes."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Share masked behind step i of N, r = i / N: `cosine` cos(pi r / 2), `linear` 1 - r."""
    power: float | None = None
    """What this share is raised to; None: what the model was trained with, where it says so, else 1."""
    confidence: Literal["", "drawn", "entropy", "random"] = ""
    """How sure a position is: by what was drawn, log p(id) (MaskGIT's), which favours what is likely anywhere; by the
    distribution that it was drawn from, its negative entropy, so that what is kept is drawn as the model says; or not
    at all, any masked code as soon as another, which is what training shows. Empty: drawn over ids, random over stacks
    of codes, where the surest are the blank ones and would fill the picture."""
    confidence_temperature: float = 1.0
    """Gumbel noise on the confidence, times 1 - r: 0 keeps the surest, more is more diverse."""

    spread: float = 1.0
    """Over stacks of codes: what the deviation of the drawn component's normal is multiplied with; 0 takes its mean."""

    def masked(self, step: int, steps: int, length: int, open_now: int, power: float = 1.0) -> int:
        """Positions that stay masked behind a step (from 0) of so many: fewer than before, none behind the last."""
        r = (step + 1) / steps
        if r == 1:
            return 0
        share = math.cos(math.pi / 2 * r) if self.schedule == "cosine" else 1 - r
        power = power if self.power is None else self.power
        return max(min(int(length * share**power), open_now - 1), 0)


class MaskedSampler(Sampler):
    """Draw all masked positions, keep the surest, mask the rest again."""

    name = "masked"
    Config = MaskedConfig
    config: MaskedConfig
    exact = False
    completes = True

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators in any order, over ids or over sums of codes."""
        return generator.predicts in (Categorical, LowRankMixture) and generator.any_order

    def draw(
        self, generator: Generator, labels: Condition, noise: Noise, known: Known | None = None
    ) -> tuple[Tokens, Stats]:
        """One batch, all steps (fewer where there are fewer positions than steps).

        Raises:
            ValueError: for fewer than one step, a power that isn't positive, or a negative spread.
        """
        if self.config.steps is not None and self.config.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.config.steps}")
        if self.config.power is not None and self.config.power <= 0:
            raise ValueError(f"power must be positive, got {self.config.power}")
        if generator.predicts is LowRankMixture:
            return self._draw_stacks(generator, labels, noise, known)
        c, state = self.config, self.start(generator, labels, known)
        steps = c.steps or 10
        open_BM = state.open()
        L = open_BM.shape[1]
        for step in range(steps if L else 0):
            M = open_BM.shape[1]
            stay = c.masked(step, steps, L, M)
            dist = generator.predict(state, open_BM)
            assert isinstance(dist, Categorical)
            dist = c.shape(dist)
            here = noise.at(position=open_BM, step=step)
            event = dist.sample(here)
            sure = chance = here.at(purpose="confidence").gumbel()
            if c.confidence != "random":
                sure = (-dist.entropy if c.confidence == "entropy" else dist.log_prob(event)) / event.shape[-1]
                sure = sure + c.confidence_temperature * (1 - (step + 1) / steps) * chance
            order = (-sure).argsort(dim=1, stable=True)
            keep, left = order[:, : M - stay], order[:, M - stay :]
            index = keep[..., None].expand(-1, -1, event.shape[-1])
            generator.commit(state, event.gather(1, index), open_BM.gather(1, keep))
            open_BM = open_BM.gather(1, left)
            if not stay:
                break
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)

    def _draw_stacks(
        self, generator: Any, labels: Condition, noise: Noise, known: Known | None
    ) -> tuple[Tokens, Stats]:
        """One batch of a generator whose `commit` fixes some of a position's codes."""
        c, L, D = self.config, generator.n_groups, generator.spec.depth
        steps = c.steps or 32
        state, places = self.start(generator, labels, known), torch.arange(L, device=generator.device)
        whole = missing = int((D - state.filled_BL[0]).sum())

        def sums(where: torch.Tensor | None, here: Noise) -> tuple[LowRankMixture, torch.Tensor]:
            mixture = generator.predict(state, where)
            weights = c.shape(Categorical(mixture.logits_BGM[:, :, None])).logits_BGKV[:, :, 0]
            mixture = replace(mixture, logits_BGM=weights)
            return mixture, mixture.scale_deviation(c.spread).sample(here)

        for step in range(steps if whole else 0):
            stay = c.masked(step, steps, whole, missing, generator.config.mask_power)
            here, open_BL, where = noise.at(position=places, step=step), D - state.filled_BL, None
            chance = here.at(purpose="confidence").gumbel(D)
            if c.confidence in ("drawn", "entropy"):
                mixture, z = sums(None, here)
                # sums of fewer codes are smaller, hence denser: what counts is the density in units of their size
                sure = mixture.log_prob(z) if c.confidence == "drawn" else -mixture.entropy_bound
                sure = sure / z.shape[-1] + mixture.size_BG1[..., 0].log()
                sure_BLD = sure[..., None] + c.confidence_temperature * (1 - (step + 1) / steps) * chance
                count = _keep(sure_BLD, open_BL, missing - stay)
            else:  # what is kept is known before anything is drawn: the rest isn't
                count = _keep(chance, open_BL, missing - stay)
                where = count.topk(int((count > 0).sum(1).amax()), dim=1).indices
                z, count = sums(where, noise.at(position=where, step=step))[1], count.gather(1, where)
            generator.commit(state, z, where, count)
            missing = stay
            if not stay:
                break
        return generator.tokens(state), Stats(model_calls=state.calls, rows=state.rows_computed)


def _keep(sure_BLD: torch.Tensor, open_BL: torch.Tensor, n: int) -> torch.Tensor:
    """How many codes (B, L) of each position are among a row's n surest; only `open_BL` of them count."""
    taken = torch.arange(sure_BLD.shape[-1], device=open_BL.device) >= open_BL[..., None]
    kept = sure_BLD.masked_fill(taken, -math.inf).flatten(1).topk(n, dim=1).indices // sure_BLD.shape[-1]
    return torch.zeros_like(open_BL).scatter_add_(1, kept, torch.ones_like(kept))
