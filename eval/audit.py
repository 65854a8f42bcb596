"""Is a sampler's distribution the plain one's? `genlab audit toy --sampler all` asks where the answer is known.

On a real model it is not: see `audit_model`.

The toys' laws are computed, not sampled: every sequence of a tabular generator enumerated (chi-square), the joint
Gaussian of a chain of linear steps (moments, Kolmogorov-Smirnov on projections). The verifier is replayed on made-up
pairs, and on what it was asked in every trial. All tests together raise a false alarm with probability 1e-4
(Bonferroni). Broken controls, the same samplers with a verifier that accepts 10 % too often or skips the residual,
show that a difference would be seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from genlab.config import config
from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.generators.base import Generator, Guidance
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from samplers.base import Sampler
from samplers.chain import ChainConfig, cosine_counts, prepare
from samplers.verify import Distribution, Verdict, draw, verify

from . import audit_drafts
from .exactness import POWER, Check, Recorder, check_cells, check_normal, replay_pairs
from .toys import GaussianAR, GaussianARConfig, TabularAR, TabularConfig

ALPHA = 1e-4
SURE = ALPHA / 10_000  # the level of one test among more than there ever are
REPLAYS = 5  # of a pair, for every draw of a sequence: they are cheap
Broken = Literal["", "acceptance", "residual"]
Rule = Callable[..., Verdict]


@config
class AuditConfig:
    """What to audit."""

    target: str = "toy"
    """`toy`: generators whose law is known. Or a MODEL (shipped name, folder or Hub id): recorded pairs are replayed,
    and draws held against plain ones."""
    sampler: str = "all"
    """A registered sampler; of toys also `verifier` (the rule alone, on made-up pairs), or `all`."""
    broken: Broken = ""
    """Put a verifier in that accepts 10 % too often, or skips the residual: the audit must fail."""
    draws: int = 16_000
    """Toys: sequences a trial."""
    seed: int = 0
    """Of all draws; another seed is another audit."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """MODEL: a sampler option, name=value; may be repeated."""
    guidance: float | None = None
    """MODEL: guidance scale; the generator's own where not given."""
    images: int = 4096
    """MODEL: draws of the sampler, and of the plain one."""
    classes: str = "all"
    """MODEL: classes that are drawn in turn: `all`, or numbers (0,3-5)."""
    replays: int = 100_000
    """MODEL: of each recorded pair."""
    pairs: int = 4
    """MODEL: recorded pairs that are replayed, the most telling ones."""
    batch_size: int = 256
    """MODEL: images a batch."""
    out: Path | None = None
    """MODEL: keep the draws here; the same command goes on where it was interrupted."""
    device: str = "cpu"
    """MODEL: where it is drawn."""


def break_rule(rule: Rule, how: Broken) -> Rule:
    """A verifier with a fault put in.

    `acceptance`: the probability of acceptance is 1.1 times what it should be (at most 1). `residual`: a rejected
    draft is replaced by a plain draw from p.
    """
    if not how:
        return rule

    def broken(p: Distribution, q: Distribution, draft: torch.Tensor, noise: Noise, **options: Any) -> Verdict:
        verdict = rule(p, q, draft, noise, **{**options, "in_order": False})
        where = options.get("where")
        where = torch.ones_like(verdict.accepted) if where is None else where
        fault = noise.at(purpose=f"{noise.purpose}/broken")
        if how == "acceptance":
            right = verdict.log_accept.exp()
            extra = ((1.1 * right).clamp(max=1) - right) / (1 - right).clamp(min=1e-12)
            B, G = right.shape
            zero = torch.zeros(B, G, dtype=torch.float64)
            u = 0.5 * (1 + torch.erf(draw(Gaussian(zero[..., None], zero[..., None] + 1), fault)[..., 0] / 2**0.5))
            accepted = verdict.accepted | (where & (u < extra))
            return replace(
                verdict,
                accepted=accepted,
                replacement=torch.where(accepted[..., None], draft, verdict.replacement),
            )
        redraw = (where & ~verdict.accepted)[..., None]
        return replace(verdict, replacement=torch.where(redraw, draw(p, fault).to(draft), verdict.replacement))

    return broken


def uses_rule(sampler: Sampler) -> bool:
    """Whether it tests drafts (Gumbel-coupled ones need no test)."""
    tests = hasattr(sampler, "verify") or hasattr(sampler, "choose")
    return tests and sampler.exact and getattr(sampler.config, "coupling", "") != "gumbel"


def with_rule(sampler: Sampler, rule: Any) -> Sampler:
    """The same sampler with another verifier."""
    other = type(sampler)(sampler.config)
    other.__dict__.update(sampler.__dict__)
    setattr(other, "choose" if hasattr(sampler, "choose") else "verify", rule)
    return other


def broken_rule(sampler: Sampler, how: Broken) -> Any:
    """The sampler's verifier with a fault put in."""
    if hasattr(sampler, "choose"):  # several candidates a place
        return audit_drafts.break_choice(sampler.choose, how)
    return break_rule(sampler.verify, how)  # type: ignore[attr-defined]


def recorder_of(sampler: Sampler, each: int = 1) -> Recorder | audit_drafts.ChoiceRecorder:
    """Something to put in the verifier's place, which remembers what it was asked, `each` pairs of one call."""
    if hasattr(sampler, "choose"):
        return audit_drafts.ChoiceRecorder(sampler.choose)
    return Recorder(sampler.verify, each=each)  # type: ignore[attr-defined]


def replayed(
    name: str, recorder: Recorder | audit_drafts.ChoiceRecorder, n: int, seed: int, how: Broken = "", pairs: int = 1
) -> list[Check]:
    """Replay the most telling of the recorded questions n times each, with the recorded rule or a broken one."""
    if isinstance(recorder, audit_drafts.ChoiceRecorder):
        rule = audit_drafts.break_choice(recorder.rule, how) if how else recorder.rule
        return recorder.replay(name, rule, n, seed, pairs)
    telling, options = recorder.telling(pairs, seed), {"heads": recorder.heads}
    if not telling or not isinstance(telling[0][0], Categorical):
        options = {}
    checks = replay_pairs(telling, break_rule(recorder.rule, how), n, seed, **options)
    return [replace(c, name=f"{name}, replayed: {c.name}") for c in checks]


@dataclass(frozen=True)
class Trial:
    """One sampler with one config on one toy."""

    name: str
    sampler: Sampler
    toy: TabularAR | GaussianAR
    label: int = 0

    def checks(self, draws: int, seed: int, how: Broken = "") -> tuple[list[Check], dict[str, float]]:
        """Draw, and hold the tokens against the toy's law; also calls and acceptance."""
        sampler = self.sampler if not how else with_rule(self.sampler, broken_rule(self.sampler, how))
        seeds = torch.arange(draws) + seed * draws
        out = sampler.sample(self.toy, torch.full((draws,), self.label), seeds, batch_size=draws)
        c, tokens = sampler.config, out.tokens
        if isinstance(self.toy, TabularAR):
            law = self.toy.law(self.label, c.guidance, getattr(c, "shape", lambda d: d))
            counts = torch.bincount(self.toy.cells(tokens), minlength=len(law))
            checks = [check_cells(self.name, counts.numpy(), law.numpy())]
        else:
            x, zero, one = self._whitened(tokens.values.flatten(1), seeds)
            checks = check_normal(self.name, x, zero, one)
            if self.toy.n_groups > 1:  # the first token alone, too
                C = self.toy.width
                checks += check_normal(f"{self.name}, first token", x[:, :C], zero[:C], one[:C, :C], seed=1)
        if not how:
            checks.append(self._rows_alone(sampler, seeds[:16], tokens.values[:16]))
        s = out.stats
        return checks, {"calls": s.model_calls, "acceptance": s.accepted / s.proposed if s.proposed else float("nan")}

    def _whitened(self, x_ND: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences with their law's mean and covariance taken out, and what is left: 0 and 1.

        The Cholesky root keeps the first tokens first. In masked order each row has the law of its own order.
        """
        c, toy = self.sampler.config, self.toy
        assert isinstance(toy, GaussianAR)
        shape = (lambda chain: prepare(chain, c)) if isinstance(c, ChainConfig) else lambda chain: chain
        order = torch.arange(toy.n_groups).expand(len(seeds), -1)
        counts = [1] * toy.n_groups
        if toy.any_order:
            order = Noise(seeds, purpose="order").uniform(toy.n_groups).argsort(stable=True, dim=-1)
            counts = cosine_counts(toy.n_groups, c.calls)
        orders, which = order.unique(dim=0, return_inverse=True)
        y = torch.empty_like(x_ND, dtype=torch.float64)
        for i, one in enumerate(orders):
            mean, cov = toy.law(self.label, c.guidance, shape, [s.tolist() for s in one.split(counts)])
            root = torch.linalg.cholesky(cov)
            y[which == i] = torch.linalg.solve_triangular(root, (x_ND[which == i].double() - mean).T, upper=False).T
        D = x_ND.shape[1]
        return y, torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)

    def recorded(self, seed: int) -> Recorder | audit_drafts.ChoiceRecorder | None:
        """What its verifier is asked in a few sequences; None where it has none."""
        if not uses_rule(self.sampler):
            return None
        recorder = recorder_of(self.sampler, each=8)  # a toy's sequence takes few calls
        seeds = torch.arange(32) + (seed + 1) * 1_000_003
        with_rule(self.sampler, recorder).sample(self.toy, torch.full((32,), self.label), seeds)
        return recorder

    def _rows_alone(self, sampler: Sampler, seeds: torch.Tensor, values: torch.Tensor) -> Check:
        """Batches of 1 and 8 must give the rows of the large batch: the law is theirs then, too."""
        labels, same = torch.full((len(seeds),), self.label), True
        for size, n in ((1, 2), (8, 16)):
            alone = sampler.sample(self.toy, labels[:n], seeds[:n], batch_size=size).tokens.values
            same &= torch.allclose(alone, values[:n], rtol=1e-5, atol=1e-5)
        return Check(f"{self.name}: batches of 1 and 8 give the same rows", "equal", len(seeds), 0.0, 0, float(same))


GUIDED = Guidance(scale=2.0, schedule="linear")


def _tabular(heads: int, **options: Any) -> TabularAR:
    return TabularAR(TabularConfig(heads=heads, vocab=3 if heads == 1 else 2, **options))


def _jacobi(cls: Any) -> list[Trial]:
    trials = []
    rows: list[tuple[int, str, str, int, bool, int, str]] = [
        # heads, init, coupling, window, guided, top_k, test of several heads
        (1, "model", "none", 3, True, 0, "joint"),
        (1, "random", "none", 2, False, 0, "joint"),
        (1, "horizontal", "none", 1, True, 2, "joint"),
        (1, "vertical", "none", 9, False, 0, "joint"),
        (1, "random", "maximal", 3, True, 0, "joint"),
        (1, "model", "maximal", 3, False, 0, "joint"),
        (1, "horizontal", "maximal", 2, True, 0, "joint"),
        (1, "vertical", "maximal", 3, False, 2, "joint"),
        (1, "model", "gumbel", 3, True, 2, "joint"),
        (2, "random", "none", 3, True, 0, "joint"),
        (2, "model", "maximal", 2, True, 0, "joint"),
        (2, "horizontal", "maximal", 3, False, 0, "each"),
        (2, "vertical", "none", 2, True, 0, "each"),
        (2, "model", "gumbel", 3, False, 0, "joint"),
    ]
    for heads, init, coupling, window, guided, top_k, test in rows:
        c = cls.Config(
            init=init,
            coupling=coupling,
            window=window,
            top_k=top_k,
            heads=test,
            guidance=GUIDED if guided else Guidance(),
        )
        name = f"k={heads} {init}, {coupling}, window {window}{', guided' * guided}{f', top-k {top_k}' * (top_k > 0)}"
        trials.append(Trial(name + (f", {test}" if heads > 1 else ""), cls(c), _tabular(heads)))
    return trials


def _drafting(cls: Any) -> list[Trial]:
    trials = []
    for heads, window, blur, options in (
        (1, 2, 0.6, {"guidance": GUIDED}),
        (1, 9, 1.5, {"guidance": GUIDED, "top_k": 2}),
        (2, 1, 0.6, {"guidance": Guidance(), "temperature": 0.8}),
        (2, 3, 0.6, {"guidance": GUIDED, "heads": "each"}),
    ):
        sampler = cls(cls.Config(window=window, **options), draft=_tabular(heads, blur=blur))
        trials.append(Trial(f"k={heads} window {window}, draft {blur} off", sampler, _tabular(heads)))
    return trials


def _continuous(cls: Any) -> list[Trial]:
    trials = []
    rows: list[tuple[int, str, float, dict[str, Any]]] = [
        # channels, order, how far the draft model is off (0: none), options
        (1, "raster", 0.3, {"window": 4}),
        (2, "raster", 0.0, {"window": 9, "last": "spread", "last_std": 0.2}),
        (4, "raster", 0.2, {"window": 7, "last": "spread", "last_std": 0.2, "widen": 1.1, "every": 2}),
        (16, "raster", 0.1, {"window": 3, "last": "spread", "last_std": 0.2, "restart": "draft"}),
        (2, "masked", 0.3, {"window": 4, "calls": 2, "widen": 0.85}),
        (1, "masked", 0.0, {"window": 20, "calls": 3, "temperature": 0.9}),
        (4, "masked", 0.2, {"window": 5, "calls": 2, "last": "spread", "last_std": 0.2}),
    ]
    # inside one chain, by the target's own held output: windows shorter and longer than what is left
    for channels, options in (
        (1, {"window": 4}),
        (2, {"window": 2, "last_std": 0.2, "widen": 1.2}),
        (4, {"window": 20}),
        (16, {"window": 3, "last_std": 0.2}),
    ):
        rows.append((channels, "raster", 0.0, options))
    for channels, order, blur, options in rows:
        sizes = GaussianARConfig(tokens=3, channels=channels, steps=5, order=order)  # type: ignore[arg-type]
        draft = GaussianAR(replace(sizes, blur=blur)) if blur else None
        told = ", ".join(f"{k} {v}" for k, v in options.items())
        name = f"{channels}-D, {order}, {f'draft {blur} off' if blur else 'its own draft'}, {told}"
        trials.append(Trial(name, cls(cls.Config(guidance=GUIDED, **options), draft=draft), GaussianAR(sizes)))
    # the published rule, for what it is: it differs, by design
    c = cls.Config(mode="paper", window=2, last_std=0.3, prefill=0.0, guidance=GUIDED)
    sizes = GaussianARConfig(tokens=3, steps=3)
    for off in (0.0, 0.3):
        sampler = cls(c, draft=GaussianAR(replace(sizes, blur=0.3, blur_std=off)))
        trials.append(Trial(f"published rule, draft 0.3 off, its spreads {off}", sampler, GaussianAR(sizes)))
    return trials


def _plain(cls: Any) -> list[Trial]:
    """Any other sampler, with its defaults and guidance, on every toy it supports."""
    chains = [GaussianAR(GaussianARConfig(channels=c)) for c in (1, 4, 16)]
    masked = GaussianAR(GaussianARConfig(tokens=3, channels=2, order="masked"))
    toys: list[TabularAR | GaussianAR] = [_tabular(1), _tabular(2), *chains, masked]
    trials = []
    for toy in toys:
        if cls.supports(toy):
            c = cls.Config(guidance=GUIDED)
            trials.append(Trial(f"{toy.spec.describe()}, defaults", cls(c), toy))
            if hasattr(c, "top_p"):
                trials.append(Trial(f"{toy.spec.describe()}, top-p", cls(replace(c, top_p=0.8, temperature=1.3)), toy))
    return trials


_TRIALS: dict[str, Callable[[Any], list[Trial]]] = {
    "speculative-jacobi": _jacobi,
    "speculative-draft": _drafting,
    "continuous-speculative": _continuous,
    "multi-draft": lambda cls: [Trial(*x) for x in audit_drafts.multi_draft(cls)],
    "auto": lambda cls: [],  # draws with one of the others
}


def made_up_pairs(seed: int = 0) -> dict[str, list[tuple[Distribution, Distribution]]]:
    """Pairs (p, q) of single places: every kind the verifier knows, and its corners."""
    noise = Noise(torch.tensor([seed]), purpose="pairs")

    def normal(name: str, *shape: int) -> torch.Tensor:
        return noise.at(purpose=name).normal(*shape)[0].view(1, 1, *shape)

    def ids(name: str, K: int, V: int) -> tuple[Distribution, Distribution]:
        return Categorical(1.3 * normal(f"p{name}", K, V)), Categorical(1.3 * normal(f"q{name}", K, V))

    def gauss(C: int, ratio: float) -> tuple[Distribution, Distribution]:
        std = (0.3 * normal(f"std{C}", C)).exp()
        off = normal(f"q{C}", C)
        return Gaussian(normal(f"p{C}", C), std), Gaussian(
            normal(f"p{C}", C) + 0.8 * std * off / off.norm(), std * ratio
        )

    def mixture(name: str) -> GaussianMixture:
        return GaussianMixture(normal(f"{name}w", 3), normal(f"{name}m", 3, 2), (0.3 * normal(f"{name}s", 3, 2)).exp())

    a, b = ids("zeros", 1, 6)
    mask = torch.tensor([0.0, 0, 0, 0, -torch.inf, -torch.inf])
    zeros = Categorical(a.logits_BGKV + mask), Categorical(b.logits_BGKV + mask.roll(2))  # type: ignore[union-attr]
    point_p, point_q = gauss(3, 1.1)
    held = torch.tensor([1.0, 1.0, 0.0])
    partly = tuple(
        Gaussian(torch.where(held > 0, d.mean, 0.5), d.std * held)  # type: ignore[union-attr]
        for d in (point_p, point_q)
    )
    return {
        "one head": [ids("a", 1, 5), ids("b", 1, 300), zeros, (a, a)],
        "two heads, joint": [ids("c", 2, 4)],
        "two heads, each": [ids("d", 2, 4)],
        "Gaussian, equal covariance": [gauss(C, 1.0) for C in (1, 4, 16)],
        "Gaussian, unequal": [*(gauss(C, r) for C, r in ((1, 0.8), (4, 1.15), (16, 1.05))), partly],  # type: ignore[list-item]
        "mixture": [(mixture("mp"), mixture("mq"))],
    }


def audit_verifier(draws: int, seed: int, how: Broken = "") -> list[tuple[str, list[Check]]]:
    """The rule alone, as draft-model speculation uses it: replayed on made-up pairs."""
    rule, found = break_rule(verify, how), []
    for name, pairs in made_up_pairs().items():
        options = {"heads": "each"} if name.endswith("each") else {}
        found.append((name, replay_pairs(pairs, rule, draws, seed, **options)))
    return found


@dataclass(frozen=True)
class Line:
    """What came of one trial."""

    subject: str
    name: str
    checks: list[Check]
    control: Broken = ""
    """A broken control: it has to be caught."""
    exact: bool = True
    facts: dict[str, float] | None = None

    def caught(self, alpha: float) -> bool:
        """Whether a difference was found."""
        return any(c.p < alpha for c in self.checks)


@dataclass(frozen=True)
class Report:
    """All trials, judged together."""

    lines: list[Line]
    unsupported: list[str]
    seconds: float
    """On the clock."""
    cpu: float
    """Of this process; the two are far apart on a busy machine."""
    level: float = ALPHA
    """The false-alarm rate of all tests together."""

    @property
    def alpha(self) -> float:
        """Of one test: `level` over all tests but the controls'."""
        return self.level / max(1, sum(len(line.checks) for line in self.lines if not line.control))

    @property
    def differences(self) -> list[Line]:
        """Trials that are labelled exact and aren't."""
        return [x for x in self.lines if not x.control and x.exact and x.caught(self.alpha)]

    @property
    def missed(self) -> list[Line]:
        """Broken controls that were not caught, or not for sure: each has to be, every time."""
        return [x for x in self.lines if x.control and self.power(x) < POWER]

    def power(self, line: Line) -> float:
        """Lower bound of the probability that this control is caught: its best test's."""
        found = 0.0
        for check in sorted(line.checks, key=lambda c: c.p):
            found = max(found, check.power(self.alpha))
            if found > 0.9999:
                break
        return found

    @property
    def passed(self) -> bool:
        """No difference, and every control caught."""
        return not self.differences and not self.missed

    def text(self) -> str:
        """For people."""
        tests = sum(len(x.checks) for x in self.lines if not x.control)
        out = [f"{tests} tests, false-alarm rate {self.level:g} over all of them ({self.alpha:.1e} each)"]
        last = ""
        for x in self.lines:
            if x.subject != last:
                out.append(f"\n{x.subject}")
                last = x.subject
            least = min((c.p for c in x.checks), default=1.0)
            sized = [c for c in x.checks if c.kind != "equal" and c.df + (c.kind in ("ks", "energy"))]
            if x.control:
                found = f"caught (p = {least:.1e})" if x.caught(self.alpha) else "NOT CAUGHT"
                out.append(f"  control, {x.control} broken: {found}, power >= {self.power(x):.3f}   [{x.name}]")
                continue
            verdict = ("DIFFERS" if x.exact else "differs (approximate by design)") if x.caught(self.alpha) else "ok"
            seen = {
                kind: max(c.smallest(self.alpha) for c in sized if c.kind == kind)
                for kind in sorted({c.kind for c in sized})
            }
            facts = "".join(f", {k} {v:.2f}" for k, v in (x.facts or {}).items() if v == v)
            floor = ", ".join(f"{_UNIT[k]} {v:.3f}" for k, v in seen.items())
            out.append(f"  {verdict:<4} {x.name}: least p = {least:.2g} of {len(x.checks)}{facts}; would see {floor}")
            out += [f"       {c.name}: p = {c.p:.1e}" for c in x.checks if c.p < self.alpha]
        if self.unsupported:
            out.append(f"\nno toy of their kind, not audited here: {', '.join(self.unsupported)}")
        out.append(f"\n'would see': the difference that is found with probability {POWER}, whatever its shape.")
        verdict = (
            "passed: no difference found"
            if self.passed
            else f"FAILED: {len(self.differences)} differ, {len(self.missed)} controls missed"
        )
        out.append(f"{verdict} ({self.seconds:.0f} s, {self.cpu:.0f} s of them computing)")
        return "\n".join(out)


_UNIT = {
    "energy": "energy (mean distances)",
    "cells": "TV",
    "share": "acceptance off by",
    "ks": "KS",
    "mean": "mean (sd)",
    "covariance": "covariance",
}


Show = Callable[[int, int, Broken], list[Check]]


def until_sure(show: Show, draws: int, how: Broken, most: int = 64) -> list[Check]:
    """A control's checks, with twice the draws again and again until it is caught for sure: `most` times as many."""
    n = draws
    while True:
        checks = show(n, 0, how)
        if n >= most * draws or any(c.power(SURE) >= POWER for c in sorted(checks, key=lambda c: c.p)):
            return checks
        n *= 2


def audit_toy(
    sampler_names: list[str], broken: Broken = "", *, draws: int = 16_000, seed: int = 0, progress: bool = False
) -> Report:
    """Audit samplers on the toys.

    Args:
        sampler_names: registered names, or `verifier`.
        broken: put a broken verifier into everything that has one; the report must then fail.
        draws: sequences a trial.
        seed: of all draws.
        progress: show a bar.

    Raises:
        ValueError: for an unknown sampler, or if nothing asked for could be audited or broken.
    """
    from tqdm import tqdm

    clock, cpu = time.perf_counter(), time.process_time()
    lines: list[Line] = []
    unsupported: list[str] = []
    how: Broken
    for name in tqdm(sampler_names, disable=not progress, desc="audit", leave=False):
        if name == "verifier":
            lines += [Line(name, n, checks) for n, checks in audit_verifier(REPLAYS * draws, seed, broken)]
            if not broken:
                for how in ("acceptance", "residual"):
                    lines += [Line(name, n, checks, how) for n, checks in audit_verifier(REPLAYS * draws, seed, how)]
            continue
        cls = SAMPLERS[name]
        trials = _TRIALS.get(name, _plain)(cls)
        if not trials:
            unsupported.append(name)
        verifies = hasattr(cls, "verify") or hasattr(cls, "choose")
        if broken and not verifies:
            continue
        for i, trial in enumerate(trials):
            recorder = trial.recorded(seed)
            checks, facts = trial.checks(draws, seed, broken if recorder else "")
            if recorder:
                checks += replayed(trial.name, recorder, draws, seed, broken)
            lines.append(Line(name, trial.name, checks, "", trial.sampler.exact, facts))
            for how in ("acceptance", "residual") if recorder and not broken else ():
                # its verifier's faults must show every time; once a sampler, in its sequences too
                assert recorder is not None
                again: Show = partial(replayed, trial.name, recorder)
                lines.append(Line(name, trial.name, until_sure(again, max(4_000, draws // 4), how), how))
                if i == 0:
                    whole: Show = lambda n, s, h, t=trial: t.checks(n, s, h)[0]  # type: ignore[misc] # noqa: E731
                    lines.append(Line(name, f"{trial.name}, sequences", until_sure(whole, draws, how), how))
    if not lines:
        why = "has no verifier to break" if broken and not unsupported else "has no toy of its kind"
        raise ValueError(
            f"{', '.join(sampler_names)} {why}; try `--sampler all`, or one of verifier, {', '.join(_TRIALS)}"
        )
    return Report(lines, unsupported, time.perf_counter() - clock, time.process_time() - cpu)


def run(config: AuditConfig, make_sampler: Callable[..., Sampler] | None = None) -> int:
    """The command: print the report; 1 where there is a difference.

    Args:
        config: what to audit.
        make_sampler: (generator, name, options, guidance) to a sampler, for models.

    Raises:
        ValueError: for an unknown target or sampler.
        FileNotFoundError: if there is no such model.
    """
    if config.target == "toy":
        if config.draws < 1000:
            raise ValueError(f"fewer than 1000 draws show nothing, got {config.draws}")
        names = ["verifier", *SAMPLERS] if config.sampler == "all" else [config.sampler]
        report = audit_toy(names, config.broken, draws=config.draws, seed=config.seed, progress=sys.stderr.isatty())
    else:
        report = _of_model(config, make_sampler)
    print(report.text())
    return 0 if report.passed else 1


def _of_model(c: AuditConfig, make_sampler: Callable[..., Sampler] | None) -> Report:
    from genlab.hub import from_pretrained

    from .audit_model import audit_model

    if c.sampler in ("all", "verifier") or make_sampler is None:
        raise ValueError(f"name the sampler to audit on {c.target}: --sampler NAME (`genlab list` has them)")
    if c.images < 100 or c.replays < 1000 or c.pairs < 1 or c.batch_size < 1:
        raise ValueError(
            f"images must be at least 100, replays 1000, pairs and batch_size 1: got {c.images}, {c.replays}, "
            f"{c.pairs} and {c.batch_size}"
        )
    generator = from_pretrained(c.target, device=c.device)
    if not isinstance(generator, Generator):
        raise ValueError(f"{c.target} holds a {generator.kind} tokenizer, which draws nothing")
    ids = list(range(generator.num_classes)) if c.classes == "all" else _numbers(c.classes)
    labels = torch.tensor([ids[i % len(ids)] for i in range(c.images)])
    sampler = make_sampler(generator, c.sampler, c.set, c.guidance)
    return audit_model(generator, sampler, labels, c, sys.stderr.isatty())


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise ValueError(f"can't read {text!r} as class numbers; expected e.g. 0-9 or 1,5")
        found += range(int(low), int(high or low) + 1)
    return found
