"""What a run would take on GPUs: memory, arithmetic, days, and the command that starts it; from a dry run (`dry`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from . import dry
from .config import TrainConfig
from .scale import blocks

GIB = 2**30
NODE = 8
"""GPUs a machine."""


@dataclass(frozen=True)
class Footprint:
    """What a dry run has counted; bytes and FLOPs of an image, where nothing else is said."""

    parameters: int
    """All that are on the device."""
    trained: int
    """Those with gradients."""
    averaged: int
    """Those of the averaged copy."""
    largest: int
    """Parameters of the largest part that FSDP gathers at a time."""
    outside: int
    """Parameters outside of blocks, which FSDP gathers for the whole step."""
    flops: float
    """Forward and backward."""
    again: float
    """What `--recompute` computes a second time."""
    kept: float
    """Activations."""
    kept_recomputing: float
    """Activations with `--recompute`."""
    casts: int
    """Bytes of a step whatever its images: weights in bf16, above all."""
    casts_recomputing: int
    """The same with `--recompute`."""


@dataclass(frozen=True)
class Way:
    """One way to train, and the bytes that it takes of each GPU."""

    parallel: str
    recompute: bool
    accumulate: int
    images: int
    """Images a GPU and accumulation step."""
    weights: float
    gradients: float
    moments: float
    average: float
    exchange: float
    """DDP's buckets, or what FSDP gathers."""
    activations: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.gradients + self.moments + self.average + self.exchange + self.activations


def footprint(config: TrainConfig, n: int = 2) -> Footprint:
    """Count a run by two dry runs, of n images and of twice as many."""
    network = dry.Network(config)
    few, many = dry.count(config, network, n), dry.count(config, network, 2 * n)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    parts = [size(part) for block in blocks(network.model) for part in block.children()]
    each = (many.kept - few.kept) / n
    # where recomputing pays only from more images on than the few, the difference is too steep
    each_recomputing = min(each, (many.kept_recomputing - few.kept_recomputing) / n)
    return Footprint(
        parameters=size(network),
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        averaged=size(network.model),
        largest=max(parts, default=0),
        outside=size(network) - sum(parts),
        flops=(many.forward + many.backward - few.forward - few.backward) / n,
        again=(many.in_blocks - few.in_blocks) / n,
        kept=each,
        kept_recomputing=each_recomputing,
        casts=max(0, round(few.kept - n * each)),
        casts_recomputing=max(0, round(many.kept_recomputing - 2 * n * each_recomputing)),
    )


def way(config: TrainConfig, f: Footprint, gpus: int, parallel: str, recompute: bool, accumulate: int) -> Way:
    """The bytes of one way to train; weights, gradients, moments and average are float32."""
    images = config.batch_size // (gpus * accumulate)
    split = gpus if parallel == "fsdp" else 1
    exchange = 0.0
    if parallel == "fsdp":  # weights of a part and of the next, a part's gradients; both of what is outside
        exchange = 4.0 * (2 * f.outside + 3 * f.largest)
    elif gpus > 1:
        exchange = 4.0 * f.trained
    kept, casts = (f.kept_recomputing, f.casts_recomputing) if recompute else (f.kept, f.casts)
    return Way(
        parallel=parallel, recompute=recompute, accumulate=accumulate, images=images,
        weights=4 * f.parameters / split, gradients=4 * f.trained / split, moments=8 * f.trained / split,
        average=4 * f.averaged / split, exchange=exchange, activations=images * kept + casts,
    )  # fmt: skip


def ways(config: TrainConfig, f: Footprint, gpus: int, accumulate: int = 1) -> list[Way]:
    """All ways over so many GPUs, quickest first."""
    kinds = ("ddp", "fsdp") if gpus > 1 else ("ddp",)
    return [way(config, f, gpus, p, r, accumulate) for r in (False, True) for p in kinds]


def choose(config: TrainConfig, f: Footprint, gpus: int, room: float) -> Way | None:
    """The quickest way that fits into `room` bytes: eight images at a time if they can be had, else what fits; None
    where nothing does.
    """
    most = config.batch_size // gpus
    steps = [k for k in range(1, most + 1) if most % k == 0]
    fitting = [w for k in steps for w in ways(config, f, gpus, k) if w.total <= room]
    # more images at a time keep a GPU busy up to some number; beyond it, the plainer way is the quicker one
    return max(fitting, key=lambda w: (min(w.images, 8), not w.recompute, w.parallel == "ddp", w.images), default=None)


def command(config: TrainConfig, gpus: int, w: Way) -> str:
    """What starts the run."""
    options = [f"--parallel {w.parallel}"] if w.parallel != config.parallel else []
    options += ["--recompute"] if w.recompute and not config.recompute else []
    options += [f"--accumulate {w.accumulate}"] if w.accumulate != config.accumulate else []
    start = "genlab"
    if gpus > 1:
        nodes = math.ceil(gpus / NODE)
        where = f"--nproc-per-node {min(gpus, NODE)}"
        if nodes > 1:
            where = f'--nnodes {nodes} {where} --rdzv-backend c10d --rdzv-endpoint "$first:29500"'
        start = f"torchrun {where} -m genlab.cli"
        start = f"srun {start}" if nodes > 1 else start
    return " ".join([start, "train", config.name, *options])


def plan(config: TrainConfig, gpus: int, memory: float, peak: float, mfu: float, spare: float) -> dict[str, Any]:
    """A plan as plain data.

    Args:
        config: the run.
        gpus: how many.
        memory: GiB of each.
        peak: TFLOP/s of matrix products of each, in the run's precision.
        mfu: the share of it that the model's arithmetic reaches.
        spare: share of the memory that is left for kernels, communication and fragments.

    Raises:
        ValueError: if the batch doesn't split over so many GPUs.
    """
    if config.batch_size % gpus:
        raise ValueError(f"batch_size {config.batch_size} does not split over {gpus} GPUs; give another --gpus")
    config = dataclasses.replace(config, recompute=False, accumulate=1, parallel="ddp")
    f = footprint(config)
    room = memory * GIB * (1 - spare)
    chosen = choose(config, f, gpus, room)
    speed = gpus * peak * 1e12 * mfu / (f.flops + (f.again if chosen and chosen.recompute else 0))
    return {
        "preset": config.name,
        "gpus": gpus,
        "memory_gib": memory,
        "batch_size": config.batch_size,
        "footprint": dataclasses.asdict(f),
        "ways": [dataclasses.asdict(w) | {"total": w.total, "fits": w.total <= room} for w in ways(config, f, gpus)],
        "chosen": None if chosen is None else dataclasses.asdict(chosen) | {"total": chosen.total},
        "images_per_second": speed,
        "days": config.images / speed / 86_400,
        "command": None if chosen is None else command(config, gpus, chosen),
    }
