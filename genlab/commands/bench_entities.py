"""`genlab bench entities`: xAR's five entities, with noisy and clean context, at equal training time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from genlab.generators.xar import XARConfig

from . import shared


def main(argv: list[str]) -> int:
    """Train what is missing, measure, print."""
    bench = shared.load("eval.bench_entities")
    c = shared.parse(bench.EntitiesConfig, argv, prog="genlab bench entities")
    models = train_all(c)
    if c.train_only:
        print("\n".join(f"trained: {folder}" for folder in models.values()))
        return 0
    result = bench.measure(c, models)
    print(json.dumps(result, indent=2) if c.json else bench.describe(result))
    return 0


def entity_config(entity: str, model: XARConfig) -> XARConfig:
    """A model of the same sizes over another entity: quarters of the grid, every other token, halved maps.

    Raises:
        ValueError: for a grid that isn't a square of an even side.
    """
    h, w = model.grid
    if h != w or h % 2:
        raise ValueError(
            f"this bench cuts a square grid of an even side, the preset's is {h}x{w}: choose another preset"
        )
    size = {"cell": h // 2, "subsample": 2}.get(entity, model.size)
    scales: tuple[int, ...] = ()
    if entity == "scale":
        side = h
        while side:
            scales, side = (side, *scales), side // 2 if side % 2 == 0 else 0
    return dataclasses.replace(model, entity=entity, size=size, scales=scales)  # type: ignore[arg-type]


def train_all(c: Any) -> dict[str, Path]:
    """Train every run that is not finished; name to model folder, in the order of the table.

    Raises:
        ValueError: for a preset that isn't an xAR's, or a finished run of other settings in its folder.
    """
    presets, loop = shared.load("train.presets").PRESETS, shared.load("train.loop")
    base = presets[c.preset]()
    if not isinstance(base.model, XARConfig):
        raise ValueError(f"{c.preset} trains a {base.model.kind}, not an xar: give --preset an xAR's")
    models = {}
    for entity in c.entities:
        for context in c.contexts if entity != "image" else ("noisy",):
            for seed in c.seeds:
                name = f"{entity}-{context}-seed{seed}"
                model: Any = dataclasses.replace(entity_config(entity, base.model), context=context)  # type: ignore[arg-type]
                run = dataclasses.replace(
                    base, name=name, model=model, seed=seed, cpu_minutes=c.minutes, sample_every=0
                )
                models[name] = loop.train_once(run, c.out / name)
    return models
