"""ECAR against a single-stage flow of equal size, cost against Fréchet distance: `genlab bench ecar`.

Both sweep their steps, under one protocol, on one machine, in one run. The cost is FLOPs (torch's FlopCounterMode,
attention included) and seconds an image, of drawing tokens; decoding is the same for both and left out. The baseline's
point is its cheapest within 2 % of its best distance; ECAR's its cheapest within 1.1 times that point's distance.

    genlab bench ecar --ecar ecar-emoji64 --flow flow-emoji64 --out runs/bench_ecar

Interrupt it at any time: the points that are measured stand in OUT/points.json, and the same command goes on; seconds
are measured at the end, all points in turn, several rounds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from genlab.config import config, from_dict, to_dict
from genlab.generators.base import Guidance
from genlab.hub import from_pretrained, write_atomic
from genlab.pictures import to_uint8
from genlab.precision import DtypeName, torch_dtype
from samplers.flow import FlowConfig, FlowSampler
from samplers.timing import flops

from .points import Points

Name = Literal["ecar", "flow"]


@config
class BenchConfig:
    """Sweep the steps of ECAR and of one flow, draw their fronts of cost against distance, and compare.

    Interrupt it at any time: the same command goes on. Writes points.json, result.json and fronts.png.
    """

    ecar: str = "ecar-emoji64"
    """The contender, a MODEL."""
    flow: str = "flow-emoji64"
    """The baseline, a MODEL of the same tokenizer."""
    out: Path = Path("runs/bench_ecar")
    """Where points.json, result.json and fronts.png go."""
    reference: str = "emoji:train"
    """Reference images."""
    classes: Literal["emoji:heldout", "emoji:train"] = "emoji:heldout"
    """Whose classes are drawn."""
    n: int = 512
    """Images a point."""
    batch_size: int = 32
    """Images a batch."""
    dtype: DtypeName = "auto"
    """Arithmetic while drawing, for both; `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    guidance: tuple[float, ...] = (2.0, 3.0, 4.0)
    """Guidance scales tried for each model, with the first of its Euler steps; the best is kept. Constant, over the
    groups that the model guides by default (ECAR: all stages but the last)."""
    flow_euler: tuple[int, ...] = (16, 24, 12, 10, 8, 6)
    """The baseline's steps, by Euler."""
    flow_heun: tuple[int, ...] = (8, 6, 5, 4)
    """The baseline's steps, by Heun: two evaluations each, the last one."""
    ecar_euler: tuple[tuple[int, int, int], ...] = (
        (6, 4, 3), (12, 8, 6), (8, 5, 4), (4, 3, 3), (6, 4, 2), (4, 3, 2), (3, 2, 2),
    )  # fmt: skip
    """ECAR's steps of each stage, by Euler: few at full resolution."""
    ecar_heun: tuple[tuple[int, int, int], ...] = ((4, 3, 3), (4, 3, 2), (6, 2, 2), (4, 2, 2), (3, 2, 2), (3, 2, 1))
    """ECAR's steps of each stage, by Heun."""
    rounds: int = 3
    """How often every point is timed; the fastest counts."""
    slack: float = 1.1
    """How much farther than the baseline's point ECAR's may lie."""
    json: bool = False
    """Print JSON."""


def candidates(c: BenchConfig, name: Name, guidance: Guidance) -> list[FlowConfig]:
    """Every point of one model, that which decides the guidance first."""
    euler: Any = c.ecar_euler if name == "ecar" else c.flow_euler
    heun: Any = c.ecar_heun if name == "ecar" else c.flow_heun
    return [FlowConfig(method="euler", steps=s, guidance=guidance) for s in euler] + [
        FlowConfig(method="heun", steps=s, guidance=guidance) for s in heun
    ]


class Bench:
    """The two models, their images and the points measured so far."""

    def __init__(self, c: BenchConfig) -> None:
        """Args: c: the comparison. Raises: ValueError: for models of different tokenizers or sizes."""
        from genlab.data import open_images

        self.c = c
        self.models = {"ecar": from_pretrained(c.ecar), "flow": from_pretrained(c.flow)}
        names = {m.extra.get("tokenizer") for m in self.models.values()}
        sizes = [m.n_params for m in self.models.values()]
        if len(names) != 1 or None in names:
            raise ValueError(f"the models were trained on tokens of {names}: they need one tokenizer")
        if max(sizes) > 1.02 * min(sizes):
            raise ValueError(f"the models have {sizes} parameters: more than 2 % apart is no fair comparison")
        self.tokenizer = from_pretrained(names.pop())
        split: Any = c.classes.split(":")[1]
        labels = open_images("emoji", split=split, size=self.tokenizer.spec.image_size[-1]).labels
        self.labels = labels[torch.linspace(0, len(labels) - 1, min(c.n, len(labels))).long()]
        dtype = torch_dtype(c.dtype)
        for model in self.models.values():
            model.to(dtype=dtype)
        held = {k: v for k, v in to_dict(c).items() if k in ("ecar", "flow", "reference", "classes", "n")}
        held["dtype"] = str(dtype).removeprefix("torch.")
        self.points = Points(c.out / "points.json", held)

    def measure(self, name: Name, config: FlowConfig) -> dict[str, Any]:
        """One point's distance and FLOPs, from the file where it is there."""
        key = f"{name} {json.dumps(to_dict(config), sort_keys=True)}"
        return self.points.get(key, lambda: self._measure(name, config, key))

    def _measure(self, name: Name, config: FlowConfig, key: str) -> dict[str, Any]:
        from .harness import evaluate

        model, c, sampler = self.models[name], self.c, FlowSampler(config)
        drawn = sampler.sample(model, self.labels, torch.arange(len(self.labels)), c.batch_size, progress=True)
        with torch.no_grad():
            parts = [self.tokenizer.decode(drawn.tokens[i : i + 64]) for i in range(0, len(self.labels), 64)]
        n = len(self.labels)
        result = evaluate(to_uint8(torch.cat(parts)), c.reference, n=n, class_protocol=c.classes, seeds=f"0-{n - 1}",
                          sampler=key, guidance=str(config.guidance), reference_is_sample=False)  # fmt: skip
        figure, B = result.figures[0], min(c.batch_size, n)
        gflops = flops(sampler, model, self.labels[:B]) / B / 1e9
        print(f"{key}: {figure.value:.2f}, {gflops:.2f} GFLOPs an image", file=sys.stderr)
        return {
            "model": name,
            "config": to_dict(config),
            "metric": figure.name,
            "distance": figure.value,
            "interval": [figure.low, figure.high],
            "n": n,
            "gflops": gflops,
        }

    def sweep(self, name: Name) -> list[dict[str, Any]]:
        """The best guidance with the first steps, then every number of steps with it."""
        own = self.models[name].default_guidance  # ECAR's leaves its last stage out
        scales = [replace(own, scale=scale, schedule="constant") for scale in self.c.guidance]
        firsts = [(guidance, self.measure(name, candidates(self.c, name, guidance)[0])) for guidance in scales]
        best = min(firsts, key=lambda pair: pair[1]["distance"])[0]
        return [self.measure(name, config) for config in candidates(self.c, name, best)]

    def clock(self, points: list[dict[str, Any]]) -> None:
        """Seconds an image of every point, on the clock and of the CPU: all points in turn, the fastest round."""
        labels = self.labels[: self.c.batch_size]
        for point in points:
            point["seconds"] = point["cpu_seconds"] = float("inf")
        for _ in range(self.c.rounds):
            for point in points:
                sampler = FlowSampler(from_dict(FlowConfig, point["config"]))
                start, cpu = time.perf_counter(), time.process_time()
                sampler.sample(self.models[point["model"]], labels, torch.arange(len(labels)), len(labels))
                point["seconds"] = min(point["seconds"], (time.perf_counter() - start) / len(labels))
                point["cpu_seconds"] = min(point["cpu_seconds"], (time.process_time() - cpu) / len(labels))


def cheapest(points: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """The point of fewest FLOPs whose distance is at most `limit`."""
    good = [p for p in points if p["distance"] <= limit]
    return min(good, key=lambda p: p["gflops"]) if good else None


def front(points: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The points that no other beats in both cost and distance, cheap to expensive."""
    kept: list[dict[str, Any]] = []
    for p in sorted(points, key=lambda p: (p[cost], p["distance"])):
        if not kept or p["distance"] < kept[-1]["distance"]:
            kept.append(p)
    return kept


def draw_fronts(baseline: list[dict[str, Any]], ours: list[dict[str, Any]], path: Path) -> None:
    """Both fronts, distance over FLOPs and over seconds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, cost, label in zip(
        figure.subplots(1, 2, sharey=True), ("gflops", "seconds"), ("GFLOPs an image", "seconds an image"), strict=True
    ):
        for points, name, colour in ((baseline, "one flow", "tab:grey"), (ours, "ECAR", "tab:blue")):
            axis.scatter([p[cost] for p in points], [p["distance"] for p in points], s=12, color=colour, alpha=0.5)
            best = front(points, cost)
            axis.plot([p[cost] for p in best], [p["distance"] for p in best], color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(baseline[0]["metric"])
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def run(c: BenchConfig) -> dict[str, Any]:
    """Sweep both, time both, compare; writes result.json and fronts.png."""
    bench = Bench(c)
    baseline, ours = bench.sweep("flow"), bench.sweep("ecar")
    bench.clock(baseline + ours)
    reference = cheapest(baseline, 1.02 * min(p["distance"] for p in baseline))
    assert reference is not None
    ours_point = cheapest(ours, c.slack * reference["distance"])
    result: dict[str, Any] = {
        "config": to_dict(c),
        "parameters": {name: model.n_params for name, model in bench.models.items()},
        "baseline": reference,
        "ecar": ours_point,
        "fewer_flops": ours_point and reference["gflops"] / ours_point["gflops"],
        "less_time": ours_point and reference["seconds"] / ours_point["seconds"],
        "less_cpu_time": ours_point and reference["cpu_seconds"] / ours_point["cpu_seconds"],
        "points": baseline + ours,
    }
    draw_fronts(baseline, ours, c.out / "fronts.png")
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The two points, and the verdict."""
    lines = []
    for name in ("baseline", "ecar"):
        p = result[name]
        if p is None:
            lines.append(f"{name}: no point within {result['config']['slack']} times the baseline's distance")
            continue
        low, high = p["interval"]
        cost = f"{p['gflops']:.3f} GFLOPs, {p['seconds']:.4f} s an image"
        how = f"{p['config']['method']} {p['config']['steps']}"
        lines.append(f"{name}: {p['distance']:.2f} [{low:.2f}, {high:.2f}], {cost}, {how}")
    if result["ecar"]:
        fewer, less, cpu = result["fewer_flops"], result["less_time"], result["less_cpu_time"]
        lines.append(
            f"ECAR at an equal distance: {fewer:.2f}x fewer FLOPs, {less:.2f}x less time ({cpu:.2f}x of the CPU)"
        )
    return "\n".join(lines)
