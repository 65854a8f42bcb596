"""Continuous speculative decoding: a draft runs ahead through denoising chains, the target verifies it in one call.

`exact`: the unit of acceptance is the transition, one denoising step of one token. A path of transitions, which may
cross token boundaries, is verified in one batched call of the target's head; at the first rejection the residual is
drawn and drafting restarts there (cf. arXiv 2501.05370; `docs/exactness.md` has the proof). `paper`: the published
rule of CSpD (arXiv 2411.11925), which is approximate; see `continuous_paper`.

The published plain samplers take the last step without noise, and a point can't be verified. The honest ways out:

- `last="target"`: that step is the target's own, so drafts end with the token: exact for the published sampler.
- `last="spread"`: it has a standard deviation `last_std`, in the target too; drafts cross into the tokens behind.
- `last="aside"` (xAR): context is taken at the last noisy time, and the last step done aside (`continuous_flow`).

`ContinuousSpeculativeSampler.plain` is the plain sampler of that same target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from genlab.config import config
from genlab.distributions import JointChain
from genlab.generators.base import Condition, Generator
from genlab.noise import Noise
from genlab.tokens import Tokens, concatenate

from .base import Sampler, Stats
from .chain import ChainConfig, ChainSampler, cosine_counts, prepare
from .continuous_flow import AsideSampler, draw_flow
from .continuous_walk import Models, Walk, prepare_draft
from .flow import FlowConfig, FlowSampler
from .verify import verify


@config
class ContinuousSpeculativeConfig(ChainConfig):
    """Who drafts, how far ahead, and what is done about the last step."""

    mode: Literal["exact", "paper"] = "exact"
    """The target's distribution, or the published rule."""
    draft: str = ""
    """Checkpoint of a drafting model over the same tokens and classes; none: the target drafts for itself, its output
    held for several steps."""
    window: int = 8
    """Transitions drafted a call of the target's head; in paper mode, tokens drafted a call of the target."""
    every: int = 0
    """Evaluate the draft's network every so many steps, and hold its output between them; 0: only where there is
    nothing to hold. The grid of times is the target's in any case."""
    restart: Literal["target", "draft"] = "target"
    """Whose output is held behind a verified step: the target's, which is known there, or the draft's, evaluated."""
    last: Literal["target", "spread", "aside"] = "target"
    """The last step: the target's own; or drafted, with `last_std`; or (xAR) done aside."""
    widen: float = 1.0
    """Factor of the draft's standard deviation."""
    prefill: float = 0.05
    """Paper mode: share of the tokens that the target draws first."""
    tempering: float = 1.0
    """Paper mode: divides the exponents of the ratio's two densities (the released code: 42)."""

    def check(self) -> None:
        """Refuse what can't work.

        Raises:
            ValueError: for numbers out of range, or options that contradict one another.
        """
        if self.window < 1 or self.every < 0 or self.widen <= 0 or self.tempering <= 0:
            raise ValueError(
                f"window must be at least 1, every not negative, widen and tempering positive; got {self.window}, "
                f"{self.every}, {self.widen} and {self.tempering}"
            )
        if not 0 <= self.prefill <= 1:
            raise ValueError(f"prefill is a share of the tokens, 0 to 1, got {self.prefill}")
        if (self.last == "spread" or self.mode == "paper") and self.last_std <= 0:
            raise ValueError(
                "a drafted last step needs a spread: set last_std, which is the target's own last step then "
                "(or last=target in exact mode, where the target takes it)"
            )


class ContinuousSpeculativeSampler(Sampler):
    """Draft, verify, advance; each row (in masked order: each position of a set) at its own pace.

    `proposed` and `accepted` count transitions (paper mode: tokens), `model_calls` and `head_calls` both models'.
    """

    name = "continuous-speculative"
    Config = ContinuousSpeculativeConfig
    config: ContinuousSpeculativeConfig
    verify = staticmethod(verify)

    def __init__(self, config: ContinuousSpeculativeConfig | None = None, draft: Generator | None = None) -> None:
        """Args: config: settings. draft: the drafting model itself, instead of `config.draft`."""
        super().__init__(config)
        self.draft = draft
        self.exact = self.config.mode == "exact"  # type: ignore[misc]

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Generators that predict chains whose positions may stand at steps of their own; and xAR."""
        if hasattr(generator, "points"):
            return True
        return ChainSampler.supports(generator) and not issubclass(generator.predicts, JointChain)

    def plain(self, generator: Generator) -> Sampler:
        """The plain sampler of the same target: what `exact` draws from, and `paper` is measured against."""
        c = self.config
        if hasattr(generator, "points"):
            flow = FlowConfig(guidance=c.guidance, fixed_batch=c.fixed_batch, steps=c.denoising_steps)
            return AsideSampler(flow) if c.last == "aside" else FlowSampler(replace(flow, method="euler-maruyama"))
        shared = {name: getattr(c, name) for name in ChainConfig.__dataclass_fields__}
        return ChainSampler(ChainConfig(**shared))

    def drafter(self, generator: Generator) -> Generator | None:
        """The drafting model, loaded if need be; None for self-speculation.

        Raises:
            ValueError: if it doesn't go with the generator.
        """
        if self.draft is None and self.config.draft:
            from genlab.hub import from_pretrained

            self.draft = from_pretrained(self.config.draft).to(generator.device)
        d = self.draft
        if d is None:
            return None
        if not (self.supports(d) and d.spec.fits(generator.spec) and d.any_order == generator.any_order):
            raise ValueError(
                f"the drafting model makes {d.spec.describe()}{' in any order' * d.any_order}, the large one "
                f"{generator.spec.describe()}{' in any order' * generator.any_order}: both must predict chains over "
                "the same tokens in the same order"
            )
        groups, its = ([m.where(g).tolist() for g in range(m.n_groups)] for m in (generator, d))
        if hasattr(d, "points") != hasattr(generator, "points") or groups != its:
            raise ValueError(
                f"a {d.kind} of {d.n_groups} groups can't draft for a {generator.kind} of {generator.n_groups}: both "
                "must draw the same groups of tokens one after the other, both in chains or both by flows"
            )
        if d.num_classes != generator.num_classes:
            raise ValueError(f"the drafting model knows {d.num_classes} classes, not {generator.num_classes}")
        return d.eval()

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch.

        Raises:
            ValueError: for settings that can't work, or a draft that doesn't fit.
        """
        c = self.config
        c.check()
        if hasattr(generator, "points"):
            parts, cost = draw_flow(generator, self.drafter(generator), labels, noise, c, self.verify)
            return concatenate(parts), cost
        if c.last == "aside":
            raise ValueError(
                f"last=aside takes context at a noisy time, which a {generator.kind} has not learned: it is xAR's way"
            )
        d, L = self.drafter(generator), generator.n_groups
        if not generator.any_order:
            order_BL = torch.cat([generator.where(g) for g in range(L)]).expand(len(labels), -1)
            return self._single_file(generator, d, labels, noise, order_BL)
        order_BL = noise.at(purpose="order").uniform(L).argsort(stable=True, dim=-1)
        counts = cosine_counts(L, c.calls)
        if c.mode == "paper" and max(counts) > 1:
            raise ValueError(f"the published rule tests one token after the other: set calls={L}")
        if c.mode == "exact" and (c.last == "target" or max(counts) > 1):
            return self._sets(generator, d, labels, noise, list(order_BL.split(counts, 1)))
        # one position after the other in an order of each row's own: rows can't share their forwards when ragged
        parts, stats = [], Stats()
        for b in range(len(labels)):
            row = slice(b, b + 1)
            tokens, cost = self._single_file(generator, d, labels[row], noise.rows(row), order_BL[row])
            parts, stats = [*parts, tokens], stats + cost
        return concatenate(parts), stats

    def _single_file(
        self, generator: Generator, d: Generator | None, labels: Condition, noise: Noise, order_BL: torch.Tensor
    ) -> tuple[Tokens, Stats]:
        from .continuous_paper import draw_paper

        models = Models(generator, d, labels, self.config, order_BL)
        stats = Stats()
        if self.config.mode == "paper":
            draw_paper(models, noise, self.config, stats)
        else:
            walk = Walk(self.config, self.verify, noise, order_BL, stats, models=models)
            walk.run()
            stats.by_step, stats.by_position = walk.tallies()
        stats.model_calls, stats.rows = models.cost()
        return generator.tokens(models.state), stats

    def _sets(
        self, generator: Generator, d: Generator | None, labels: Condition, noise: Noise, sets: list[torch.Tensor]
    ) -> tuple[Tokens, Stats]:
        """Masked order, several tokens a call: inside each set every position is a row of its own."""
        c, stats = self.config, Stats()
        state = generator.start(labels, c.guidance)
        ahead = d.start(labels, c.guidance) if d is not None else None
        for where in sets:
            p = prepare(generator.predict(state, where), c)  # type: ignore[arg-type]
            q = None if d is None else prepare_draft(d.predict(ahead, where), c, p.steps)  # type: ignore[arg-type]
            walk = Walk(c, self.verify, noise, where, stats, chains=(p, q))
            event = walk.run()
            by_step, by_position = walk.tallies(len(stats.by_position))
            stats += Stats(by_step=by_step, by_position=by_position)
            generator.commit(state, event, where)
            if d is not None:
                d.commit(ahead, event, where)
        stats.model_calls, stats.rows = state.calls, state.rows_computed
        if ahead is not None:
            stats.model_calls, stats.rows = stats.model_calls + ahead.calls, stats.rows + ahead.rows_computed
        return generator.tokens(state), stats
