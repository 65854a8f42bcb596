"""Samplers side by side, speed against quality: `genlab bench samplers GENERATOR…`.

One run on one machine: all samplers that a generator allows draw the same classes and seeds in turn, round after round,
the plain sampler first; the median round counts. Every row then draws the same `n` images for a Fréchet distance.
Beside the table: c(W), the seconds of a call that reads W tokens; what the speed-up would be if c(W) were c(1), or with
a diffusion head of a published size; where the time went. OUT gets result.json and speed_quality.png.

    genlab bench samplers llamagen-emoji64 elm-emoji64 --n 512
    genlab bench samplers mar-emoji64 --rows chain speculative --n 0      # no distances, some rows

Interrupt it at any time: distances that are measured stand in OUT/points.json, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from genlab.config import config, from_dict, to_dict
from genlab.generators.base import Condition, Generator, Guidance
from genlab.hub import CONFIG, from_pretrained, locate, write_atomic
from genlab.nn.diffusion_head import DiffusionHead
from genlab.noise import Noise
from genlab.pictures import to_uint8
from genlab.registry import SAMPLERS
from samplers.auto import fingerprint, machine
from samplers.base import Sampler, Stats, default_sampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler, in_single_file
from samplers.timing import Clock, call_costs, flops, own_cost
from samplers.token_tree import MultiDraftSampler

from .machine import PeakMemory, busy, describe_load, one_at_a_time
from .points import Points
from .projection import project

METRIC = "fd_efficientnet_lite0"


@config
class DrawingBenchConfig:
    """What benches that set ways of drawing side by side have in common."""

    n: int = 256
    """Images a distance; 0 leaves distances out."""
    reference: str = "emoji:train"
    """Reference images."""
    classes: str = "emoji:heldout"
    """Whose classes, or captions, are drawn; `even`: all classes in turn."""
    batch_size: int = 1
    """Images at once, where time is taken."""
    images: int = 1
    """Images a round and row."""
    rounds: int = 3
    """Rounds, behind a first, uncounted one."""
    draw_batch: int = 32
    """Images at once where distances are taken."""
    threads: int = 0
    """CPU threads; 0 takes torch's default."""
    device: str = "cpu"
    """Where to draw."""
    json: bool = False
    """Print JSON."""


@config
class SamplersBenchConfig(DrawingBenchConfig):
    """All samplers that a generator allows, in turn: seconds, calls, acceptance, and the distance of what each draws.

    Interrupt it at any time: the same command goes on. Writes result.json, points.json and speed_quality.png.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="GENERATOR…")]
    """Generators: shipped names, checkpoint folders, Hub ids."""
    rows: tuple[str, ...] = ()
    """Only rows whose name contains one of these; the plain sampler always."""
    add: tuple[str, ...] = ()
    """More rows, SAMPLER:option=value,option=value."""
    draft: str = ""
    """A drafting MODEL for speculative-draft, multi-draft and continuous-speculative, beside n-grams."""
    guidance: float | None = None
    """Constant guidance scale; the generator's own guidance by default."""
    window: int = 16
    """Drafts a call, where a row doesn't say."""
    out: Path = Path("runs/bench_samplers")
    """Where points.json, result.json and speed_quality.png go."""

    @property
    def constant(self) -> Guidance | None:
        """The guidance of all rows; None: the generator's own."""
        return None if self.guidance is None else Guidance(scale=self.guidance, schedule="constant")


@dataclass(frozen=True, eq=False)
class Row:
    """A sampler with its settings."""

    name: str
    sampler: Sampler


class Subject:
    """A generator with its tokenizer, classes or captions."""

    def __init__(self, name: str, c: DrawingBenchConfig) -> None:
        """Load. Raises: ValueError: for a model that draws nothing, or names no tokenizer."""
        folder = locate(name)
        generator = from_pretrained(folder, device=c.device)
        if not isinstance(generator, Generator):
            raise ValueError(f"{name} holds a {generator.kind}, which draws nothing; give generators")
        wanted = generator.extra.get("tokenizer", "")
        if not wanted:
            raise ValueError(f"{name} names no tokenizer; give a checkpoint that `genlab train` wrote")
        beside = folder / wanted
        self.name, self.generator = name, generator.eval()
        self.tokenizer = from_pretrained(beside if (beside / CONFIG).is_file() else wanted, device=c.device)
        self.labels = self._labels(c, max(c.n, c.images * (c.rounds + 1), c.batch_size))

    def _labels(self, c: DrawingBenchConfig, n: int) -> Condition:
        from genlab.data.images import named_split, open_images

        if c.classes == "even":
            return torch.arange(n) % self.generator.num_classes
        source, split = named_split(c.classes)
        images = open_images(source, split=split or "heldout")  # type: ignore[arg-type]
        pick = torch.arange(n) % len(images)
        if not self.generator.by_text:
            return images.labels[pick]
        return self.generator.read_captions([images.captions[int(i)] for i in pick])

    def decode(self, tokens: Any) -> torch.Tensor:
        """uint8 images."""
        with torch.inference_mode():
            parts = [to_uint8(self.tokenizer.decode(tokens[i : i + 64])).cpu() for i in range(0, len(tokens), 64)]
        return torch.cat(parts)


def rows_of(
    generator: Generator, c: SamplersBenchConfig, costs: tuple[tuple[int, float], ...], own: float = 0.0
) -> list[Row]:
    """Every row that this generator allows, the plain sampler first; an adaptive window knows what calls cost."""
    W, L = c.window, generator.n_groups
    plain = default_sampler(generator)
    wanted: list[tuple[str, str, dict[str, Any]]] = [(plain.name, plain.name, {})]
    if in_single_file(generator):
        for init in ("random", "model", "horizontal", "vertical"):
            for coupling in ("none", "maximal", "gumbel"):
                options = {"init": init, "coupling": coupling, "window": W}
                wanted.append((f"jacobi {init}, {coupling}", "speculative-jacobi", options))
        adaptive = {"coupling": "gumbel", "window": 2 * W, "costs": costs, "own_cost": own}
        wanted.append(("jacobi model, gumbel, adaptive", "speculative-jacobi", adaptive))
        for draft in filter(None, ("ngram", c.draft)):
            wanted.append((f"draft {draft}", "speculative-draft", {"draft": draft, "window": 4}))
            for rule in ("spectr", "distinct", "tree"):
                wanted.append((f"multi-draft {rule}, {draft}", "multi-draft", {"draft": draft, "rule": rule}))
    elif plain.name == "masked":
        wanted += [(f"masked, {s} steps", "masked", {"steps": s}) for s in (4, 8, 16, 32) if s <= L]
    elif plain.name == "chain":
        if generator.any_order:
            wanted += [(f"chain, {n} calls", "chain", {"calls": n}) for n in sorted({16, 64, L}) if n <= L]
        name = "continuous-speculative"
        wanted += [(f"{name}, window {w}", name, {"window": w}) for w in (4, 8, 16)]
        wanted += [(f"{name} {c.draft}", name, {"draft": c.draft})] if c.draft else []
    elif plain.name == "flow":
        wanted += [(f"flow, {m}", "flow", {"method": m}) for m in ("euler-maruyama", "euler", "heun")]
        wanted += [("continuous-speculative", "continuous-speculative", {})]
    elif plain.name == "distilled":
        wanted += [("distilled, 2 steps", "distilled", {"steps": 2})]
    named = {w[1] for w in wanted}
    wanted += [(name, name, {}) for name in SAMPLERS if name not in named]
    for text in c.add:
        name, _, given = text.partition(":")
        pairs = dict(part.split("=", 1) for part in given.split(",") if part)
        wanted.append((text, name, {k: _value(v) for k, v in pairs.items()}))
    rows: list[Row] = []
    for name, sampler, options in wanted:
        if sampler not in SAMPLERS or not SAMPLERS[sampler].supports(generator):
            if name in c.add:
                raise ValueError(f"--add {name}: {sampler!r} is no sampler of a {generator.kind!r} generator")
            continue
        if rows and c.rows and not any(r in name for r in c.rows) and name not in c.add:
            continue
        cls = SAMPLERS[sampler]
        fields = {"guidance": None if c.constant is None else to_dict(c.constant), **options}
        rows.append(Row(name, cls(from_dict(cls.Config, fields, where=f"row {name!r}"))))
    return rows


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def measure(subject: Subject, c: SamplersBenchConfig, points: Points) -> dict[str, Any]:
    """All rows of one generator."""
    generator, B = subject.generator, c.batch_size
    costs: tuple[tuple[int, float], ...] = ()
    own = 0.0
    if in_single_file(generator):
        costs = call_costs(generator, subject.labels[:B], c.constant)
        fixed = SpeculativeJacobiSampler(SpeculativeJacobiConfig(window=c.window, guidance=c.constant))
        own = own_cost(fixed, generator, subject.labels[:B])
    rows = rows_of(generator, c, costs, own)
    found = {row.name: _entry(row) for row in rows}
    for round_ in range(c.rounds + 1):
        for row in rows:
            entry = found[row.name]
            if "refused" in entry:
                continue
            at = torch.arange(c.images) + round_ * c.images
            try:
                with PeakMemory(generator.device) as memory:
                    out = row.sampler.sample(generator, subject.labels[at], at, batch_size=B)
            except (ValueError, FileNotFoundError, NotImplementedError) as error:
                entry["refused"] = str(error)
                continue
            if round_:
                entry["rounds"].append(out.stats.seconds / c.images)
                entry["stats"] = entry["stats"] + out.stats
                entry["peak_mb"] = max(entry["peak_mb"], memory.megabytes)
            print(f"{subject.name}, {row.name}: {out.stats.seconds / c.images:.3f} s an image", file=sys.stderr)
    batches = c.rounds * -(-c.images // B)  # a call serves a batch
    for row in rows:
        entry = found[row.name]
        stats: Stats = entry.pop("stats")
        if "refused" in entry:
            continue
        entry |= {
            "seconds": median(entry["rounds"]),
            "calls": stats.model_calls / batches,
            "head_calls": stats.head_calls / batches,
            "tokens_a_call": generator.spec.length * batches / max(1, stats.model_calls),
            "acceptance": stats.accepted / stats.proposed if stats.proposed else None,
            "by_step": [s / t if t else None for t, s in stats.by_step],
            "by_position": stats.by_position,
            "attributed": attribute(row.sampler, subject, B),
            "gflops": flops(row.sampler, generator, subject.labels[:B].to(generator.device)) / B / 1e9,
            "upper_bound": bound(row.sampler, subject),
            **(points.get(f"{subject.name}: {row.name}", partial(distance, row, subject, c)) if c.n else {}),
        }
    plain = found[rows[0].name]
    if "refused" in plain:
        raise ValueError(f"{subject.name}: the plain sampler refused: {plain['refused']}")
    for entry in found.values():
        if "refused" not in entry:
            entry["less_time"] = plain["seconds"] / entry["seconds"]
            entry["fewer_calls"] = plain["calls"] / entry["calls"] if entry["calls"] else None
    if isinstance(getattr(generator, "head", None), DiffusionHead):
        guided = (c.constant or generator.default_guidance).scale != 1
        project([found[row.name] for row in rows], B * (1 + guided))
    return {
        "model": subject.name,
        "kind": generator.kind,
        "parameters": generator.n_params,
        "tokens": generator.spec.describe(),
        "condition": "text" if generator.by_text else "class",
        "fingerprint": fingerprint(generator),
        "machine": machine(generator),
        "call_seconds": costs,
        "rows": list(found.values()),
    }


def _entry(row: Row) -> dict[str, Any]:
    settings = {k: v for k, v in to_dict(row.sampler.config).items() if k != "guidance"}
    about = {"name": row.name, "sampler": row.sampler.name, "exact": row.sampler.exact, "settings": settings}
    return {**about, "rounds": [], "stats": Stats(), "peak_mb": 0.0}


def attribute(sampler: Sampler, subject: Subject, batch: int) -> dict[str, float]:
    """Shares of the time by what it was spent on, in one more draw with clocks in it."""
    seeds, clock = torch.arange(batch), Clock()
    with torch.inference_mode(), clock.watch(subject.generator, getattr(sampler, "choice", None) or sampler):
        begin = time.perf_counter()
        sampler.draw(subject.generator, subject.labels[seeds].to(subject.generator.device), Noise(seeds))
        total = time.perf_counter() - begin
    shares = {k: v / total for k, v in sorted(clock.seconds.items(), key=lambda kv: -kv[1])}
    return {**shares, "sampler": max(0.0, 1 - sum(shares.values()))}


def bound(sampler: Sampler, subject: Subject) -> float | None:
    """Multi-draft: the dual of the transport problem, the largest acceptance a place, over one image."""
    if not isinstance(sampler, MultiDraftSampler):
        return None
    again = MultiDraftSampler(replace(sampler.config, bound=True))
    again.sample(subject.generator, subject.labels[:1], torch.arange(1))
    return again.upper_bound


def distance(row: Row, subject: Subject, c: SamplersBenchConfig) -> dict[str, Any]:
    """The Fréchet distance of a row's n images."""
    seeds = torch.arange(c.n)
    out = row.sampler.sample(subject.generator, subject.labels[seeds], seeds, c.draw_batch, progress=True)
    return frechet(subject.decode(out.tokens), row.name, c)


def frechet(images: torch.Tensor, row: str, c: DrawingBenchConfig) -> dict[str, Any]:
    """The point of a row's n images (uint8): their Fréchet distance with its interval."""
    from .harness import evaluate

    result = evaluate(images, c.reference, n=c.n, metrics=(METRIC,), class_protocol=c.classes,
                      seeds=f"0-{c.n - 1}", sampler=row, reference_is_sample=False)  # fmt: skip
    figure = result.figures[0]
    return {"fd": figure.value, "fd_low": figure.low, "fd_high": figure.high, "n": c.n}


def run(c: SamplersBenchConfig) -> dict[str, Any]:
    """Measure all models; writes result.json and speed_quality.png."""
    if not c.models:
        raise ValueError("name at least one generator: genlab bench samplers llamagen-emoji64")
    if min(c.rounds, c.images, c.batch_size, c.draw_batch, c.window) < 1 or c.n < 0:
        raise ValueError("rounds, images, batch_size, draw_batch and window must be at least 1, n not negative")
    if c.threads:
        torch.set_num_threads(c.threads)
    settings = {k: to_dict(c)[k] for k in ("n", "reference", "classes", "guidance", "window", "draft", "draw_batch")}
    with one_at_a_time() as before:
        subjects = [Subject(name, c) for name in c.models]
        prints = {s.name: fingerprint(s.generator) for s in subjects}
        points = Points(c.out / "points.json", {**settings, "weights": prints})
        models = [measure(s, c, points) for s in subjects]
        result = {
            "config": to_dict(c),
            "busy": {"before": before, "after": busy()},
            "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
            "metric": METRIC,
            "models": models,
        }
    draw_figure(result, c.out / "speed_quality.png")
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The tables."""
    out = []
    for m in result["models"]:
        out.append(f"{m['model']}: {m['kind']}, {m['parameters'] / 1e6:.1f}M, {m['tokens']}, by {m['condition']}")
        width = max(len(r["name"]) for r in m["rows"])
        out.append(
            f"  {'':<{width}} {'s/image':>8} {'less':>6} {'calls':>6} {'heads':>6} {'fewer':>6} {'tok/call':>8} "
            f"{'accept':>7} {'bound':>6} {'GFLOPs':>7} {'MB':>6} {'known':>6}  {result['metric']}"
        )
        for r in m["rows"]:
            if "refused" in r:
                out.append(f"  {r['name']:<{width}} refused: {r['refused'].splitlines()[0]}")
                continue
            fewer = f"{r['fewer_calls']:.2f}x" if r["fewer_calls"] else "-"
            accept = f"{_first(r):.2f}" if _first(r) is not None else "-"
            limit = f"{r['upper_bound']:.2f}" if r["upper_bound"] is not None else "-"
            fd = f"{r['fd']:.2f} [{r['fd_low']:.2f}, {r['fd_high']:.2f}]" if "fd" in r else "-"
            mark = "" if r["exact"] else "  (approximate)"
            out.append(
                f"  {r['name']:<{width}} {r['seconds']:>8.3f} {r['less_time']:>5.2f}x {r['calls']:>6.1f} "
                f"{r['head_calls']:>6.0f} {fewer:>6} {r['tokens_a_call']:>8.2f} {accept:>7} {limit:>6} "
                f"{r['gflops']:>7.2f} {r['peak_mb']:>6.0f} {1 - r['attributed']['sampler']:>6.0%}  {fd}{mark}"
            )
        for r in m["rows"]:
            if "projected" in r:
                told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in r["projected"].items())
                out.append(f"  {r['name']}: these calls at the published heads' measured cost: {told} less head time")
        if m["call_seconds"]:
            costs = ", ".join(f"{w}: {1e3 * s:.1f}" for w, s in m["call_seconds"])
            out.append(f"  c(W), ms of a call that reads W tokens: {costs}")
            out.append("  if c(W) were c(1), as on a large GPU, the speed-up would be `fewer` (fewer calls)")
        out.append(f"  {m['machine']}")
    out.append(describe_load(**result["busy"]))
    out.append(
        "accept: drafts that stand at the first place behind what is final; GFLOPs: of an image; known: share of the"
    )
    out.append("time that is attributed")
    return "\n".join(out)


def _first(row: dict[str, Any]) -> float | None:
    """Acceptance of the first place, which `bound` bounds; of all proposals where it isn't known."""
    return row["by_step"][0] if row["by_step"] else row["acceptance"]


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """A line a model: seconds an image against distance (calls, where none was measured), acceptance, c(W)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    path.parent.mkdir(parents=True, exist_ok=True)
    models = result["models"]
    figure = Figure(figsize=(15, 4.4 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 3, squeeze=False, width_ratios=(3, 2, 2))
    for (axis, accept, price), m in zip(grid, models, strict=True):
        rows = [r for r in m["rows"] if "refused" not in r]
        key = "fd" if all("fd" in r for r in rows) else "calls"
        for i, r in enumerate(rows):
            style: dict[str, Any] = {"marker": "os^Dv<>Pp*X"[i % 11], "color": f"C{i % 10}"}
            face = {} if r["exact"] else {"markerfacecolor": "none"}
            error = [[r["fd"] - r["fd_low"]], [r["fd_high"] - r["fd"]]] if key == "fd" else None
            axis.errorbar(
                r["seconds"], r[key], error, label=r["name"], elinewidth=0.6, linestyle="none", **style, **face
            )
            if r["by_step"]:
                accept.plot(range(1, len(r["by_step"]) + 1), r["by_step"], **style, markersize=3, linewidth=0.8)
        axis.set(xscale="log", xlabel="seconds an image", title=Path(m["model"]).name)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        accept.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(result["metric"] if key == "fd" else "model calls")
        axis.legend(fontsize=7, loc="center right", bbox_to_anchor=(-0.12, 0.5), title="hollow: approximate")
        accept.set(xlabel="draft's place (or denoising step)", ylabel="stands, if all before it do", ylim=(0, 1))
        if m["call_seconds"]:
            tokens, seconds = zip(*m["call_seconds"], strict=True)
            price.plot(tokens, [s / seconds[0] for s in seconds], "o-")
            price.set(
                xscale="log", xticks=tokens, xticklabels=tokens, xlabel="tokens W a call reads", ylabel="c(W) / c(1)"
            )
            price.set_ylim(bottom=0)
        else:
            price.set_axis_off()
        for some in (axis, accept, price):
            some.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
