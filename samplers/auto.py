"""`--sampler auto`: the fastest sampler, measured for this model on this machine, that is as exact as was asked for.

Over ids drawn one after the other, each candidate draws a few images: that says how many tokens it gives a call,
which hangs on the model and not on the machine. c(W), the seconds of a call that reads W tokens, hangs on both.
Together they give seconds a token, c(W) / (tokens a call), and what the sampler itself takes. Samplers of denoising
chains are timed as they are; where there is nothing to choose between, the generator's plain sampler draws. What was
measured is kept in the cache folder under a hash of machine, model and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from genlab.config import config, from_dict, to_dict
from genlab.generators.base import Condition, Generator
from genlab.hub import write_atomic
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from genlab.tokens import Tokens

from .base import Sampler, SamplerConfig, Stats, default_sampler
from .timing import Clock, call_costs

PASSED = ("temperature", "top_k", "top_p")
CANDIDATES: dict[str, list[tuple[str, dict[str, Any], int]]] = {
    # sampler, options, and the tokens its longest call reads
    "ids": [
        ("ancestral", {}, 1),
        *(("speculative-jacobi", {"coupling": "gumbel", "window": w}, w + 1) for w in (4, 8, 16, 24, 32)),
        ("speculative-draft", {"window": 4}, 5),
        ("multi-draft", {"window": 4, "candidates": 4}, 17),
    ],
    "chain": [
        ("chain", {}, 0),
        *(("continuous-speculative", {"window": w}, 0) for w in (4, 8, 16)),
    ],
}


@config
class AutoConfig(SamplerConfig):
    """What is asked of the sampler."""

    exactness: Literal["exact", "approximate"] = "exact"
    """`exact`: only samplers of the generator's own distribution, where it has one. `approximate`: all."""
    temperature: float = 1.0
    """As the chosen sampler's own."""
    top_k: int = 0
    """Over ids: keep the k likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Over ids: keep the smallest set whose mass reaches p."""
    images: int = 2
    """Images that a candidate draws to be measured."""
    again: bool = False
    """Measure, though it was measured before."""


@dataclass(frozen=True)
class Measured:
    """A candidate, and what it did."""

    sampler: str
    options: dict[str, Any]
    tokens_a_call: float
    call_tokens: int
    own_seconds: float
    """Seconds a call that are not the network's."""
    seconds: float
    """Seconds an image: c(W) and its own, over tokens a call; timed where there is no c(W)."""

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        calls = f", {self.tokens_a_call:.2f} tokens a call of {self.call_tokens}" if self.call_tokens else ""
        return f"{self.sampler}{f' ({options})' if options else ''}: {self.seconds:.3f} s an image{calls}"


class AutoSampler(Sampler):
    """Measure, choose, say why, draw. The choice is made at a model's first batch and holds until another is drawn."""

    name = "auto"
    Config = AutoConfig
    config: AutoConfig

    def __init__(self, config: AutoConfig | None = None) -> None:
        """Args: config: what is asked for."""
        super().__init__(config)
        self.choice: Sampler | None = None
        """The sampler chosen."""
        self.why = ""
        """And the reason."""
        self._chosen_for: Generator | None = None

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Whatever another sampler draws from."""
        return any(SAMPLERS[name].supports(generator) for name in SAMPLERS if name != cls.name)

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch, with the sampler chosen.

        Raises:
            ValueError: for an option that the chosen sampler doesn't have.
        """
        if self.choice is None or self._chosen_for is not generator:
            self._chosen_for = generator
            self.choice, self.why = self.choose(generator, labels)
            self.exact = self.choice.exact  # type: ignore[misc]
            print(f"auto: {self.why}", file=sys.stderr)
        return self.choice.draw(generator, labels, noise)

    def choose(self, generator: Generator, labels: Condition) -> tuple[Sampler, str]:
        """The sampler for this generator and batch, and why."""
        from .speculative_jacobi import in_single_file

        plain = default_sampler(generator)
        group = "ids" if in_single_file(generator) else "chain" if plain.name == "chain" else ""
        names = [c for c in CANDIDATES.get(group, []) if SAMPLERS[c[0]].supports(generator)]
        if self.config.exactness == "exact":
            names = [c for c in names if SAMPLERS[c[0]].exact]
        if len(names) < 2:
            kind = "" if plain.exact else ", approximate by design"
            found = f"{plain.name}: the only sampler of a {generator.kind!r} generator worth a choice here{kind}"
            return self._make(plain.name, {}), found
        costs, tried, when = self._measured(generator, labels, names)
        best = min(tried, key=lambda m: m.seconds)
        lines = [f"{best.sampler}, {self.config.exactness}, for a batch of {len(labels)} ({when})"]
        if costs:
            lines.append("c(W), ms: " + ", ".join(f"{w} tokens {1e3 * s:.1f}" for w, s in costs))
        lines += [("> " if m is best else "  ") + str(m) for m in sorted(tried, key=lambda m: m.seconds)]
        return self._make(best.sampler, best.options), "\n  ".join(lines)

    def _make(self, name: str, options: dict[str, Any]) -> Sampler:
        cls = SAMPLERS[name]
        fields = cls.Config.__dataclass_fields__
        asked = {k: getattr(self.config, k) for k in PASSED if getattr(self.config, k) != getattr(AutoConfig(), k)}
        if extra := [k for k in asked if k not in fields]:
            raise ValueError(f"auto draws this generator with {name!r}, which has no {', '.join(extra)}: leave it out")
        shared = {"guidance": self.config.guidance, "fixed_batch": self.config.fixed_batch}
        return cls(cls.Config(**shared, **asked, **options))

    def _measured(
        self, generator: Generator, labels: Condition, candidates: list[tuple[str, dict[str, Any], int]]
    ) -> tuple[list[tuple[int, float]], list[Measured], str]:
        """c(W), the candidates' results, and where they come from: the cache, or now."""
        from genlab.data.cache import cache_folder

        settings = {k: v for k, v in to_dict(self.config).items() if k not in ("again", "exactness")}
        about = [machine(generator), fingerprint(generator), settings, len(labels), candidates]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_folder() / "auto" / f"{key}.json"
        if path.is_file() and not self.config.again:
            held = json.loads(path.read_text())
            tried = [from_dict(Measured, m, where=str(path)) for m in held["tried"]]
            return [tuple(c) for c in held["costs"]], tried, f"measured {held['when']}; again=true measures anew"
        costs: tuple[tuple[int, float], ...] = ()
        if candidates[0][2]:
            costs = call_costs(generator, labels, self.config.guidance, tuple(sorted({c[2] for c in candidates})))
        tried = [self._try(generator, labels, c, dict(costs)) for c in candidates]
        when = time.strftime("%Y-%m-%d %H:%M")
        held = {"when": when, "about": about, "costs": costs, "tried": [to_dict(m) for m in tried]}
        write_atomic(path, json.dumps(held, indent=1))
        return list(costs), tried, f"measured now, kept in {path}"

    def _try(
        self,
        generator: Generator,
        labels: Condition,
        candidate: tuple[str, dict[str, Any], int],
        costs: dict[int, float],
    ) -> Measured:
        """Let a candidate draw; a batch larger than `images` as it is, a smaller one several times."""
        name, options, call_tokens = candidate
        # one thread on a CPU: what it computed, whoever else took the core meanwhile
        alone = generator.device.type == "cpu" and torch.get_num_threads() == 1
        timer = time.process_time if alone else time.perf_counter
        sampler, seconds, total, calls, clock = self._make(name, options), float("inf"), 0.0, 0, Clock(timer)
        rounds = max(1, -(-self.config.images // len(labels)))
        for i in range(rounds):
            seeds = torch.arange(len(labels), device=generator.device) + i * len(labels)
            begin = timer()
            with clock.watch(generator, sampler):
                _, stats = sampler.draw(generator, labels, Noise(seeds))
            spent = timer() - begin
            seconds, total, calls = min(seconds, spent), total + spent, calls + stats.model_calls
        own = (total - clock.seconds.get("network", 0.0)) / max(1, calls)
        if not call_tokens:
            return Measured(name, options, 0.0, 0, own, seconds / len(labels))
        rate = generator.n_groups * rounds / calls
        # W beyond what the image has room for was not measured: the most that was
        price = costs.get(call_tokens, max(costs.values()))
        per_image = (price + own) * generator.n_groups / rate / len(labels)
        return Measured(name, options, rate, call_tokens, own, per_image)


def machine(generator: Generator) -> str:
    """What c(W) hangs on beside the model."""
    device = generator.device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    dtype = next((p.dtype for p in generator.parameters()), None)
    return f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}, {dtype}, {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def fingerprint(generator: Generator) -> str:
    """Hash of a model's config and weights, of each tensor the first thousand numbers and the sum."""
    digest = hashlib.sha256(json.dumps([generator.kind, to_dict(generator.config)], sort_keys=True).encode())
    for name, value in generator.state_dict().items():
        x = value.detach().flatten()
        digest.update(name.encode() + x[:1000].float().cpu().numpy().tobytes() + str(float(x.double().sum())).encode())
    return digest.hexdigest()[:16]
