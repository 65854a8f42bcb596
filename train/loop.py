"""The training loop, for every model: read it top to bottom.

    genlab train kl_vae-f8c16-emoji64                       one CPU or one GPU
    torchrun --nproc-per-node 8 -m genlab.cli train …       many GPUs, many nodes (docs/cluster.md)

Progress counts images. Order, noise and schedule are functions of (seed, images seen), so a stopped and
resumed run equals an uninterrupted one, bit for bit on a CPU; and a batch is the same images with the same noise
on any number of processes, each taking its part of it.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from genlab.config import load_json, to_dict, to_json
from genlab.hub import Model, save_pretrained, write_atomic
from genlab.nn.flops import flop_counter
from genlab.pictures import grid, save_png
from genlab.precision import has_bf16
from genlab.processes import gather, parts_of_a_batch

from . import checkpoint
from .config import OptimConfig, TrainConfig, read_config, require_ranges
from .scale import compile_blocks, local, optimizer_places, recompute_blocks, shard, shard_average, whole
from .speed import keep_memory, peak_flops
from .tasks import Task, build_task

HOW = ("parallel", "recompute")
"""What a resumed run may do otherwise: the result is the same."""


class TrainingError(RuntimeError):
    """The run can't go on; the last checkpoint is whole."""


def learning_rate(config: OptimConfig, images_seen: int, progress: float) -> float:
    """Linear warm-up over images, then constant, or a cosine over the run's progress in [0, 1]."""
    lr = config.lr * min(1.0, (images_seen + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        lr *= config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lr


def make_optimizer(task: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay spares vectors (gains, biases)."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; buffers are copied."""
    averaged: list[torch.Tensor] = [p for p in ema.parameters() if p.is_floating_point()]
    current: list[torch.Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    torch._foreach_lerp_([local(p) for p in averaged], [local(p) for p in current], 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers(), strict=True):
        a.copy_(b)


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the output folder; a second run in it is refused, and so is a folder that can't be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise ValueError(f"can't write to {out} ({error}); choose another --out") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is training in {out}; stop it or choose another --out") from None
        yield


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, so that the loop saves and ends; a second SIGINT ends it at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for s, h in old.items():
            signal.signal(s, h)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Says what could not be written (the disk is full, say), and that nothing is lost."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{what} could not be written: {error}. Stopped; checkpoints written before are whole: make room, and the "
            "same command goes on from the newest"
        ) from error


def _trim_metrics(path: Path, images_seen: int) -> None:
    """Drop the lines that a resumed run will write again, and a line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["images"] <= images_seen:
                kept.append(line + "\n")
    write_atomic(path, "".join(kept))


def began(out: Path) -> TrainConfig | None:
    """The config of the run in a folder; options that came after it began have their defaults."""
    path = out / "config.json"
    return read_config(load_json(path), where=str(path)) if path.exists() else None


def train_once(config: TrainConfig, out: Path, device: str = "cpu") -> Path:
    """The model folder of a run, trained now unless it is finished.

    Raises:
        ValueError: if the folder holds a finished run of other settings.
    """
    if not (out / "model").is_dir():
        train(config, out, device=device)
    elif (was := began(out)) is None or to_dict(was) != to_dict(settle(config, was.precision)):
        raise ValueError(f"{out} holds a finished run of other settings: give another --out, or delete it")
    return out / "model"


def device_of(name: str | None) -> torch.device:
    """Where this process trains: the CPU if that is asked for, else what accelerate gives it.

    Raises:
        ValueError: if something else is asked for.
    """
    from accelerate import PartialState

    here, found = PartialState(cpu=name == "cpu").device, (name or "auto").partition(":")
    if found[0] not in ("auto", here.type) or found[2] not in ("", str(here.index)):
        raise ValueError(f"no device {name!r} to train on, accelerate gives {here}; take --device auto or cpu")
    return here


def settle(config: TrainConfig, precision: Literal["auto", "fp32", "bf16"]) -> TrainConfig:
    """The config with `precision: auto` settled."""
    return dataclasses.replace(config, precision=precision) if config.precision == "auto" else config


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Build everything, run one batch forward and backward, and say what the run would be.

    Raises:
        ValueError: if a run of this config could not begin.
    """
    require_ranges(config)
    task = build_task(config)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    batch = task.batch(0, min(config.batch_size, 8))
    start = time.perf_counter()
    losses = task(batch, 0)
    losses["loss"].backward()
    return {
        "config": to_dict(config),
        "parameters": task.model.n_params,
        "trained_parameters": trained,
        "spec": task.model.spec.describe(),
        "batch": list(batch.x.shape),
        "training_images": len(task.images),
        "data_report": task.images.report(),
        # weights, gradients, two moments and the average, in float32; activations come on top
        "state_bytes": 4 * (4 * trained + task.model.n_params),
        "loss": {k: float(v.detach()) for k, v in losses.items()},
        "seconds_of_one_small_batch_fp32": time.perf_counter() - start,
    }


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    device: str | None = None,
    task: Task | None = None,
) -> Path:
    """Train, and return the folder of the averaged model, `out/model`.

    Args:
        config: the run.
        out: output folder: config.json, metrics.jsonl, samples/, checkpoints/, model/.
        resume: `auto` goes on from the newest whole checkpoint of the same config.
        device: "cpu", "cuda"; None lets accelerate choose.
        task: model and data; None builds them from the config.

    Raises:
        ValueError: if `out` holds another run, or one is training there; for numbers out of range, or another device
            than accelerate gives.
        TrainingError: if the loss is not a number, or the disk is full; the last good checkpoint is kept.
        SystemExit: 143 after SIGTERM, 130 after SIGINT, with the state saved.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from tqdm import tqdm

    require_ranges(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    here = device_of(device)
    if here.type == "cpu":
        keep_memory()
    fast: Any = "bf16" if has_bf16(here) else "fp32"
    was = began(out) if resume == "auto" else None
    was = was and settle(was, fast)
    config = settle(config, was.precision if was else fast)  # a run goes on in what it began with
    if config.precision == "bf16" and here.type == "cpu" and fast == "fp32":
        warnings.warn("this CPU has no fast bf16; --precision auto takes what is fast", stacklevel=2)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=device == "cpu",
        log_with=config.tracker or None,
        project_dir=str(out),
        # a loss may leave parts of the model out of a step; gradients live where they are summed, not in a copy of it
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)],
    )
    main, n_proc, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    sharded = config.parallel == "fsdp" and n_proc > 1
    if config.batch_size % (config.accumulate * n_proc):
        raise ValueError(f"batch_size {config.batch_size} does not split over {n_proc} processes x {config.accumulate}")
    part = config.batch_size // (config.accumulate * n_proc)

    with run_lock(out) if main else nullcontext(), stop_signals() as stopped:
        # -- the run's folder -------------------------------------------------------------------------------
        checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
        going_on = was is not None
        if was is not None:
            old, new = to_dict(was), to_dict(config)
            if differs := [k for k in new if old.get(k) != new[k] and k not in HOW]:
                raise ValueError(
                    f"{out} holds a run of another config (it differs in {', '.join(differs)}); "
                    "choose another --out, or --resume never to start over"
                )

        # -- model, average, optimiser ----------------------------------------------------------------------
        task = (build_task(config) if task is None else task).to(accelerator.device)
        stands_on = task.stands_on()
        accelerator.wait_for_everyone()
        if main:  # a config that nothing can be built from leaves no run behind
            with writing(f"{out}/config.json"):
                write_atomic(out / "config.json", to_json(config))
        model: Model = task.model
        ema: Any = copy.deepcopy(model).eval().requires_grad_(False)
        if config.recompute:
            recompute_blocks(model)
        if config.compile:
            compile_blocks(model)
        if sharded:
            shard(task, accelerator.device)
            shard_average(ema, model)
            wrapped: Any = task
            optimizer: Any = make_optimizer(task, config.optim)
        else:
            wrapped, optimizer = accelerator.prepare(task, make_optimizer(task, config.optim))

        # -- where it stopped -------------------------------------------------------------------------------
        images_seen, step, cpu_before = 0, 0, 0.0
        flops = 0.0  # of an image, forward and backward: counted in a run's first step, since counting changes rounding
        places = {"task": task.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_places(optimizer)}
        previous = checkpoint.newest(checkpoints, places if sharded else {}) if going_on else None
        if previous is not None:
            images_seen, state, complaints = previous
            for complaint in complaints:
                accelerator.print(f"warning: {complaint}; going back to the one before")
            there = state.get("stands_on", {})  # nothing, in a checkpoint of an earlier version
            if other := [name for name in stands_on if there.get(name, stands_on[name]) != stands_on[name]]:
                raise ValueError(
                    f"what --{other[0]} names has changed since {out} stopped, which would end otherwise than without "
                    "a stop: put it back as it was, choose another --out, or start over with --resume never"
                )
            restore(task, ema, optimizer, state, where=str(checkpoints))
            step, cpu_before, flops = state["step"], state["cpu_seconds"], state.get("flops", 0.0)
            accelerator.print(f"resumed {out} at {images_seen:,} images")
            del state
        del places, previous
        if main:
            _trim_metrics(metrics, images_seen) if images_seen else metrics.write_text("")
        if config.tracker:
            accelerator.init_trackers(config.name)

        def save() -> None:
            if main or sharded:
                state = {
                    "task": task.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "cpu_seconds": cpu_seconds,
                    "flops": flops,
                    "stands_on": stands_on,
                }
                with writing(f"a checkpoint in {checkpoints}"):
                    checkpoint.write(checkpoints, images_seen, state, config.keep)
            accelerator.wait_for_everyone()

        def together(broken: bool) -> tuple[bool, int, float]:
            """Of all processes: is a loss broken, which signal came (0: none), CPU seconds used."""
            mine = [float(broken), float(stopped[0] if stopped else 0), time.process_time() - cpu_start]
            if n_proc > 1:
                all_P3 = accelerator.gather(torch.tensor([mine], device=accelerator.device))
                mine = [*all_P3[:, :2].amax(0).tolist(), float(all_P3[:, 2].sum())]
            return bool(mine[0]), int(mine[1]), cpu_before + mine[2]

        def progress() -> float:
            return cpu_seconds / 60 / config.cpu_minutes if config.cpu_minutes else images_seen / config.images

        def finished() -> bool:
            return progress() >= 1

        # -- the loop ---------------------------------------------------------------------------------------
        peak = peak_flops(accelerator.device, config.precision) if main else 0.0
        cpu_seconds, cpu_start = cpu_before, time.process_time()
        clock, last_log = time.perf_counter(), images_seen
        since: dict[str, list[torch.Tensor]] = {}  # the terms of every step since the last line
        bar = tqdm(
            total=None if config.cpu_minutes else config.images,
            initial=images_seen,
            unit="img",
            disable=not main,
            smoothing=0.05,
            desc=config.name,
        )
        while not finished():
            torch.manual_seed(((config.seed << 32) + step) ^ (rank << 52))  # dropout
            lr = learning_rate(config.optim, images_seen, progress())
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms: dict[str, torch.Tensor] = {}
            for i in range(config.accumulate):
                start = images_seen + (i * n_proc + rank) * part
                ahead = start + part * n_proc
                batch = task.batch(start, part, following=ahead).to(accelerator.device)
                last = i + 1 == config.accumulate
                if sharded:
                    wrapped.set_requires_gradient_sync(last)
                counter = flop_counter() if not flops else None
                with nullcontext() if sharded or last else accelerator.no_sync(wrapped), counter or nullcontext():
                    with accelerator.autocast(), parts_of_a_batch():
                        losses = wrapped(batch, images_seen)
                    for name, value in losses.items():  # now: FSDP frees what a term may be a view of
                        terms[name] = terms.get(name, 0) + value.detach().float() / config.accumulate
                    forward = counter.get_total_flops() if counter else 0
                    accelerator.backward(losses["loss"] / config.accumulate)
                if counter:  # what is computed twice counts once
                    flops = (3 * forward if config.recompute else counter.get_total_flops()) / part
            norm = accelerator.clip_grad_norm_(task.parameters(), config.optim.clip or math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            loss = float(terms["loss"])
            broken, stop, cpu_seconds = together(not (math.isfinite(loss) and math.isfinite(float(norm or 0))))
            if broken:
                raise TrainingError(
                    f"loss {loss}, gradient norm {float(norm or 0)} after {images_seen:,} images: "
                    f"stopped, and the last checkpoint in {checkpoints} is kept. "
                    "A lower --optim.lr or --precision fp32 usually mends it"
                )
            for name, value in terms.items():  # a batch may lack one
                since.setdefault(name, []).append(value)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            update_ema(ema, model, min(config.ema, (1 + step) / (10 + step)))
            before, images_seen = images_seen, images_seen + config.batch_size
            bar.update(config.batch_size)

            def due(every: int) -> bool:
                return every > 0 and (images_seen // every > before // every or finished())

            if due(config.log_every):
                said = gather({k: float(torch.stack(v).mean()) for k, v in since.items()})
                since = {}
                names = dict.fromkeys(k for own in said for k in own)
                values = {k: fmean(own[k] for own in said if k in own) for k in names}
                now = time.perf_counter()
                speed = (images_seen - last_log) / (now - clock)
                line = {
                    "images": images_seen, "step": step, **values, "lr": lr, "grad_norm": float(norm or 0),
                    "images_per_second": round(speed, 2), "cpu_seconds": round(cpu_seconds, 1),
                    "mfu": round(flops * speed / (peak * n_proc), 4) if main else 0.0,
                }  # fmt: skip
                clock, last_log = now, images_seen
                if main:
                    with writing(str(metrics)), metrics.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    if config.cpu_minutes:  # how many images that comes to shows only now
                        bar.total = max(images_seen, round(images_seen / progress()))
                    shown_terms = " ".join(f"{k} {v:.4f}" for k, v in list(values.items())[:4])
                    bar.set_postfix_str(f"{shown_terms} mfu {line['mfu']:.0%}")
                if config.tracker:
                    accelerator.log({**values, "mfu": line["mfu"]}, step=images_seen)
            if due(config.sample_every):
                paused = time.perf_counter()
                if (shown := whole(ema, keep=main)) is not None:
                    task.before_export(shown)
                    with writing("a sample grid"):
                        save_png(grid(task.preview(shown)), out / "samples" / f"{images_seen:09d}.png")
                clock += time.perf_counter() - paused
            if due(config.save_every) or stop:
                save()
            if stop and not finished():
                bar.close()
                accelerator.print(
                    f"stopped by {signal.Signals(stop).name} at {images_seen:,} images; state saved in {out}"
                )
                raise SystemExit(128 + stop)
        bar.close()
        if config.tracker:
            accelerator.end_training()

        # -- what ships -------------------------------------------------------------------------------------
        if (final := whole(ema, keep=main)) is not None:
            task.before_export(final)
            final.extra["trained"] = {
                "preset": config.name, "images": images_seen, "precision": config.precision,
                "cpu_minutes": round(cpu_seconds / 60, 1),
            }  # fmt: skip
            with writing(f"{out}/model"):
                save_pretrained(final, out / "model", card=card(config, final))
        accelerator.wait_for_everyone()
    return out / "model"


def restore(task: nn.Module, ema: nn.Module, optimizer: Any, state: dict[str, Any], where: str) -> None:
    """Put a saved state into a run's parts.

    Raises:
        ValueError: if its tensors are not those of this model.
    """
    try:
        task.load_state_dict(state["task"])
        ema.load_state_dict(state["ema"])
        restore_optimizer(optimizer, state["optimizer"])
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"the checkpoint in {where} does not fit the model of its own config (made by another version of genlab?): "
            f"{error}. Start over with --resume never"
        ) from None


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimiser's state read from disk: integer keys again, moments in their parameters' memory layout.

    Fused AdamW walks raw memory, so a moment whose strides differ from its parameter's would be applied elsewhere.
    """
    optimizer.load_state_dict({**state, "state": {int(k): v for k, v in state["state"].items()}})
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, value in optimizer.state[p].items():
                if isinstance(value, torch.Tensor) and value.numel() == p.numel() and name != "step":
                    optimizer.state[p][name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def card(config: TrainConfig, model: Any) -> str:
    """A model card: what was trained, on what, with which command (the preset's, if nothing of it was changed)."""
    trained, teacher = model.extra["trained"], getattr(config.model, "teacher", "")
    source = f"what `{teacher}` draws" if teacher else f"`{config.data.source}:{config.data.split}`"
    from .presets import PRESETS

    preset = PRESETS[config.name]() if config.name in PRESETS else None
    if preset and preset.precision == "auto":
        preset = dataclasses.replace(preset, precision=config.precision)
    plain = preset == config
    again, saved = (config.name, "") if plain else ("--config run.json", " (`run.json` above)")
    return (
        f"# {config.name}\n\n"
        f"A genlab `{model.kind}` of {model.n_params / 1e6:.1f}M parameters ({model.spec.describe()}), trained on "
        f"{source} over {trained['images']:,} images "
        f"in {trained['cpu_minutes']} CPU-minutes in {config.precision} (averaged weights).\n\n"
        f"    genlab train {again}\n\n"
        f"The resolved config{saved}:\n\n```json\n{to_json(config)}```\n"
    )


__all__ = ["TrainingError", "dry_run", "train"]
