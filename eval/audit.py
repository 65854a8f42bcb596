"""Is a sampler's distribution the plain one's? `genlab audit toy --sampler all` asks where the answer is known.

The toys' laws are computed, not sampled: every sequence of a tabular generator enumerated (chi-square), the joint
Gaussian of a chain of linear steps (moments, Kolmogorov-Smirnov on projections). The verifier is replayed on made-up
pairs as well. All tests together raise a false alarm with probability 1e-4 (Bonferroni). Broken controls, the same
samplers with a verifier that accepts 10 % too often or skips the residual, show that a difference would be seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from genlab.config import config
from genlab.distributions import Categorical, Gaussian, GaussianMixture
from genlab.generators.base import Guidance
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from samplers.base import Sampler
from samplers.chain import ChainConfig, prepare
from samplers.verify import Distribution, Verdict, draw, verify

from . import audit_drafts
from .exactness import POWER, Check, check_cells, check_normal, replay_pairs
from .toys import GaussianAR, GaussianARConfig, TabularAR, TabularConfig

ALPHA = 1e-4
REPLAYS = 5  # of a pair, for every draw of a sequence: they are cheap
Broken = Literal["", "acceptance", "residual"]
Rule = Callable[..., Verdict]


@config
class AuditConfig:
    """What to audit."""

    target: str = "toy"
    """`toy`: generators whose law is known."""
    sampler: str = "all"
    """A registered sampler, `verifier` (the rule alone, on made-up pairs), or `all`."""
    broken: Broken = ""
    """Put a verifier in that accepts 10 % too often, or skips the residual: the audit must fail."""
    draws: int = 20_000
    """Sequences a trial."""
    seed: int = 0
    """Of all draws; another seed is another audit."""


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


@dataclass(frozen=True)
class Trial:
    """One sampler with one config on one toy."""

    name: str
    sampler: Sampler
    toy: TabularAR | GaussianAR
    label: int = 0

    def checks(self, draws: int, seed: int, how: Broken = "") -> tuple[list[Check], dict[str, float]]:
        """Draw, and hold the tokens against the toy's law; also calls and acceptance."""
        sampler = self.sampler
        if how:
            sampler = type(sampler)(sampler.config)
            sampler.__dict__.update(self.sampler.__dict__)
            if hasattr(sampler, "choose"):  # several candidates a place
                sampler.choose = audit_drafts.break_choice(sampler.choose, how)  # type: ignore[attr-defined]
            else:
                sampler.verify = break_rule(sampler.verify, how)  # type: ignore[attr-defined]
        seeds = torch.arange(draws) + seed * draws
        out = sampler.sample(self.toy, torch.full((draws,), self.label), seeds, batch_size=draws)
        c, tokens = sampler.config, out.tokens
        if isinstance(self.toy, TabularAR):
            law = self.toy.law(self.label, c.guidance, getattr(c, "shape", lambda d: d))
            counts = torch.bincount(self.toy.cells(tokens), minlength=len(law))
            checks = [check_cells(self.name, counts.numpy(), law.numpy())]
        else:
            shape = (lambda chain: prepare(chain, c)) if isinstance(c, ChainConfig) else lambda chain: chain
            mean, cov = self.toy.law(self.label, c.guidance, shape)
            x = tokens.values.flatten(1)
            checks = check_normal(self.name, x, mean, cov)
            if self.toy.n_groups > 1:  # the first token alone, too
                C = self.toy.width
                checks += check_normal(f"{self.name}, first token", x[:, :C], mean[:C], cov[:C, :C], seed=1)
        if not how:
            checks.append(self._rows_alone(sampler, seeds[:16], tokens.values[:16]))
        s = out.stats
        return checks, {"calls": s.model_calls, "acceptance": s.accepted / s.proposed if s.proposed else float("nan")}

    def _rows_alone(self, sampler: Sampler, seeds: torch.Tensor, values: torch.Tensor) -> Check:
        """Batches of 1 and 8 must give the rows of the large batch: the law is theirs then, too."""
        labels, same = torch.full((len(seeds),), self.label), True
        for size, n in ((1, 4), (8, 16)):
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


def _denoising(cls: Any) -> list[Trial]:
    trials = []
    for channels, last_std, widen, window, steps in (
        (1, 0.0, 1.0, 4, 6),
        (2, 0.2, 1.2, 2, 6),
        (4, 0.0, 1.0, 20, 5),
        (16, 0.2, 1.0, 3, 8),
    ):
        c = cls.Config(last_std=last_std, widen=widen, window=window, guidance=GUIDED)
        name = f"{channels}-D, window {window} of {steps}, last std {last_std}, draft's std x {widen}"
        trials.append(Trial(name, cls(c), GaussianAR(GaussianARConfig(channels=channels, steps=steps))))
    return trials


def _plain(cls: Any) -> list[Trial]:
    """Any other sampler, with its defaults and guidance, on every toy it supports."""
    chains = [GaussianAR(GaussianARConfig(channels=c)) for c in (1, 4, 16)]
    toys: list[TabularAR | GaussianAR] = [_tabular(1), _tabular(2), *chains]
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
    "chain-speculative": _denoising,
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

    @property
    def alpha(self) -> float:
        """Of one test: `ALPHA` over all tests but the controls'."""
        return ALPHA / max(1, sum(len(line.checks) for line in self.lines if not line.control))

    @property
    def differences(self) -> list[Line]:
        """Trials that are labelled exact and aren't."""
        return [x for x in self.lines if not x.control and x.exact and x.caught(self.alpha)]

    @property
    def missed(self) -> list[Line]:
        """Broken controls that were not caught, or not for sure. A sampler's controls need one such catch each."""
        sure = {(x.subject, x.control) for x in self.lines if x.control and self.power(x) >= POWER}
        return [x for x in self.lines if x.control and (x.subject, x.control) not in sure]

    def power(self, line: Line) -> float:
        """Lower bound of the probability that this control is caught: its best test's."""
        return max(c.power(self.alpha) for c in line.checks)

    @property
    def passed(self) -> bool:
        """No difference, and every control caught."""
        return not self.differences and not self.missed

    def text(self) -> str:
        """For people."""
        tests = sum(len(x.checks) for x in self.lines if not x.control)
        out = [f"{tests} tests, false-alarm rate {ALPHA:g} over all of them ({self.alpha:.1e} each)"]
        last = ""
        for x in self.lines:
            if x.subject != last:
                out.append(f"\n{x.subject}")
                last = x.subject
            worst, sized = (
                min(x.checks, key=lambda c: c.p),
                [c for c in x.checks if c.kind != "equal" and c.df + (c.kind == "ks")],
            )
            if x.control:
                found = f"caught (p = {worst.p:.1e})" if x.caught(self.alpha) else "NOT CAUGHT"
                out.append(f"  control, {x.control} broken: {found}, power >= {self.power(x):.3f}   [{x.name}]")
                continue
            verdict = ("DIFFERS" if x.exact else "differs (approximate by design)") if x.caught(self.alpha) else "ok"
            seen = {
                kind: max(c.smallest(self.alpha) for c in sized if c.kind == kind)
                for kind in sorted({c.kind for c in sized})
            }
            facts = "".join(f", {k} {v:.2f}" for k, v in (x.facts or {}).items() if v == v)
            floor = ", ".join(f"{_UNIT[k]} {v:.3f}" for k, v in seen.items())
            out.append(f"  {verdict:<4} {x.name}: least p = {worst.p:.2g} of {len(x.checks)}{facts}; would see {floor}")
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


_UNIT = {"cells": "TV", "share": "acceptance off by", "ks": "KS", "mean": "mean (sd)", "covariance": "covariance"}


def audit_toy(
    sampler_names: list[str], broken: Broken = "", *, draws: int = 20_000, seed: int = 0, progress: bool = False
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
        for trial in trials:
            uses = verifies and getattr(trial.sampler.config, "coupling", "") != "gumbel"
            checks, facts = trial.checks(draws, seed, broken if uses else "")
            lines.append(Line(name, trial.name, checks, "", trial.sampler.exact, facts))
        if verifies and not broken:
            for how in ("acceptance", "residual"):
                checks, facts = trials[0].checks(2 * draws, seed, how)
                lines.append(Line(name, trials[0].name, checks, how))
    if not lines:
        why = "has no verifier to break" if broken and not unsupported else "has no toy of its kind"
        raise ValueError(
            f"{', '.join(sampler_names)} {why}; try `--sampler all`, or one of verifier, {', '.join(_TRIALS)}"
        )
    return Report(lines, unsupported, time.perf_counter() - clock, time.process_time() - cpu)


def run(config: AuditConfig) -> int:
    """The command: print the report; 1 where there is a difference.

    Raises:
        ValueError: for an unknown target or sampler.
    """
    if config.target != "toy":
        raise ValueError(f"can't audit {config.target!r}: `genlab audit toy` is what there is")
    if config.draws < 1000:
        raise ValueError(f"fewer than 1000 draws show nothing, got {config.draws}")
    names = ["verifier", *SAMPLERS] if config.sampler == "all" else [config.sampler]
    report = audit_toy(names, config.broken, draws=config.draws, seed=config.seed, progress=sys.stderr.isatty())
    print(report.text())
    return 0 if report.passed else 1
