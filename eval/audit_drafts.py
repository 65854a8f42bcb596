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
from samplers.multi_draft import candidates as draw_candidates

from .exactness import Check, check_event
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
        (1, "spectr", 3, 1, 0.6, {"guidance": GUIDED}),
        (1, "distinct", 2, 9, 1.5, {"guidance": Guidance()}),
        (2, "tree", 3, 2, 0.0, {"guidance": GUIDED}),
        (2, "spectr", 2, 3, 0.6, {"guidance": GUIDED, "temperature": 0.8}),
    ):
        draft = tabular(heads, blur=blur) if blur else None
        sampler = cls(cls.Config(rule=rule, candidates=candidates, window=window, **options), draft=draft)
        origin = f"draft {blur} off" if blur else "n-grams"
        trials.append((f"k={heads} {rule}, {candidates} x {window}, {origin}", sampler, tabular(heads)))
    return trials


class ChoiceRecorder:
    """A rule for several candidates that remembers what it was asked, and answers as the one inside."""

    def __init__(self, rule: Callable[..., Choice], most: int = 64) -> None:
        """Args: rule: the rule. most: questions to remember, one a call."""
        self.rule, self.most, self.calls = rule, most, 0
        self.asked: list[tuple[Categorical, Categorical, int, bool]] = []

    def __call__(
        self, p: Categorical, q: Categorical, drafts_BGn: torch.Tensor, noise: Noise, *, replace: bool = True
    ) -> Choice:
        """Choose, and remember."""
        rows = (drafts_BGn[:, 0] >= 0).sum(1)
        b = int(rows.argmax()) if self.calls % 2 else self.calls % len(rows)
        if int(rows[b]) and len(self.asked) < self.most:
            at = lambda d: Categorical(d.logits_BGKV[b % len(d.logits_BGKV)][None, :1].clone())  # noqa: E731
            self.asked.append((at(p), at(q), int(rows[b]), replace))
        self.calls += 1
        return self.rule(p, q, drafts_BGn, noise, replace=replace)

    def replay(self, name: str, rule: Callable[..., Choice], n: int, seed: int, most: int = 1) -> list[Check]:
        """Candidates drawn from q and chosen among, n times a question: what comes out must follow p."""
        overlap = [float(torch.minimum(p.probs, q.probs).sum()) for p, q, _, _ in self.asked]
        order = sorted(range(len(overlap)), key=lambda i: abs(overlap[i] - 0.6))[:most]
        checks, noise = [], Noise(torch.arange(n) + seed * n)
        for i in order:
            p, q, many, again = self.asked[i]
            here = noise.at(position=torch.tensor([i]))
            q_n = Categorical(q.logits_BGKV.expand(n, -1, -1, -1))
            drafts = draw_candidates(q_n, many, here.at(purpose="replay"), replace=again)
            p_n = Categorical(p.logits_BGKV.expand(n, -1, -1, -1))
            choice = rule(p_n, q_n, drafts, here.at(purpose="verify"), replace=again)
            checks += check_event(f"{name}, replayed: question {i}", p, choice.ids)
        return checks
