"""xAR's five entities, trained with noisy and with clean context: distance, cost, and the error by group.

`genlab bench entities` trains the models (genlab/commands/bench_entities.py) and calls `measure`.

Exposure bias. While training by teacher forcing a group sees the data; while drawing it sees what the model drew.
`exposure` measures the flow-matching loss of every group of the same held-out images under three contexts, its own
noise and times being the same in all three:

- clean: the data's groups, as teacher forcing shows them;
- noisy: the data's groups at random times, as noisy context learning shows them;
- drawn: the groups as the model redraws them. Each group of the data is noised to `level` and denoised by the model,
  which sees its own redrawn groups before it, so that errors pile up as they do in drawing while the picture stays
  the same.

Drawn minus clean is what the model's own errors cost a group. A perfect model would pay a little too (its redrawn
groups are other groups that fit), so it is models that are to be compared, at one level, not zero that is expected.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from genlab.config import config, to_dict
from genlab.generators.base import Guidance
from genlab.generators.xar import XAR, Entity
from genlab.hub import from_pretrained, write_atomic
from genlab.noise import Noise
from genlab.pictures import grid, save_png, to_float, to_uint8
from genlab.precision import DtypeName, torch_dtype
from genlab.tokens import Tokens
from samplers.flow import FlowConfig, FlowSampler

from .points import Points

CONTEXTS = ("clean", "noisy", "drawn")


@config
class EntitiesConfig:
    """Train xAR over each entity, with noisy and with clean context, for the same CPU time, and measure them all.

    Everything but entity and context is PRESET's. A single group has no context, so the image entity is trained once
    a seed. All models draw the held-out split's classes with the same sampler and guidance, and are compared with the
    training split. Interrupt it at any time: the same command goes on. Writes result.json, table.md, distances.png,
    exposure.png and grids/.
    """

    out: Path = Path("runs/entities")
    """One folder a run, and the results."""
    preset: str = "xar-patch-emoji64"
    """The recipe: tokenizer, sizes, optimiser, data."""
    entities: tuple[Entity, ...] = ("patch", "cell", "subsample", "scale", "image")
    """Which X."""
    contexts: tuple[Literal["noisy", "clean"], ...] = ("noisy", "clean")
    """What a group sees in training."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    minutes: float = 5.0
    """CPU time a run."""
    train_only: bool = False
    """Stop when all are trained."""
    reference: str = "emoji:train"
    """Reference images, or a file of their statistics."""
    n: int | None = 512
    """Images a model; None: as many as the held-out split has."""
    steps: int = 16
    """Steps a group."""
    guidance: float = 2.5
    """Guidance of all groups alike."""
    dtype: DtypeName = "auto"
    """Arithmetic while drawing; `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    batch_size: int = 64
    """Images a batch while drawing."""
    exposure_images: int = 128
    """Held-out images whose loss by group is measured."""
    level: float = 0.5
    """How far a group is noised before the model redraws it, in (0, 1]."""
    json: bool = False
    """Print JSON."""


def redraw(
    model: XAR, x_BNC: torch.Tensor, labels: torch.Tensor, noise: Noise, level: float, steps: int = 8
) -> torch.Tensor:
    """Every group noised to `level` and denoised by the model (Euler), which sees its own redrawn groups before it.

    Args:
        model: an xAR by class.
        x_BNC: data in the order of generation.
        labels: (B,).
        noise: one seed an image.
        level: 0 leaves the data as it is, 1 draws afresh.
        steps: of each group.

    Returns:
        (B, N, C), float32.

    Raises:
        ValueError: for a level outside [0, 1].
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level must be in [0, 1], got {level}")
    state = model.start(labels, Guidance(scale=1.0))
    times = [level * (1 - i / steps) for i in range(steps + 1)]
    for g in range(model.n_groups):
        stop = model.ends[g]
        clean = x_BNC[:, stop - model.sizes[g] : stop].double()
        flow = model.predict(state)
        eps = noise.at(position=model.where(g), purpose="redraw").normal(clean.shape[-1])
        x = (1 - level) * clean + level * eps
        for t, s in itertools.pairwise(times):
            if level > 0:
                x = x + (s - t) * flow.velocity(x, t)
        model.commit(state, x)
    return state.x_BNC.float()


@torch.no_grad()
def exposure(
    model: XAR, tokens_BLC: torch.Tensor, labels: torch.Tensor, noise: Noise, level: float, repeats: int = 2
) -> dict[str, list[float]]:
    """The loss of every group under clean, noisy and drawn context: see the module's docstring.

    Args:
        model: an xAR by class.
        tokens_BLC: data.
        labels: (B,).
        noise: one seed an image; the same noise for every model makes them comparable.
        level: `redraw`'s.
        repeats: draws of times and noise an image.
    """
    x = model.pack(tokens_BLC.float())
    drawn = redraw(model, x, labels, noise, level)
    total = {name: torch.zeros(model.n_groups, dtype=torch.float64) for name in CONTEXTS}
    sizes = torch.tensor(model.sizes, dtype=torch.float64)
    for r in range(repeats):
        at = noise.at(step=r)

        def noisy(kind: str, at: Noise = at) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            t_Bg = at.at(purpose=f"{kind}time").normal(model.n_groups).sigmoid().float()
            eps = at.at(purpose=f"{kind}noise").normal(model.N, x.shape[-1]).float()
            t = t_Bg[:, model.group_of, None]
            return t_Bg, (1 - t) * x + t * eps, eps - x

        t_Bg, x_t, target = noisy("")
        context_t, context_x, _ = noisy("context ")
        zero = torch.zeros_like(t_Bg)
        for name, shown, told in (("clean", x, zero), ("noisy", context_x, context_t), ("drawn", drawn, zero)):
            v = model.velocity_given(shown, told, x_t, labels, t_Bg)
            per_token = ((v.float() - target) ** 2).mean((0, 2)).double()
            total[name].index_add_(0, model.group_of, per_token / repeats)
    return {name: (sums / sizes).tolist() for name, sums in total.items()}


def measure(c: EntitiesConfig, models: dict[str, Path]) -> dict[str, Any]:
    """Draw from every trained model, measure distance, cost and exposure; write the results.

    Args:
        c: the comparison.
        models: `entity-context-seedN` to a model's folder, in the order of the table.
    """
    from genlab.data import open_images

    loaded = {name: from_pretrained(folder) for name, folder in models.items()}
    tokenizers = {m.extra["tokenizer"] for m in loaded.values()}
    assert len(tokenizers) == 1, "one preset, one tokenizer"
    tokenizer = from_pretrained(tokenizers.pop())
    heldout = open_images("emoji", split="heldout", size=tokenizer.spec.image_size[-1])
    n = min(c.n or len(heldout), len(heldout))
    labels = heldout.labels[torch.linspace(0, len(heldout) - 1, n).long()]
    picks = torch.linspace(0, len(heldout) - 1, min(c.exposure_images, len(heldout))).long()
    with torch.inference_mode():
        tokens = tokenizer.encode(to_float(heldout.batch(picks))).values

    settings = {
        k: v for k, v in to_dict(c).items() if k in ("preset", "reference", "minutes", "steps", "guidance", "level")
    }
    settings["dtype"] = str(torch_dtype(c.dtype)).removeprefix("torch.")
    points = Points(c.out / "points.json", {**settings, "n": n, "exposure_images": len(picks)})

    def point(name: str) -> dict[str, Any]:
        entity, context, seed = name.rsplit("-", 2)
        model = loaded[name]
        row: dict[str, Any] = {"entity": entity, "context": context, "seed": int(seed.removeprefix("seed"))}
        row |= draw(c, model, tokenizer, labels, c.out / "grids" / f"{name}.png", name)
        noise = Noise(torch.arange(len(picks)) + 1_000_000)
        row["exposure"] = exposure(model, tokens, heldout.labels[picks], noise, c.level) if model.n_groups > 1 else None
        row["trained"] = model.extra.get("trained", {})
        row["groups"], row["parameters"] = model.n_groups, model.n_params
        return row

    rows = [points.get(name, lambda name=name: point(name)) for name in models]  # type: ignore[misc]
    result = {"config": to_dict(c), "n": n, "rows": rows, "contexts": compare(rows)}
    plot_distances(rows, c.out / "distances.png")
    plot_exposure(rows, c.out / "exposure.png")
    write_atomic(c.out / "table.md", describe(result) + "\n")
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def draw(
    c: EntitiesConfig, model: XAR, tokenizer: Any, labels: torch.Tensor, picture: Path, name: str
) -> dict[str, Any]:
    """Distance with its interval, model calls a batch and seconds an image; a grid of some images is written."""
    from .harness import evaluate

    guidance = Guidance(scale=c.guidance, schedule="constant")
    sampler = FlowSampler(FlowConfig(steps=c.steps, guidance=guidance))
    n, cpu = len(labels), time.process_time()
    rounded = copy.deepcopy(model).to(dtype=torch_dtype(c.dtype))
    out = sampler.sample(rounded, labels, torch.arange(n), c.batch_size, progress=True)
    cpu = time.process_time() - cpu
    with torch.inference_mode():
        parts = [to_uint8(tokenizer.decode(Tokens(x, out.tokens.spec))) for x in out.tokens.values.split(64)]
    images = torch.cat(parts)
    save_png(grid(images[torch.linspace(0, n - 1, min(n, 16)).long()], columns=16), picture)
    figure = evaluate(images, c.reference, n=n, class_protocol="emoji:heldout", seeds=f"0-{n - 1}", sampler="flow",
                      guidance=str(guidance), reference_is_sample=False).figures[0]  # fmt: skip
    print(f"{name}: {figure.name} {figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]", file=sys.stderr)
    return {
        "metric": figure.name,
        "distance": figure.value,
        "interval": [figure.low, figure.high],
        "calls": out.stats.model_calls / math.ceil(n / c.batch_size),
        "seconds": out.stats.seconds / n,
        "cpu_seconds": cpu / n,
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each entity: is noisy context better? Only where all its seeds' intervals lie on one side of clean's."""
    verdicts = []
    for entity in dict.fromkeys(r["entity"] for r in rows):
        noisy, clean = ([r for r in rows if (r["entity"], r["context"]) == (entity, k)] for k in ("noisy", "clean"))
        if not noisy or not clean:
            continue
        if max(r["interval"][1] for r in noisy) < min(r["interval"][0] for r in clean):
            verdict = "noisy context is better"
        elif max(r["interval"][1] for r in clean) < min(r["interval"][0] for r in noisy):
            verdict = "clean context is better"
        else:
            verdict = "no clear difference"
        means = {k: sum(r["distance"] for r in part) / len(part) for k, part in (("noisy", noisy), ("clean", clean))}
        bias = {k: sum(map(late_bias, part)) / len(part) for k, part in (("noisy", noisy), ("clean", clean))}
        verdicts.append({"entity": entity, "distance": means, "exposure_bias": bias, "verdict": verdict})
    return verdicts


def late_bias(row: dict[str, Any]) -> float:
    """Drawn minus clean, of the later half of the groups."""
    drawn, clean = row["exposure"]["drawn"], row["exposure"]["clean"]
    late = slice(len(drawn) // 2, None)
    return sum(d - c for d, c in zip(drawn[late], clean[late], strict=True)) / len(drawn[late])


def describe(result: dict[str, Any]) -> str:
    """The tables, Markdown."""
    rows = result["rows"]
    lines = [
        f"| X | context | seed | images seen | {rows[0]['metric']} | interval | calls | s/image | CPU s/image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["interval"]
        cells = [r["entity"], r["context"], r["seed"], f"{r['trained'].get('images', 0):,}", f"{r['distance']:.2f}"]
        cells += [f"{low:.2f} to {high:.2f}", f"{r['calls']:.0f}", f"{r['seconds']:.3f}", f"{r['cpu_seconds']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| X | noisy | clean | bias, noisy | bias, clean | |", "|---|---|---|---|---|---|"]
    for v in result["contexts"]:
        d, b = v["distance"], v["exposure_bias"]
        cells = [v["entity"], f"{d['noisy']:.2f}", f"{d['clean']:.2f}", f"{b['noisy']:.4f}", f"{b['clean']:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {v['verdict']} |")
    c = result["config"]
    how = f"{c['minutes']:g} CPU-minutes a run, {result['n']} images, {c['steps']} steps a group, guidance"
    lines += [
        "",
        f"{how} {c['guidance']:g}. Bias: loss under drawn context minus under clean, later half of the groups.",
    ]
    return "\n".join(lines)


COLOURS = {"noisy": "tab:blue", "clean": "tab:orange"}


def plot_distances(rows: list[dict[str, Any]], path: Path) -> None:
    """Every run's distance with its interval, by entity; colour says the training context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.add_subplot()
    entities = list(dict.fromkeys(r["entity"] for r in rows))
    named: set[str] = set()
    for r in rows:
        shift = {"noisy": -0.12, "clean": 0.12}[r["context"]] + 0.05 * (r["seed"] % 3 - 0.5)
        error = [[max(0.0, r["distance"] - r["interval"][0])], [max(0.0, r["interval"][1] - r["distance"])]]
        label = None if r["context"] in named else f"trained with {r['context']} context"
        named.add(r["context"])
        axis.errorbar(entities.index(r["entity"]) + shift, r["distance"], yerr=error, fmt="o", ms=4, capsize=2,
                      color=COLOURS[r["context"]], label=label)  # fmt: skip
    axis.set_xticks(range(len(entities)), entities)
    axis.set_ylabel(rows[0]["metric"])
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    _save(figure, path)


def plot_exposure(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss by group index, an entity a column: clean, noisy and drawn context, mean over training seeds."""
    from matplotlib.figure import Figure

    entities = list(dict.fromkeys(r["entity"] for r in rows if r["exposure"]))
    if not entities:
        return
    figure = Figure(figsize=(3.2 * len(entities), 5.6), layout="constrained")
    axes = figure.subplots(2, len(entities), squeeze=False, sharex="col")
    styles = {"clean": "-", "noisy": ":", "drawn": "--"}
    for column, entity in enumerate(entities):
        top, bottom = axes[0, column], axes[1, column]
        for context, colour in COLOURS.items():
            part = [r["exposure"] for r in rows if (r["entity"], r["context"]) == (entity, context)]
            if not part:
                continue
            mean = {k: torch.tensor([p[k] for p in part]).mean(0) for k in CONTEXTS}
            marker = "." if len(mean["clean"]) <= 16 else ""
            for kind, style in styles.items():
                top.plot(
                    mean[kind].tolist(), style, color=colour, marker=marker, label=f"trained {context}, {kind} context"
                )
            bottom.plot((mean["drawn"] - mean["clean"]).tolist(), "--", color=colour, marker=marker)
        top.set_title(entity)
        bottom.set_xlabel("group")
        bottom.axhline(0, color="grey", lw=0.6)
    axes[0, 0].set_ylabel("flow-matching loss")
    axes[1, 0].set_ylabel("drawn minus clean")
    axes[0, -1].legend(fontsize=6)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
