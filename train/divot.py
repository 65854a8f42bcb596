"""Train a Divot, in its three stages, on the cached latents of a frozen autoencoder (`--tokenizer`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from genlab.data.cache import cached_tokens
from genlab.data.clips import ClipSet, open_clips
from genlab.hub import from_pretrained
from genlab.noise import Noise, permutation
from genlab.pictures import to_float
from genlab.registry import model_class
from genlab.tokens import Tokens, TokenSpec
from tokenizers_img.base import Tokenizer

from .config import TrainConfig
from .tasks import Batch, Task, example_numbers, freeze, load_initial, training_device

ENCODER = ("temporal", "norm", "spatial")


class _Seen(Tokenizer):
    """A Divot's frozen part as a tokenizer that only encodes, so that its cache serves: half precision."""

    kind = "divot_seen"

    def __init__(self, model: Any, *, latents: bool) -> None:
        c = model.config
        what = [c.vae] if latents else [c.network, c.network_size, c.levels, c.places, c.read]
        super().__init__([*what, c.frames])
        self.latents, self.size = latents, c.image_size
        self.seer = [model]  # in a list: its weights, but for the autoencoder's, don't decide what is seen
        if latents:
            self.vae = model.vae

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.seer[0].device

    def _apply(self, fn: Any, recurse: bool = True) -> _Seen:
        self.seer[0]._apply(fn, recurse)  # to another device: the whole model goes
        return self

    @property
    def spec(self) -> TokenSpec:
        """Of the frozen part."""
        c = self.seer[0].config
        n, dim = (self.vae.spec.length, self.vae.spec.dim) if self.latents else (c.places**2, c.channels)
        frames = c.frames if self.latents else c.read
        return TokenSpec(kind="continuous", grid=(frames, n), dim=dim, image_size=(c.frames, self.size, self.size))

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Latents or features of clips."""
        model = self.seer[0]
        seen = model.latents_of(images) if self.latents else model.see(images)
        return Tokens(seen.flatten(1, 2).half(), self.spec)


@dataclass(frozen=True, eq=False)
class ClipBatch(Batch):
    """Latents, what the frozen network sees, and for the last stage drawn tokens."""

    seen: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def to(self, device: torch.device) -> ClipBatch:
        """The same batch on another device."""
        batch = super().to(device)
        seen, tokens = (None if v is None else v.to(device) for v in (self.seen, self.tokens))
        return ClipBatch(batch.x, batch.labels, batch.noise, seen, tokens)


class DivotTask(Task):
    """A tokenizer of clips and its de-tokenizer."""

    images: ClipSet

    def __init__(self, config: TrainConfig, model: Any, images: ClipSet) -> None:
        """As `Task`; latents and features are computed once and cached on disk."""
        super().__init__(config, model, images)
        how: Any = {"flip": config.data.flip, "batch_size": 16, "device": training_device()}
        self.latents = cached_tokens(_Seen(model, latents=True), images, **how)
        self.seen = cached_tokens(_Seen(model, latents=False), images, **how)
        if not config.init:
            some = self.seen[permutation(len(self.seen), 0)[:256].sort().values]
            model.before_training(some.float().unflatten(1, (model.config.read, -1)))
        self.drawn = None
        if model.config.stage == "adapt":
            from .divot_lm import drawn_tokens

            self.drawn = drawn_tokens(config.teacher, model, images)

    def load(self, start: int, n: int) -> Batch:
        """Latents and features of clips, some mirrored, some backwards."""
        c = self.model.config
        index, noise = self.order(start, n), Noise(example_numbers(self.config, start, n))
        labels, drawn = self.images.labels[index], None if self.drawn is None else self.drawn[index]
        if self.config.data.flip and self.drawn is None:
            index = index + len(self.images) * (noise.at(purpose="flip").uniform(1)[:, 0] < 0.5).long()
        z = self.latents[index].unflatten(1, (c.frames, -1))
        seen = self.seen[index].unflatten(1, (c.read, -1))
        if self.config.data.reverse and self.drawn is None:
            back = (noise.at(purpose="reverse").uniform(1)[:, 0] < 0.5)[:, None, None, None]
            z, seen = torch.where(back, z.flip(1), z), torch.where(back, seen.flip(1), seen)
        return ClipBatch(z.float(), labels, noise, seen.float(), drawn)

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The denoiser's loss."""
        assert isinstance(batch, ClipBatch)
        assert batch.seen is not None
        return self.model.loss(batch.x, batch.seen, batch.noise, batch.tokens)

    def preview(self, model: Any) -> torch.Tensor:
        """Four clips, a row each, above what their tokens give."""
        picks = torch.linspace(0, len(self.images) - 1, 4).long()
        x = to_float(self.images.batch(picks)).to(model.device)
        with torch.no_grad():
            y = model.decode(model.encode(x))
        frames = torch.linspace(0, x.shape[1] - 1, 8).long()
        return torch.stack([x[:, frames], y[:, frames]], 1).flatten(0, 2).cpu()

    def before_export(self, model: Any) -> None:
        """Note the autoencoder and the classes."""
        super().before_export(model)
        model.extra["vae"] = self.config.tokenizer


def divot_task(config: TrainConfig) -> DivotTask:
    """The task of a config whose model is a divot; the autoencoder's sizes come with its weights.

    Raises:
        ValueError: without an autoencoder, where sizes don't fit, or for a stage without what it stands on.
    """
    if not config.tokenizer:
        raise ValueError("a divot needs --tokenizer MODEL: the trained kl_vae of its frames (see `genlab list`)")
    vae, data = from_pretrained(config.tokenizer), config.data
    if vae.kind != "kl_vae":
        raise ValueError(f"a divot stands on a kl_vae; --tokenizer {config.tokenizer} holds a {vae.kind}")
    stage = config.model.stage
    if stage != "joint" and not config.init:
        raise ValueError(f"stage {stage} goes on from a divot: give --init MODEL")
    if (stage == "adapt") != bool(config.teacher):
        raise ValueError(
            f"stage {stage}: --teacher names the divot_lm whose tokens stage `adapt` learns from, and only there"
        )
    torch.manual_seed(config.seed)
    model = model_class("divot")(replace(config.model, vae=vae.config))
    if (channels := model.features.channels) != model.config.channels:
        raise ValueError(
            f"{model.config.network} gives {channels} channels at {model.config.places}x{model.config.places} places: "
            f"set --model.channels {channels}"
        )
    model.adopt(vae)
    if config.init:
        load_initial(model, config.init)
    freeze(model, (*config.freeze, *(ENCODER if stage != "joint" else ())))
    c = model.config
    clips = open_clips(
        data.source, data.split, c.image_size, c.frames, c.fps, data.on_error, takes=data.takes
    )  # fmt: skip
    return DivotTask(config, model, clips)
