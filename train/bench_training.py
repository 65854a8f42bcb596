"""How much of the machine's arithmetic training uses, and what takes the rest: `genlab bench training`.

Each preset takes real steps of the real loop, in a process of its own with as many threads as the preset says: some to
settle, some that are timed, and some that torch's profiler watches. Times are CPU time, so that other work on the
machine counts as little as it can; its caches and memory are still shared. Nothing is written but a temporary folder.

    genlab bench training                                  # the small presets whose inputs are at hand
    genlab bench training flow-emoji64 --seconds 30

MFU is the model's arithmetic, forward and backward, against what square matrix products alone reach in the same
precision on one thread (`train.speed.peak_flops`). Beside it stands where the time went, and how much quicker a step is
because freed memory is kept (`train.speed.keep_memory`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config, to_dict

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "convolution", "mkldnn_convolution",
                        "convolution_backward"),
    "fused attention": tuple(f"_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")),
    "optimiser": ("_fused_adamw_", "_foreach_lerp_", "_foreach_norm", "_foreach_mul_"),
    "casts and copies": ("copy_", "_to_copy", "clone", "cat"),
}  # fmt: skip
"""Torch's operations by what they are for; the others are "elementwise"."""


@config
class TrainingBenchConfig:
    """Train each PRESET for some seconds: utilisation of the machine, and where the time goes."""

    presets: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which; by default all small ones (`-emoji64`, `-anim64`) whose tokenizer, start and teacher are at hand."""
    seconds: float = 15.0
    """CPU time of the timed steps, each."""
    profiled: int = 8
    """Steps that are profiled."""
    batch_size: int = 0
    """Images a step; 0 takes the preset's."""
    memory: bool = True
    """Also time steps that hand freed memory back to the kernel."""
    compile: bool = False
    """Also time steps of compiled blocks (training's `--compile`; it takes a C++ compiler and some minutes)."""
    json: bool = False
    """Print JSON."""


class Enough(Exception):
    """Ends a training that was only watched."""


class Watch:
    """Stands in for a task's `batch`, which the loop calls once a step: counts, times, profiles, ends the training."""

    def __init__(self, task: Any, settle: int, seconds: float, profiled: int) -> None:
        """Args: task: whose steps. settle: steps before the clock. seconds: of CPU. profiled: steps behind that."""
        from torch.profiler import ProfilerActivity, profile

        self.batch, self.settle, self.seconds, self.profiled = task.batch, settle, seconds, profiled
        self.step, self.images, self.took, self.end = 0, 0, 0.0, math.inf
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, start: int, n: int, following: int | None = None) -> Any:
        """The task's batch. Raises: Enough: behind the last step."""
        if self.step == self.settle:
            self.start, self.first = time.process_time(), start
        if self.step > self.settle and math.isinf(self.end):
            self.took = time.process_time() - self.start
            if self.took >= self.seconds:
                self.images, self.end = start - self.first, self.step + self.profiled
                if not self.profiled:
                    raise Enough
                self.profiler.__enter__()
        if self.step == self.end:
            self.profiler.__exit__(None, None, None)
            raise Enough
        self.step += 1
        return self.batch(start, n, following)

    def spent(self) -> dict[str, float]:
        """Seconds of a profiled step by kind of operation."""
        out = dict.fromkeys([*KINDS, "elementwise"], 0.0)
        kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
        for event in self.profiler.key_averages():
            if event.key.startswith("aten::"):
                out[kind_of.get(event.key, "elementwise")] += event.self_cpu_time_total / 1e6 / self.profiled
        return out


def measure(name: str, c: TrainingBenchConfig, keep: bool = True, compiled: bool = False) -> dict[str, Any]:
    """One preset's figures; it changes the process it runs in.

    Args:
        name: the preset.
        c: how long.
        keep: whether freed memory is kept.
        compiled: whether the model's blocks are.
    """
    import torch

    from . import loop, plan
    from .presets import PRESETS
    from .speed import peak_flops
    from .tasks import build_task

    if not keep:
        loop.keep_memory = lambda: False
    run = dataclasses.replace(PRESETS[name](), sample_every=0, save_every=0, cpu_minutes=0.0, images=1 << 40,
                              compile=compiled)  # fmt: skip
    run = dataclasses.replace(run, batch_size=c.batch_size or run.batch_size)
    torch.set_num_threads(run.threads or torch.get_num_threads())
    task = build_task(run)
    watch = Watch(task, settle=4, seconds=c.seconds, profiled=c.profiled if keep and not compiled else 0)
    task.batch = watch  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:
        with suppress(Enough), redirect_stderr(io.StringIO()):  # the loop's bar
            loop.train(run, Path(out), resume="never", device="cpu", task=task)
        precision = json.loads((Path(out) / "config.json").read_text())["precision"]
    speed = watch.images / watch.took
    result = {"images_per_cpu_second": speed, "precision": precision, "batch_size": run.batch_size}
    if keep:
        flops = plan.footprint(run).flops
        a_step = run.batch_size / speed
        spent = watch.spent() if watch.profiled else {}
        result["mfu"] = flops * speed / peak_flops(torch.device("cpu"), precision)
        result["gflops_per_image"] = flops / 1e9
        result["shares"] = {kind: seconds / a_step for kind, seconds in spent.items()}
    return result


def at_hand(name: str) -> bool:
    """Whether what a preset starts from is there: nothing, or MODELs that are found."""
    from genlab.hub import locate

    from .presets import PRESETS

    run = PRESETS[name]()
    needs = (run.tokenizer, run.init, run.teacher, run.codes_of, getattr(run.model, "teacher", ""))
    try:
        return all(not need or bool(locate(need)) for need in needs)
    except (FileNotFoundError, ValueError, OSError):
        return False


def run(c: TrainingBenchConfig) -> dict[str, Any]:
    """Measure every preset, each in a fresh process.

    Raises:
        ValueError: for an unknown preset, or one that lacks what it starts from.
    """
    from tqdm import tqdm

    from .presets import PRESETS

    if unknown := [name for name in c.presets if name not in PRESETS]:
        raise ValueError(f"no preset {', '.join(unknown)}; `genlab list` names them")
    if missing := [name for name in c.presets if not at_hand(name)]:
        raise ValueError(f"{', '.join(missing)}: what it starts from isn't there; train that first")
    names = c.presets or tuple(n for n in PRESETS if n.endswith(("-emoji64", "-anim64")) and at_hand(n))
    spawn = multiprocessing.get_context("spawn")
    rows = {}
    for name in tqdm(names, desc="presets", file=sys.stderr):
        rows[name] = _apart(spawn, name, c)
        if c.memory:
            returned = _apart(spawn, name, c, False)["images_per_cpu_second"]
            rows[name]["kept_memory"] = rows[name]["images_per_cpu_second"] / returned
        if c.compile:
            compiled = _apart(spawn, name, c, True, True)
            rows[name]["compiled"] = compiled["images_per_cpu_second"] / rows[name]["images_per_cpu_second"]
            rows[name]["compiled_mfu"] = compiled["mfu"]
    return {"config": to_dict(c), "presets": rows}


def _apart(spawn: Any, name: str, c: TrainingBenchConfig, *how: bool) -> dict[str, Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no news of the profiler's
    with spawn.Pool(1) as pool:
        return pool.apply(measure, (name, c, *how))


def describe(result: dict[str, Any]) -> str:
    """A Markdown table."""
    kinds = [*KINDS, "elementwise"]
    heads = ["preset", "images a step", "images a CPU-second", "MFU", *kinds, "Python and the rest", "kept memory"]
    extra = any("compiled" in row for row in result["presets"].values())
    heads += ["compiled", "MFU then"] * extra
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in result["presets"].items():
        shares = [row["shares"].get(kind, 0.0) for kind in kinds]
        rest = max(0.0, 1 - sum(shares))
        cells = [f"`{name}`", str(row["batch_size"]), f"{row['images_per_cpu_second']:.1f}", f"{row['mfu']:.0%}"]
        cells += [f"{share:.0%}" for share in (*shares, rest)]
        cells.append(f"{row['kept_memory']:.2f}x" if "kept_memory" in row else "")
        if extra:
            cells += [f"{row['compiled']:.2f}x", f"{row['compiled_mfu']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
