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
    """Train every run that is not finished: tokenizers by depth, with their second decoders, then generators by name
    with their depth.

    Raises:
        ValueError: for no depth or one twice, or a finished run of other settings in its folder.
    """
    if not c.depths or len(set(c.depths)) < len(c.depths) or min(c.depths) < 1:
        raise ValueError(f"depths must be different and at least 1, got {c.depths}")
    presets = shared.load("train.presets").PRESETS

    def trained(preset: str, name: str, minutes: float, sizes: dict[str, Any], **changes: Any) -> Path:
        base = presets[preset]()
        model = dataclasses.replace(base.model, **sizes)
        run = dataclasses.replace(base, name=name, sample_every=0, model=model, cpu_minutes=minutes, **changes)
        return shared.load("train.loop").train_once(run, c.out / name)

    tokenizers, decoders, generators = {}, {}, {}
    for depth in c.depths:
        name = f"rvq-depth{depth}"
        tokenizers[depth] = trained(f"rvq-{c.grid}-emoji64", name, c.tokenizer_minutes, {"depth": depth})
        decoders[depth] = tokenizers[depth]
        if c.decoder_minutes:  # tokens stay as they are
            decoders[depth] = trained(f"rvq-{c.grid}-decoder-emoji64", f"{name}-decoder", c.decoder_minutes,
                                      {"depth": depth}, init=str(tokenizers[depth]))  # fmt: skip
    kinds = [("resgen", depth) for depth in c.depths] + [(rival, c.depths[0]) for rival in c.rivals]
    for kind, depth in kinds:
        name, preset = f"{kind}-depth{depth}", f"{kind}-emoji64" if c.grid == "f8" else f"{kind}-{c.grid}-emoji64"
        sizes: dict[str, Any] = {"codes_depth": depth}
        if kind == "resgen":  # a position is without any code as often at every depth
            model = presets[preset]().model
            sizes["mask_power"] = model.mask_power * model.codes_depth / depth
        folder = trained(preset, name, c.minutes, sizes, tokenizer=str(tokenizers[depth]))
        generators[name] = (depth, folder)
    return decoders, generators
