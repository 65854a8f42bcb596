"""Train a FlexTok: flow matching on the cached latents of a frozen autoencoder (`--tokenizer`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from genlab.data import open_images
from genlab.data.cache import cached_tokens
from genlab.data.images import ImageSet
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.pictures import to_float
from genlab.registry import model_class

from .config import TrainConfig
from .repa import FrozenFeatures, projector
from .tasks import Batch, Task, example_numbers, freeze, load_initial, training_device


@dataclass(frozen=True, eq=False)
class LatentBatch(Batch):
    """Latents, and the features that REPA aligns with."""

    features: torch.Tensor | None = None

    def to(self, device: torch.device) -> LatentBatch:
        """The same batch on another device."""
        batch = super().to(device)
        features = None if self.features is None else self.features.to(device)
        return LatentBatch(batch.x, batch.labels, batch.noise, features)


class FlexTokTask(Task):
    """A tokenizer that is trained as a generator is: on another tokenizer's cached tokens."""

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """As `Task`; latents, and with `repa` features, are computed once and cached on disk."""
        super().__init__(config, model, images)
        c, flip = model.config, config.data.flip
        self.latents = cached_tokens(model.vae, images, flip=flip, device=training_device())
        self.features, self.projector = None, None
        if c.repa:
            net = FrozenFeatures(c.repa, side=model.decoder.side, image_size=c.image_size)
            self.features = cached_tokens(net, images, flip=flip, device=training_device())
            # it helps to train and isn't needed afterwards, so it belongs to the task, not to the model
            self.projector = projector(c.decoder_dim, net.dim)

    def load(self, start: int, n: int) -> Batch:
        """Latents of images, some mirrored, and their features."""
        index, noise = self.order(start, n), Noise(example_numbers(self.config, start, n))
        labels = self.images.labels[index]
        if self.config.data.flip:
            index = index + len(self.images) * (noise.at(purpose="flip").uniform(1)[:, 0] < 0.5).long()
        return LatentBatch(self.latents[index], labels, noise, None if self.features is None else self.features[index])

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The flow's loss, and REPA's."""
        return self.model.loss(batch.x, batch.noise, getattr(batch, "features", None), self.projector)

    def preview(self, model: Any) -> torch.Tensor:
        """Eight originals, and below them what 1, 2, 4, … tokens give."""
        picks = torch.linspace(0, len(self.images) - 1, 8).long()
        x = to_float(self.images.batch(picks)).to(model.device)
        with torch.no_grad():
            tokens = model.encode(x)
            rows = [x, *(model.decode(tokens.first(k)) for k in powers(model.spec.length))]
        return torch.cat(rows).cpu()

    def before_export(self, model: Any) -> None:
        """Note the autoencoder and the classes."""
        super().before_export(model)
        model.extra["vae"] = self.config.tokenizer


def powers(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return sorted({min(2**i, n) for i in range(n.bit_length() + 1)})


def flextok_task(config: TrainConfig) -> FlexTokTask:
    """The task of a config whose model is a flextok; the autoencoder's sizes come with its weights.

    Raises:
        ValueError: without an autoencoder, or where its latents don't fit the model.
    """
    if not config.tokenizer:
        raise ValueError("a flextok needs --tokenizer MODEL: the trained kl_vae it stands on (see `genlab list`)")
    vae, data = from_pretrained(config.tokenizer), config.data
    if vae.kind != "kl_vae":
        raise ValueError(f"a flextok stands on a kl_vae; --tokenizer {config.tokenizer} holds a {vae.kind}")
    torch.manual_seed(config.seed)
    model = model_class("flextok")(replace(config.model, vae=vae.config))
    model.adopt(vae)
    if config.init:
        load_initial(model, config.init)
    freeze(model, config.freeze)
    images = open_images(data.source, split=data.split, size=model.config.image_size, on_error=data.on_error)
    return FlexTokTask(config, model, images)
