"""Distilled Decoding's student beside its teacher: `genlab bench distilled STUDENT`.

One run on one machine. Each row draws the same classes (or captions) and seeds: the teacher by its plain sampler, the
teacher by the map that the student has learnt, the student in one, two and four steps, the student mixed with the
teacher. Time is taken in rounds, all rows in turn, and the median counts; a Fréchet distance is taken on `n` images a
row. `agrees` is the share of tokens equal to the map's, where both had the same noise.

`factorised` is what one step can be without the map: every token drawn on its own, by its marginal under the class.
It needs no training to be as good as it can be: the teacher's own tokens, place by place shuffled among the images of
a class, have exactly the teacher's marginals, and nothing else of it. (By caption, eight images each are shuffled.)

    genlab bench distilled dd-llamagen-emoji64 --n 512

Interrupt it at any time: distances that are measured stand in OUT/points.json, and the same command goes on. OUT gets
result.json, table.txt and a grid of images a row.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from genlab.config import config, to_dict
from genlab.generators.base import Condition
from genlab.generators.distilled import Distilled
from genlab.hub import from_pretrained, locate, read_description, write_atomic
from genlab.noise import permutation
from genlab.pictures import grid, save_png
from genlab.tokens import Tokens
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.base import Sampler, Stats
from samplers.distilled import DistilledSampler, DistilledSamplerConfig

from .bench_samplers import METRIC, DrawingBenchConfig, Subject, frechet
from .machine import busy, describe_load, one_at_a_time
from .points import Points

DRAWS = 8
"""Images of a caption whose tokens are shuffled for the factorised row."""


@config
class DistilledBenchConfig(DrawingBenchConfig):
    """A student of Distilled Decoding beside its teacher, alone and mixed with it: seconds, distance, agreement.

    Interrupt it at any time: the same command goes on. Writes result.json, points.json, table.txt and a grid a row.
    """

    model: Annotated[str, tyro.conf.Positional] = "dd-llamagen-emoji64"
    """The student: a shipped name, a checkpoint folder or a Hub id."""
    teacher: str = ""
    """Its teacher; empty: the one it names."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Rows of the student alone."""
    mixed: tuple[float, ...] = (1 / 12, 1 / 6, 1 / 3)
    """Rows mixed with the teacher: the share of the groups that it draws, in front of the last jump."""
    n: int = 512
    """Images a distance; 0 leaves distances out."""
    rounds: int = 5
    """Rounds, behind a first, uncounted one."""
    out: Path = Path("runs/bench_distilled")
    """Where points.json, result.json, table.txt and the grids go."""


def rows_of(student: Distilled, c: DistilledBenchConfig, teacher: str) -> dict[str, Sampler]:
    """Name to sampler; the teacher's plain one first."""
    n, how = student.n_groups, student.config.map
    plain = AncestralConfig(guidance=how.guidance, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    row = lambda **options: DistilledSampler(DistilledSamplerConfig(teacher=teacher, **options))  # noqa: E731
    rows: dict[str, Sampler] = {"teacher": AncestralSampler(plain), "teacher by the map": row(teacher_groups=n)}
    rows |= {f"{s} step{'s' * (s > 1)}": row(steps=s) for s in c.steps if s <= n}
    for share in c.mixed:
        groups = max(1, round(share * n))
        last = row(steps=2).starts(student)[-1]
        options = {"steps": 2, "teacher_groups": groups} if groups < last else {"teacher_groups": groups}
        calls = groups + (2 if groups < last else 1)
        rows[f"mixed, {groups} group{'s' * (groups > 1)} the teacher's, {calls} calls"] = row(**options)
    return rows


def factorised(tokens: torch.Tensor, group: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Token values (N, *shape), each place's (and sub-token's) shuffled among the images of a group (N,)."""
    flat, out = tokens.flatten(1), tokens.flatten(1).clone()
    for g in group.unique().tolist():
        rows = (group == g).nonzero()[:, 0]
        for place in range(flat.shape[1]):
            # a place's numbers must differ from group to group and place to place
            order = permutation(len(rows), (seed << 40) + g * flat.shape[1] + place, "factorised")
            out[rows, place] = flat[rows[order], place]
    return out.view_as(tokens)


class Bench:
    """A student, its teacher, and what is drawn."""

    def __init__(self, c: DistilledBenchConfig) -> None:
        """Load. Raises: ValueError: for a model that is no student, or names no teacher."""
        self.c, self.subject = c, Subject(c.model, c)
        student = self.subject.generator
        if not isinstance(student, Distilled):
            raise ValueError(f"{c.model} is a {student.kind}, not a student: train one with `genlab train dd-…`")
        self.student, self.teacher_name = student, c.teacher or student.config.teacher
        if not self.teacher_name:
            raise ValueError(f"{c.model} names no teacher; give one with --teacher MODEL")
        self.teacher = from_pretrained(self.teacher_name, device=c.device)
        self.rows = rows_of(student, c, self.teacher_name)
        self._drawn: dict[str, torch.Tensor] = {}

    def draw(self, name: str, labels: Condition, seeds: torch.Tensor, batch: int, progress: bool = False) -> Any:
        """Tokens and cost of a row."""
        model = self.teacher if name == "teacher" else self.student
        return self.rows[name].sample(model, labels, seeds, batch, progress)

    def clock(self) -> dict[str, dict[str, Any]]:
        """Seconds and calls an image of every row, all in turn."""
        c = self.c
        found: dict[str, dict[str, Any]] = {name: {"rounds": [], "stats": Stats()} for name in self.rows}
        for round_ in range(c.rounds + 1):
            for name in self.rows:
                at = torch.arange(c.images) + round_ * c.images
                stats = self.draw(name, self.subject.labels[at], at, c.batch_size).stats
                if round_:
                    found[name]["rounds"].append(stats.seconds / c.images)
                    found[name]["stats"] += stats
        batches = c.rounds * -(-c.images // c.batch_size)
        for entry in found.values():
            entry["calls"] = entry.pop("stats").model_calls / batches
            entry["seconds"] = median(entry["rounds"])
        return found

    def tokens(self, name: str) -> torch.Tensor:
        """Token values of a row's n images, drawn once."""
        if name not in self._drawn:
            c, seeds, labels = self.c, torch.arange(self.c.n), self.subject.labels
            if name != "factorised":
                values = self.draw(name, labels[seeds], seeds, c.draw_batch, progress=True).tokens.values.cpu()
            elif isinstance(labels, torch.Tensor):
                values = factorised(self.tokens("teacher"), labels[seeds])
            else:
                of = seeds // DRAWS
                drawn = self.draw("teacher", labels[of], seeds, c.draw_batch, progress=True)
                values = factorised(drawn.tokens.values.cpu(), of)
            self._drawn[name] = values
        return self._drawn[name]

    def distance(self, name: str) -> dict[str, Any]:
        """A row's distance, its agreement with the map, and its grid of images."""
        c, values = self.c, self.tokens(name)
        images = self.subject.decode(Tokens(values.to(self.student.device), self.student.spec))
        picks = torch.linspace(0, c.n - 1, min(c.n, 64)).long()
        c.out.mkdir(parents=True, exist_ok=True)
        save_png(grid(images[picks], columns=16), c.out / f"{re.sub('[^a-z0-9]+', '-', name)}.png")
        point = frechet(images, name, c)
        if name not in ("teacher", "factorised"):
            point["agrees"] = float((values == self.tokens("teacher by the map")).float().mean())
        return point


def run(c: DistilledBenchConfig) -> dict[str, Any]:
    """Measure every row; writes result.json and table.txt.

    Raises:
        ValueError: for counts that aren't positive, or a model that is no student.
    """
    if min(c.rounds, c.images, c.batch_size, c.draw_batch) < 1 or c.n < 0:
        raise ValueError("rounds, images, batch_size and draw_batch must be at least 1, n not negative")
    if c.threads:
        torch.set_num_threads(c.threads)
    with one_at_a_time() as before:
        bench = Bench(c)
        about = {k: to_dict(c)[k] for k in ("model", "n", "reference", "classes", "draw_batch")}
        weights = {c.model: _sha(c.model), bench.teacher_name: _sha(bench.teacher_name)}
        points = Points(c.out / "points.json", {**about, "weights": weights})
        rows = bench.clock()
        after = busy()
        rows["factorised"] = {"rounds": [], "seconds": None, "calls": 1.0}
        for name in rows if c.n else ():
            rows[name] |= points.get(name, lambda name=name: bench.distance(name))  # type: ignore[misc]
    plain = rows["teacher"]
    for row in rows.values():
        row["less_time"] = plain["seconds"] / row["seconds"] if row["seconds"] else None
        row["fewer_calls"] = plain["calls"] / row["calls"]
        row["fd_ratio"] = row["fd"] / plain["fd"] if "fd" in row else None
    result = {
        "config": to_dict(c), "teacher": bench.teacher_name, "metric": METRIC, "weights": weights,
        "tokens": bench.student.spec.describe(), "parameters": bench.student.n_params,
        "condition": "text" if bench.student.by_text else "class",
        "busy": {"before": before, "after": after}, "rows": rows,
    }  # fmt: skip
    write_atomic(c.out / "table.txt", describe(result) + "\n")
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _sha(name: str) -> str:
    return str(read_description(locate(name)).get("sha256", ""))


def describe(result: dict[str, Any]) -> str:
    """The table."""
    rows, width = result["rows"], max(map(len, result["rows"]))
    out = [
        f"{result['config']['model']}, a student of {result['teacher']}: {result['tokens']}, by {result['condition']}",
        f"{'':<{width}} {'s/image':>8} {'less':>7} {'calls':>6} {'fewer':>7} {'agrees':>7} {'ratio':>6}  "
        + result["metric"],
    ]
    for name, r in rows.items():
        seconds = f"{r['seconds']:.4f}" if r["seconds"] else "-"
        less = f"{r['less_time']:.2f}x" if r["less_time"] else "-"
        agrees = f"{r['agrees']:.1%}" if "agrees" in r else "-"
        ratio = f"{r['fd_ratio']:.2f}" if r["fd_ratio"] else "-"
        fd = f"{r['fd']:.2f} [{r['fd_low']:.2f}, {r['fd_high']:.2f}]" if "fd" in r else "-"
        out.append(
            f"{name:<{width}} {seconds:>8} {less:>7} {r['calls']:>6.0f} {r['fewer_calls']:>6.1f}x {agrees:>7} "
            f"{ratio:>6}  {fd}"
        )
    out.append(describe_load(**result["busy"]))
    out.append("all rows but the teacher's are approximate; factorised: every token on its own, by its exact marginal")
    return "\n".join(out)
