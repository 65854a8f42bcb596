"""`genlab plan PRESET --gpus 8`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import tyro

from genlab.config import config

from . import shared

GPUS = {
    "rtx4090": (24, 165), "a100-40": (40, 312), "l40s": (48, 362), "a100": (80, 312), "h100": (80, 989),
    "h200": (141, 989), "b200": (180, 2250),
}  # fmt: skip
"""GiB, and dense bf16 TFLOP/s, of their data sheets."""


@config
class PlanConfig:
    """What training PRESET takes on GPUs, by a dry run on torch's meta device: no GPU, no weights, no data.

    Memory of each GPU by what it holds, FLOPs an image, images a second and days, and the command that fits.
    """

    preset: Annotated[str, tyro.conf.Positional]
    """A preset (`genlab list`)."""
    gpus: int = 8
    """How many."""
    gpu: Literal["rtx4090", "a100-40", "l40s", "a100", "h100", "h200", "b200"] = "h100"
    """Which, for memory and peak."""
    memory: float = 0.0
    """GiB of each, in place of the GPU's."""
    peak: float = 0.0
    """bf16 TFLOP/s of each, in place of the GPU's."""
    mfu: float = 0.4
    """Share of the peak that the model's arithmetic reaches: yours is in metrics.jsonl."""
    spare: float = 0.1
    """Share of the memory left for kernels, communication and fragments."""
    batch_size: int = 0
    """Images a step, in place of the preset's."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Print the plan; exit 1 where nothing fits."""
    import dataclasses

    c = shared.parse(PlanConfig, argv, prog="genlab plan")
    if c.gpus < 1 or not 0 < c.mfu <= 1 or not 0 <= c.spare < 1 or min(c.memory, c.peak, c.batch_size) < 0:
        raise ValueError("--gpus is at least 1, --mfu in (0, 1], --spare in [0, 1), and no number is negative")
    run = shared.load("train.presets").PRESETS[c.preset]()
    if c.batch_size:
        run = dataclasses.replace(run, batch_size=c.batch_size)
    memory, peak = GPUS[c.gpu]
    result = shared.load("train.plan").plan(run, c.gpus, c.memory or memory, c.peak or peak, c.mfu, c.spare)
    if c.batch_size and result["command"]:
        result["command"] += f" --batch-size {c.batch_size}"
    print(json.dumps(result, indent=2) if c.json else describe(result))
    return 0 if result["chosen"] else 1


ROWS = {
    "weights": "weights", "gradients": "gradients", "moments": "AdamW's moments", "average": "average (EMA)",
    "exchange": "buckets, gathered parts", "activations": "activations", "total": "in all",
}  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """A plan for people: GiB of each GPU, a column a way."""
    f, gpus = result["footprint"], result["gpus"]
    columns = [*result["ways"], *([result["chosen"]] if result["chosen"] else [])]
    names = [w["parallel"] + ("+recompute" if w["recompute"] else "") for w in result["ways"]]
    names = [n if gpus > 1 else n.replace("ddp", "plain") for n in names] + ["chosen"] * bool(result["chosen"])
    lines = [
        f"{result['preset']}: {f['parameters'] / 1e6:,.1f}M parameters, {f['trained'] / 1e6:,.1f}M trained; "
        f"{f['flops'] / 1e9:,.1f} GFLOPs an image, forward and backward",
        f"batch {result['batch_size']} over {gpus} GPU{'s' * (gpus > 1)} of {result['memory_gib']:g} GiB",
        "",
        f"{'GiB a GPU':<25}" + "".join(f"{name:>16}" for name in names),
        f"{'images at a time':<25}" + "".join(f"{w['images']:>16,}" for w in columns),
    ]
    lines += [f"{what:<25}" + "".join(f"{w[key] / 2**30:>16,.1f}" for w in columns) for key, what in ROWS.items()]
    verdict = ["fits" if w["fits"] else "too large" for w in result["ways"]] + ["fits"] * bool(result["chosen"])
    lines += [" " * 25 + "".join(f"{word:>16}" for word in verdict), ""]
    if not result["chosen"]:
        return "\n".join([*lines, "Nothing fits, not even an image at a time: take more GPUs or larger ones."])
    return "\n".join(
        [
            *lines,
            f"{result['images_per_second']:,.0f} images a second, {result['days']:,.1f} days",
            "",
            result["command"],
        ]
    )
