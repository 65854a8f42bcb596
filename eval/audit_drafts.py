"""The audit's trials of samplers with several candidates a place, and of the one that chooses: see `eval.audit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from genlab.distributions import Categorical
from genlab.generators.base import Guidance
from genlab.noise import Noise
from samplers.multi_draft import Choice

from .toys import TabularAR, TabularConfig

GUIDED = Guidance(scale=2.0, schedule="linear")


def break_choice(choose: Callable[..., Choice], how: str) -> Callable[..., Choice]:
    """A choice with a fault put in.

    `acceptance`: the first candidate's probability is 1.1 times what it is when it stands alone. `residual`: where no
    candidate is taken, a plain draw from p.
    """

    def broken(p: Categorical, q: Categorical, drafts_BGn: torch.Tensor, noise: Noise, **options: Any) -> Choice:
        choice, fault = choose(p, q, drafts_BGn, noise, **options), noise.at(purpose=f"{noise.purpose}/broken")
        if how == "residual":
            none = choice.index == drafts_BGn.shape[-1]
            return replace(choice, ids=torch.where(none, p.sample(fault)[..., 0], choice.ids))
        first = drafts_BGn[..., :1].clamp(min=0)
        right = (p.probs[:, :, 0].gather(-1, first) / q.probs[:, :, 0].gather(-1, first))[..., 0].clamp(max=1)
        extra = ((1.1 * right).clamp(max=1) - right) / (1 - right).clamp(min=1e-12)
        take = (drafts_BGn[..., 0] >= 0) & (fault.uniform(1)[..., 0] < extra)
        return Choice(torch.where(take, 0, choice.index), torch.where(take, first[..., 0], choice.ids))

    return broken


def tabular(heads: int, **options: Any) -> TabularAR:
    """A toy of ids."""
    return TabularAR(TabularConfig(heads=heads, vocab=3 if heads == 1 else 2, **options))


def multi_draft(cls: Any) -> list[tuple[str, Any, TabularAR]]:
    """Every rule, drafted by a model and by n-grams: (name, sampler, toy)."""
    trials = []
    for heads, rule, candidates, window, blur, options in (
        (1, "tree", 2, 2, 0.6, {"guidance": GUIDED}),
        (1, "spectr", 3, 1, 0.6, {"guidance": GUIDED, "top_k": 2}),
        (1, "distinct", 2, 9, 1.5, {"guidance": Guidance()}),
        (2, "tree", 3, 2, 0.0, {"guidance": GUIDED}),
        (2, "spectr", 2, 3, 0.6, {"guidance": GUIDED, "temperature": 0.8}),
    ):
        draft = tabular(heads, blur=blur) if blur else None
        sampler = cls(cls.Config(rule=rule, candidates=candidates, window=window, **options), draft=draft)
        origin = f"draft {blur} off" if blur else "n-grams"
        trials.append((f"k={heads} {rule}, {candidates} x {window}, {origin}", sampler, tabular(heads)))
    return trials
