"""`genlab bench NAME`: measured comparisons, one a row of the table below; only the one that is called is imported."""

from __future__ import annotations

import json
from typing import Any

from . import shared

BENCHES = {
    "baseline": (
        "genlab.commands.bench_baseline:main",
        "a diffusers U-Net DDPM on the same tokens, for the same CPU time, beside MODEL",
    ),
    "decode": (
        "genlab.commands.bench:decode",
        "MODEL's drawing with its cache against recomputing everything, and where the time goes",
    ),
    "elm-study": (
        "genlab.commands.bench:elm_study",
        "ELM's design space at small equal budgets: each of its findings confirmed or not",
    ),
    "entities": (
        "genlab.commands.bench_entities:main",
        "xAR's five entities, with noisy and clean context, at equal training time",
    ),
    "ecar": ("eval.bench_ecar:BenchConfig", "ECAR against one flow of its size: cost against distance"),
    "xar": ("eval.bench_flow:BenchFlowConfig", "xAR's drawing against the loop that recomputes everything"),
    "flextok": (
        "eval.bench_flextok:FlexTokBenchConfig",
        "what each further token of a FlexTok buys, for simple things and for complex ones",
    ),
    "resgen": (
        "genlab.commands.bench_resgen:main",
        "ResGen beside autoregression over the same residual codes; depth 8 beside depth 4",
    ),
    "seed": (
        "eval.bench_seed:SeedBenchConfig",
        "SEED's codes for seeing and drawing: retrieval, captions, prompts, beside raster codes",
    ),
    "divot": (
        "eval.bench_divot:DivotBenchConfig",
        "do a Divot's reconstructions move as held-out clips do? the mixture head",
    ),
    "distilled": ("eval.bench_distilled:DistilledBenchConfig", "a student of Distilled Decoding beside its teacher"),
    "training": (
        "train.bench_training:TrainingBenchConfig",
        "how much of the machine a training of each small preset uses, and what takes the rest",
    ),
    "samplers": (
        "eval.bench_samplers:SamplersBenchConfig",
        "all samplers of GENERATOR…, speed against quality, in one run",
    ),
}
"""Name to `module:function`, which takes the words behind the name and returns the exit code, or to `module:Config`
beside which stand `run(config)` and `describe(result)`; and what it shows."""


def main(argv: list[str]) -> int:
    """Run one bench.

    Raises:
        ValueError: for an unknown name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, BENCHES))
        print("usage: genlab bench NAME [options]      genlab bench NAME --help explains one\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in BENCHES.items()))
        return 0
    if argv[0] not in BENCHES:
        raise ValueError(f"unknown bench {argv[0]!r}. Known: {', '.join(BENCHES)}")
    module, name = BENCHES[argv[0]][0].split(":")
    bench = shared.load(module)
    found = getattr(bench, name)
    if not isinstance(found, type):
        return int(found(argv[1:]) or 0)
    c: Any = shared.parse(found, argv[1:], prog=f"genlab bench {argv[0]}")
    result = bench.run(c)
    print(json.dumps(result, indent=2) if c.json else bench.describe(result))
    return 0


def elm_study(argv: list[str]) -> int:
    """The study trains, and what it trains with is its sibling: handed over from here."""
    study = shared.load("eval.elm_study")
    c = shared.parse(study.ElmStudyConfig, argv, prog="genlab bench elm-study")
    return int(study.main(c, shared.load("train.loop").train, shared.load("train.presets").PRESETS))


def decode(argv: list[str]) -> int:
    """Presets come from the training package, a sibling of the bench's: handed over from here."""
    bench = shared.load("eval.bench_decode")
    c = shared.parse(bench.BenchDecodeConfig, argv, prog="genlab bench decode")
    return int(bench.main(c, shared.load("train.presets").PRESETS))
