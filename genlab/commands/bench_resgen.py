"""`genlab bench resgen`: RVQ, ResGen and autoregression over the same codes, at equal training time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from . import shared


def main(argv: list[str]) -> int:
    """Train what is missing, measure, print."""
    bench = shared.load("eval.bench_resgen")
    c = shared.parse(bench.ResGenBenchConfig, argv, prog="genlab bench resgen")
    tokenizers, generators = train_all(c)
    if c.train_only:
        folders = [*tokenizers.values(), *(folder for _, folder in generators.values())]
        print("\n".join(f"trained: {folder}" for folder in folders))
        return 0
    result = bench.measure(c, tokenizers, generators)
    print(json.dumps(result, indent=1) if c.json else bench.describe(result))
    return 0


def train_all(c: Any) -> tuple[dict[int, Path], dict[str, tuple[int, Path]]]:
    """Train every run that is not finished: tokenizers by depth, generators by name with their depth.

    Raises:
        ValueError: for no depth or one twice, or a finished run of other settings in its folder.
    """
    if not c.depths or len(set(c.depths)) < len(c.depths) or min(c.depths) < 1:
        raise ValueError(f"depths must be different and at least 1, got {c.depths}")
    presets = shared.load("train.presets").PRESETS
    tokenizers: dict[int, Path] = {}
    generators: dict[str, tuple[int, Path]] = {}
    for depth in c.depths:
        base = presets[f"rvq-{c.grid}-emoji64"]()
        model = dataclasses.replace(base.model, depth=depth)
        tokenizers[depth] = _trained(c, base, f"rvq-depth{depth}", model=model, cpu_minutes=c.tokenizer_minutes)
    first = c.depths[0]
    runs = [("resgen", depth) for depth in c.depths] + [(rival, first) for rival in c.rivals]
    for kind, depth in runs:
        base = presets[f"{kind}-emoji64" if c.grid == "f8" else f"{kind}-{c.grid}-emoji64"]()
        model = dataclasses.replace(base.model, codes_depth=depth)
        name = f"{kind}-depth{depth}"
        tokenizer = str(tokenizers[depth])
        folder = _trained(c, base, name, model=model, tokenizer=tokenizer, cpu_minutes=c.minutes)
        generators[name] = (depth, folder)
    return tokenizers, generators


def _trained(c: Any, base: Any, name: str, **changes: Any) -> Path:
    """The model folder of a run, trained now unless it is there."""
    loop = shared.load("train.loop")
    run = dataclasses.replace(base, name=name, sample_every=0, **changes)
    return loop.train_once(run, c.out / name)
