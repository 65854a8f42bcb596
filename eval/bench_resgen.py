"""ResGen against autoregression over the same residual codes, and depth 8 against depth 4: `genlab bench resgen`.

The command trains the models (genlab/commands/bench_resgen.py), each for the same CPU time, and calls `measure`:

- Tokenizers: held-out images from their first 1 … D depths (PSNR, Fréchet distance), and each depth's usage.
- Generators: Fréchet distance of held-out classes to the training images. Each tries the same guidance scales and
  masses of the likeliest (top-p) over few images, and is measured at its best over many others; ResGen's steps are
  the same at every depth.
- Seconds an image of drawing tokens, in a batch and alone, all models in turn, the fastest of some rounds; decoding is
  left out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from genlab.config import config, to_dict
from genlab.data import open_images
from genlab.generators.base import Guidance
from genlab.hub import from_pretrained, write_atomic
from genlab.pictures import grid, save_png, to_float, to_uint8
from genlab.precision import DtypeName, torch_dtype
from genlab.tokens import Tokens, concatenate
from samplers import Sampler, default_sampler
from tokenizers_img.usage import perplexity

from .harness import evaluate
from .points import Points
from .reconstruction import psnr

Rival = Literal["rq_transformer", "rq_transformer-flat"]
TRIAL_SEEDS, SEEDS = 0, 1_000_000
"""The first seed of what is tried, and of what is measured."""


@config
class ResGenBenchConfig:
    """Train RVQ, ResGen and its autoregressive rivals for equal CPU time, and compare distance and seconds.

    Interrupt it at any time: the same command goes on. Writes result.json, points.json, reconstructions-D.png and
    samples/.
    """

    out: Path = Path("runs/bench_resgen")
    """One folder a run, and the results."""
    grid: Literal["f16", "f8"] = "f16"
    """The presets that are compared: over 4x4 positions of 128 channels, or 8x8 of 64."""
    depths: tuple[int, ...] = (16,)
    """Depths of the residual codes, each with a tokenizer and a ResGen of its own; rivals draw the first's codes."""
    rivals: tuple[Rival, ...] = ("rq_transformer", "rq_transformer-flat")
    """Autoregressive models of ResGen's size."""
    tokenizer_minutes: float = 25.0
    """CPU time of each tokenizer."""
    decoder_minutes: float = 20.0
    """CPU time of its decoder's second stage, which leaves tokens as they are; 0: none."""
    minutes: float = 20.0
    """CPU time of each generator."""
    dtype: DtypeName = "auto"
    """Arithmetic while drawing; `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    train_only: bool = False
    """Stop when all are trained."""
    reference: str = "emoji:train"
    """Reference images, or a file of their statistics."""
    n: int = 1530
    """Images drawn of each generator at its best."""
    rebuilt: int = 512
    """Held-out images that tokenizers rebuild."""
    trial: int = 192
    """Images drawn to find that best, of other seeds."""
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Constant guidance scales that each generator tries."""
    top_p: tuple[float, ...] = (1.0, 0.6, 0.3)
    """Masses of the likeliest (ids, or ResGen's components) that each generator tries beside every guidance."""
    steps: int = 16
    """ResGen's steps, at every depth."""
    spread: float = 0.0
    """What ResGen's deviations are multiplied with while drawing."""
    batch_size: int = 32
    """Images a batch while drawing."""
    rounds: int = 3
    """How often every generator is timed."""
    json: bool = False
    """Print JSON."""


def usage(ids_NLD: torch.Tensor, vocab: int) -> list[dict[str, float]]:
    """Share of each depth's codes that occur, and their perplexity."""
    counts = [torch.bincount(ids.flatten(), minlength=vocab) for ids in ids_NLD.unbind(-1)]
    return [{"usage": float((n > 0).double().mean()), "perplexity": float(perplexity(n))} for n in counts]


def _decode(tokenizer: Any, tokens: Tokens, batch_size: int) -> torch.Tensor:
    with torch.inference_mode():
        parts = [tokenizer.decode(tokens[i : i + batch_size]) for i in range(0, len(tokens), batch_size)]
    return to_uint8(torch.cat(parts))


def reconstruct(c: ResGenBenchConfig, tokenizer: Any, picture: Path) -> dict[str, Any]:
    """Held-out images from their first depths, and the usage of each depth."""
    heldout = open_images("emoji", split="heldout", size=tokenizer.config.image_size)
    x = heldout.batch(torch.linspace(0, len(heldout) - 1, min(c.rebuilt, len(heldout))).long())
    with torch.inference_mode():
        tokens = concatenate([tokenizer.encode(to_float(part)) for part in x.split(c.batch_size)])
    rows, shown = [], [x[:8]]
    for d in range(1, tokenizer.spec.depth + 1):
        y = _decode(tokenizer, tokens.first_depths(d), c.batch_size)
        figure = evaluate(y, x, reference_is_sample=False).figures[0]
        db = psnr(x, y)
        found = {"metric": figure.name, "distance": figure.value, "interval": [figure.low, figure.high]}
        rows.append({"depths": d, "psnr": float(db.mean()), "psnr_error": float(db.std() / len(db) ** 0.5), **found})
        shown.append(y[:8])
    save_png(grid(torch.cat(shown), row_labels=["original", *(f"depth {r['depths']}" for r in rows)]), picture)
    return {"images": len(x), "rows": rows, "usage": usage(tokens.values, tokenizer.spec.vocab)}


def sampler_of(c: ResGenBenchConfig, model: Any, scale: float, top_p: float) -> Sampler:
    """The plain sampler of a model with one guidance scale; `steps` and `spread` are for those that have them."""
    plain = default_sampler(model)
    changes: dict[str, Any] = {"guidance": Guidance(scale=scale, schedule="constant"), "top_p": top_p}
    changes |= {name: getattr(c, name) for name in ("steps", "spread") if hasattr(plain.config, name)}
    return type(plain)(dataclasses.replace(plain.config, **changes))


def draw(
    c: ResGenBenchConfig, name: str, model: Any, tokenizer: Any, scale: float, top_p: float, *, trial: bool
) -> dict[str, Any]:
    """One generator's distance with one guidance scale and top-p; some of its images go to samples/."""
    labels = open_images("emoji", split="heldout", size=tokenizer.config.image_size).labels
    labels = labels[torch.linspace(0, len(labels) - 1, min(c.trial if trial else c.n, len(labels))).long()]
    seeds = (TRIAL_SEEDS if trial else SEEDS) + torch.arange(len(labels))
    drawn = sampler_of(c, model, scale, top_p).sample(model, labels, seeds, c.batch_size)
    y = _decode(tokenizer, drawn.tokens, c.batch_size)
    figure = evaluate(y, c.reference, class_protocol="emoji:heldout", seeds=f"{seeds[0]}-{seeds[-1]}", sampler=name,
                      guidance=str(scale), reference_is_sample=False).figures[0]  # fmt: skip
    print(f"{name}, guidance {scale:g}, top-p {top_p:g}: {figure.name} {figure.value:.2f}", file=sys.stderr)
    picture = c.out / "samples" / (f"{name}-{scale:g}-{top_p:g}.png" if trial else f"{name}.png")
    save_png(grid(y[torch.linspace(0, len(y) - 1, 16 if trial else 48).long()], columns=8), picture)
    return {"guidance": scale, "top_p": top_p, "metric": figure.name, "distance": figure.value,
            "interval": [figure.low, figure.high], "images": len(y),
            "calls": drawn.stats.model_calls / -(-len(y) // c.batch_size)}  # fmt: skip


def clock(c: ResGenBenchConfig, models: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Seconds an image in a batch, on the clock and of the CPU, and of one alone: all in turn, the fastest round."""
    labels = torch.arange(c.batch_size) % min(model.num_classes for model in models.values())
    for row in rows.values():
        row["seconds"] = row["cpu_seconds"] = row["seconds_alone"] = float("inf")
    for _ in range(c.rounds):
        for name, model in models.items():
            row = rows[name]
            sampler = sampler_of(c, model, row["guidance"], row["top_p"])
            start, cpu = time.perf_counter(), time.process_time()
            sampler.sample(model, labels, torch.arange(len(labels)), len(labels))
            row["seconds"] = min(row["seconds"], (time.perf_counter() - start) / len(labels))
            row["cpu_seconds"] = min(row["cpu_seconds"], (time.process_time() - cpu) / len(labels))
            start = time.perf_counter()
            sampler.sample(model, labels[:1], torch.arange(1))
            row["seconds_alone"] = min(row["seconds_alone"], time.perf_counter() - start)


def measure(
    c: ResGenBenchConfig, tokenizers: dict[int, Path], generators: dict[str, tuple[int, Path]]
) -> dict[str, Any]:
    """Everything of the trained models: see the module's docstring.

    Args:
        c: the comparison.
        tokenizers: depth to model folder.
        generators: name to depth and model folder; the first is ResGen at the first depth.
    """
    settings = {k: v for k, v in to_dict(c).items() if k not in ("out", "dtype", "train_only", "rounds", "json")}
    dtype = torch_dtype(c.dtype)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    points = Points(c.out / "points.json", settings)
    rvq = {depth: from_pretrained(folder) for depth, folder in tokenizers.items()}
    reconstruction = {
        str(depth): points.get(
            f"rvq {depth}", partial(reconstruct, c, tokenizer, c.out / f"reconstructions-{depth}.png")
        )
        for depth, tokenizer in rvq.items()
    }
    models: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (depth, folder) in generators.items():
        models[name] = model = from_pretrained(folder).to(dtype=dtype)
        drawing = partial(draw, c, name, model, rvq[depth])
        tried = [
            points.get(f"{name} {scale:g} {p:g}", partial(drawing, scale, p, trial=True))
            for scale in c.guidance
            for p in c.top_p
        ]
        best = min(tried, key=lambda p: p["distance"])
        row = points.get(name, partial(drawing, best["guidance"], best["top_p"], trial=False))
        rows[name] = {**row, "depth": depth, "parameters": model.n_params, "tried": tried}
    clock(c, models, rows)
    result = {"config": to_dict(c), "reconstruction": reconstruction, "generators": rows, **compare(rows, c.depths)}
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def compare(rows: dict[str, dict[str, Any]], depths: tuple[int, ...]) -> dict[str, Any]:
    """What the claims come to: ResGen over each rival, and the first depth over each other one.

    `better` is True where the intervals of the distances lie apart, False where they lie apart the other way, None
    where they overlap: nothing is shown then.
    """
    ours = rows[f"resgen-depth{depths[0]}"]

    def better(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
        if a["interval"][1] < b["interval"][0]:
            return True
        return False if b["interval"][1] < a["interval"][0] else None

    rivals = {
        name: {"better": better(ours, row), "times_faster": row["seconds"] / ours["seconds"],
               "times_faster_alone": row["seconds_alone"] / ours["seconds_alone"],
               "distance_ratio": ours["distance"] / row["distance"]}
        for name, row in rows.items() if not name.startswith("resgen")
    }  # fmt: skip
    deeper = {}
    for depth in depths[1:]:
        row = rows[f"resgen-depth{depth}"]
        deeper[str(depth)] = {
            "better": better(ours, row),
            "times_the_seconds": ours["seconds"] / row["seconds"],
            "distance_ratio": ours["distance"] / row["distance"],
        }
    return {"against_rivals": rivals, "against_depth": deeper}


def describe(result: dict[str, Any]) -> str:
    """The tables and what they come to."""
    word = {True: "better", False: "worse", None: "no clear difference"}
    lines = []
    for depth, part in result["reconstruction"].items():
        lines.append(f"RVQ of depth {depth}, {part['images']} held-out images")
        for row, use in zip(part["rows"], part["usage"], strict=True):
            lines.append(
                f"  first {row['depths']}: {row['psnr']:5.2f} dB, {row['metric']} {row['distance']:6.2f}; depth "
                f"{row['depths']} uses {use['usage']:.0%} of its codes, perplexity {use['perplexity']:.0f}"
            )
    for name, row in result["generators"].items():
        low, high = row["interval"]
        lines.append(
            f"{name}: {row['metric']} {row['distance']:.2f} [{low:.2f}, {high:.2f}], {row['seconds']:.4f} s an image "
            f"({row['cpu_seconds']:.4f} of the CPU; {row['seconds_alone']:.4f} alone), {row['calls']:.0f} calls, "
            f"guidance {row['guidance']:g}, top-p {row['top_p']:g}, {row['parameters'] / 1e6:.2f}M parameters"
        )
    first = result["config"]["depths"][0]
    for name, verdict in result["against_rivals"].items():
        lines.append(
            f"ResGen against {name}: {word[verdict['better']]} (distance x{verdict['distance_ratio']:.2f}), "
            f"{verdict['times_faster']:.2f}x as fast in a batch, {verdict['times_faster_alone']:.2f}x alone"
        )
    for depth, verdict in result["against_depth"].items():
        lines.append(
            f"depth {first} against depth {depth}: {verdict['times_the_seconds']:.2f}x the seconds, "
            f"{word[verdict['better']]} (distance x{verdict['distance_ratio']:.2f})"
        )
    return "\n".join(lines)
