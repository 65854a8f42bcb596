"""What a training run is made of."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, Literal

from genlab.config import config, from_dict
from genlab.registry import model_class
from tokenizers_img.losses import AutoencoderLossConfig


@config
class DataConfig:
    """Which images, and how they are prepared."""

    source: str = "emoji"
    """`emoji`, an image folder, webdataset tars (`shards/{000..099}.tar`), or `hf:name`. Of clips:
    `emoji-anim`, a folder or tars of films, `moved:` and images, or several joined by `+`."""
    split: Literal["train", "heldout", "all"] = "train"
    """The split to train on."""
    flip: bool = False
    """Mirror half of the images, at random."""
    balance: float = 0.0
    """How far classes count alike, 0 to 1: an epoch shows images of a class of n times n^-balance as often. 0 shows
    each image once, 1 each class equally often, however few its images are."""
    takes: int = 1
    """Of films: clips each, at even distances."""
    reverse: bool = False
    """Of films: play half of the clips backwards, at random."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with an image that can't be read: stop, or leave it out and say so."""


@config
class OptimConfig:
    """AdamW and its schedule, which counts images."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moments."""
    weight_decay: float = 0.02
    """Decoupled weight decay, on matrices and kernels only."""
    warmup: int = 5_000
    """Images over which the rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: stay, or fall along a cosine."""
    final_lr: float = 0.02
    """With `cosine`, the last rate as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""


@config
class TrainConfig:
    """A whole run; `model` is the config of the model, a field that each model's own class adds."""

    name: str
    """Preset name, `{system}-{variant}-{data}{px}`; also the default output folder under runs/."""
    model: Any
    tokenizer: str = ""
    """For a generator: the tokenizer, a MODEL (shipped name, folder or Hub id)."""
    init: str = ""
    """Fine-tune: start from the weights of this MODEL (shipped name, folder or Hub id), of the same kind and sizes."""
    teacher: str = ""
    """A MAR that is to draft for another: that MODEL. Its head learns the teacher's steps in place of the data's."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by the first part of their names, e.g. `vae.encoder`. A tokenizer with
    frozen parts also keeps the scale of its latents, so that generators trained on it stay valid."""
    text_encoder: str = "minilm"
    """For a generator by text: who reads the captions, `minilm` (packaged), or a folder or Hub id of an encoder of
    transformers."""
    codes_of: str = ""
    """For a generator by text that is to draw a seed's codes: the seed, a MODEL. Codes take the captions' place."""
    prompts: tuple[str, ...] = ()
    """For a generator by text: captions of the sample grids, a row each; none: eight of the training set's."""
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    """For a tokenizer: the weights of the loss terms."""
    data: DataConfig = DataConfig()
    """The images."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    images: int = 200_000
    """How many images to train on, in all. Given to `genlab train`, it counts though a preset counts CPU-minutes."""
    cpu_minutes: float = 0.0
    """Stop after this much CPU time, the schedule stretched over it instead of over `images`; 0 counts images. For
    comparisons at equal compute; such a run does not repeat bit for bit."""
    batch_size: int = 64
    """Images an optimiser step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Split the batch into this many parts and accumulate their gradients."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass (autocast); weights and optimiser stay in float32. `auto` is bf16 where the
    hardware multiplies it faster, else fp32, settled when a run begins and written to its config.json."""
    ema: float = 0.999
    """Decay of the averaged weights, an optimiser step; it is warmed up."""
    seed: int = 0
    """Decides initial weights, order of images, noise."""
    log_every: int = 1_000
    """Images between lines of metrics.jsonl; a line has the means over the steps since the one before."""
    sample_every: int = 20_000
    """Images between sample grids of the averaged weights; 0 makes none."""
    save_every: int = 10_000
    """Images between checkpoints."""
    keep: int = 2
    """How many checkpoints to keep."""
    threads: int = 0
    """CPU threads; 0 takes all."""
    tracker: str = ""
    """Also log to one of accelerate's trackers, e.g. `tensorboard`."""
    compile: bool = False
    """torch.compile the model's blocks."""
    recompute: bool = False
    """Activation checkpointing: keep the inputs of the model's blocks alone, and compute the rest twice. Less memory,
    a third more arithmetic, the same result."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: a whole copy of the model each, or (FSDP2) weights, gradients, moments and average split
    over them. Either resumes what the other saved, on any number of processes."""


WHOLE = {
    "images": 1, "batch_size": 1, "accumulate": 1, "keep": 1, "threads": 0, "log_every": 0, "sample_every": 0,
    "save_every": 0,
}  # fmt: skip
"""The least of each whole number."""
SEEDS = 1 << 23
"""Seeds lie below: of the 64 bits that an example's noise goes by, 40 are its number's and 24 the run's."""


def require_ranges(config: TrainConfig) -> None:
    """Refuse numbers that no run can be made of.

    Raises:
        ValueError: naming the option and its range.
    """
    ranges = {name: (getattr(config, name) >= least, f"at least {least}") for name, least in WHOLE.items()}
    ranges["cpu_minutes"] = (config.cpu_minutes >= 0, "at least 0")
    ranges["ema"] = (0 <= config.ema < 1, "at least 0 and below 1")
    ranges["seed"] = (-SEEDS <= config.seed < SEEDS, f"from {-SEEDS} to {SEEDS - 1}")
    for name, (fits, of) in ranges.items():
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected {of}")
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of accumulate {config.accumulate}")


@lru_cache
def config_class(kind: str) -> type[TrainConfig]:
    """`TrainConfig` whose `model` field has the type of this model's config.

    Raises:
        ValueError: for an unknown kind.
    """
    Config = model_class(kind).Config
    cls = dataclasses.make_dataclass(
        "TrainConfig", [("model", Config)], bases=(TrainConfig,), frozen=True, kw_only=True,
        namespace={"__doc__": TrainConfig.__doc__, "__module__": __name__},
    )  # fmt: skip
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return cls


def run_config(*, model: Any, **fields: Any) -> TrainConfig:
    """A run's config around a model's config."""
    return config_class(model.kind)(model=model, **fields)


def read_config(data: Any, where: str = "config") -> TrainConfig:
    """A run's config from plain data.

    Raises:
        ValueError: for unknown keys, missing ones or wrong types.
    """
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict) or "kind" not in data["model"]:
        raise ValueError(
            f"{where} is not a training config: it has no model.kind. Make one: `genlab train PRESET --print-config`"
        )
    return from_dict(config_class(data["model"]["kind"]), data, where=where)
