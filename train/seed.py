"""Train a SEED, a stage at a time, on cached features of its frozen image encoder.

    genlab train seed-contrastive-emoji64       the Q-Former, against captions
    genlab train seed-codes-emoji64             quantiser, restored embeddings, generation target
    genlab train xar-seed-emoji64               a generator that draws from codes

Each starts from the one before, by default from its place under runs/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from genlab.data import open_images
from genlab.data.cache import Captions, cached_captions, cached_tokens, captions_of
from genlab.data.images import ImageSet
from genlab.generators.base import Condition
from genlab.hub import from_pretrained
from genlab.noise import Noise, permutation
from genlab.pictures import to_float
from genlab.text import Text, TextEncoder
from genlab.tokens import Tokens, TokenSpec
from tokenizers_img.base import Tokenizer
from tokenizers_img.seed import SEED

from .config import TrainConfig
from .tasks import Batch, GeneratorTask, Task, example_numbers, freeze, lasting, load_initial, training_device

PREFIX = 0.25
"""Share of the images whose first codes alone are shown to what learns to draw them, any number."""
SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)
"""Captions that a mirrored picture would belie."""


@dataclass(frozen=True, eq=False)
class SeedBatch(Batch):
    """`x` features; beside them what the stage compares with."""

    text: Text | None = None
    """A caption each."""
    says: torch.Tensor | None = None
    """(B,), a number of what each row's captions say."""
    target: torch.Tensor | None = None
    """What the generator takes."""
    mask: torch.Tensor | None = None
    """Of a target that is a sequence, which count."""

    def to(self, device: torch.device) -> SeedBatch:
        """The same batch on another device."""
        batch = super().to(device)
        others = (None if x is None else x.to(device) for x in (self.text, self.says, self.target, self.mask))
        return SeedBatch(batch.x, batch.labels, batch.noise, *others)  # type: ignore[arg-type]


class ImageTarget(Tokenizer):
    """A CLIP's image embeddings, which unCLIP draws from; it only encodes, so that its cache serves."""

    kind = "image_target"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, image_size: int) -> None:
        """Args: name: folder or Hub id of a CLIP, or of its image half. image_size: side of the images it is given."""
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

        super().__init__({"name": name})
        self.net: Any = CLIPVisionModelWithProjection.from_pretrained(name).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(name)
        self.size, self.image_size = self.net.config.image_size, image_size
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None])

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Embeddings (B, 1, E) of images in [-1, 1]."""
        x = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        y = self.net(pixel_values=((x + 1) / 2 - self.mean) / self.std).image_embeds[:, None]
        size = (self.image_size, self.image_size)
        return Tokens(y, TokenSpec(kind="continuous", grid=(1,), dim=y.shape[2], image_size=size))


class SeedTask(Task):
    """Either stage: cached features, captions and the generator's target, as far as they count."""

    model: SEED
    features: torch.Tensor

    def __init__(self, config: TrainConfig, model: SEED, images: ImageSet) -> None:
        """As `Task`; features of the whole set, captions and targets are computed once and cached on disk.

        What nothing has trained yet begins where the data is: codes where the encodings are, the target at its mean.

        Raises:
            ValueError: if what gives the target has another width than the model.
        """
        super().__init__(config, model, images)
        c, flip = model.config, config.data.flip
        self.captions: Captions | None = None
        if c.stage == "contrastive" or c.contrast:
            self.captions = cached_captions(reader_of(model), captions_of(images))
        self.features = cached_tokens(model.image_encoder(), images, flip=flip, device=training_device())
        self.sided = torch.tensor([bool(SIDED.search(caption)) for caption in images.captions])
        self.targets: Captions | torch.Tensor | None = None
        self.aims = c.stage == "codes" or bool(c.keep)
        before = from_pretrained(config.init).config if config.init else None
        if self.aims:
            self._prepare_targets(config)
            if before is None or (before.stage == "contrastive" and not before.keep):
                some = permutation(len(images), 0)[:1024]
                model.start_target(self.target(some, some, self.features[some].float(), Noise(some))[0])
        if c.stage == "codes" and before is not None and before.stage == "contrastive":
            model.start_codes(self.features[permutation(len(images), 0)[:1024]])

    def _prepare_targets(self, config: TrainConfig) -> None:
        c, width = self.model.config, self.model.config.encoder_dim
        if c.target == "sd_text77":
            reader = TextEncoder(c.target_from, c.target_tokens, pad=True) if c.target_from else reader_of(self.model)
            self.targets, width = cached_captions(reader, captions_of(self.images)), reader.dim
        elif c.target_from:
            encoder = ImageTarget(c.target_from, c.image_size)
            self.targets = cached_tokens(encoder, self.images, flip=config.data.flip, device=training_device())
            width = self.targets.shape[-1]
        if width != c.target_dim:
            raise ValueError(
                f"the target has {width} channels, the model gives {c.target_dim}: --model.target-dim {width}"
            )

    def target(
        self, index: torch.Tensor, rows: torch.Tensor, features_BMF: torch.Tensor, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the generator takes, and of a sequence which count: by number of image, and row of the caches."""
        if isinstance(self.targets, Captions):
            text = self.targets.batch(index, noise).padded(self.model.config.target_tokens)
            return text.embeds_BTD, text.mask_BT
        if self.targets is not None:
            return self.targets[rows][:, 0].float(), None
        # of length sqrt(channels), so that its mean square is 1
        return F.normalize(features_BMF.mean(1), dim=-1) * features_BMF.shape[-1] ** 0.5, None

    def words(self, index: torch.Tensor, noise: Noise) -> tuple[Text, torch.Tensor] | tuple[None, None]:
        """One of each image's captions, and the number of its first one, which images may share."""
        if self.captions is None:
            return None, None
        first = torch.tensor([self.captions.of_image[i][0] for i in index.tolist()])
        return self.captions.batch(index, noise), first

    def load(self, start: int, n: int) -> Batch:
        """Features, of some the mirrored image's, captions and target."""
        index, noise = self.order(start, n), Noise(example_numbers(self.config, start, n))
        rows = index
        if self.config.data.flip:
            mirrored = (noise.at(purpose="flip").uniform(1)[:, 0] < 0.5) & ~self.sided[index]
            rows = index + len(self.images) * mirrored.long()
        features, (text, says) = self.features[rows].float(), self.words(index, noise)
        target, mask = self.target(index, rows, features, noise) if self.aims else (None, None)
        return SeedBatch(features, self.images.labels[index], noise, text, says, target, mask)

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """See `SEED.contrastive_loss` and `SEED.codes_loss`."""
        assert isinstance(batch, SeedBatch)
        if self.model.config.stage == "contrastive":
            assert batch.text is not None
            return self.model.contrastive_loss(batch.x, batch.text, batch.says, batch.target, batch.mask)
        assert batch.target is not None
        return self.model.codes_loss(batch.x, batch.target, batch.mask, batch.text, batch.says)

    def preview(self, model: Any) -> torch.Tensor:
        """Eight images, and below each the four nearest others of 256 (behind stage 1: of their codes)."""
        picks = permutation(len(self.images), 0)[:256]
        x = to_float(self.images.batch(picks))
        with torch.no_grad():
            features = self.features[picks].to(model.device)
            quantised = model.config.stage != "contrastive"
            e = model.embed_codes(model.encode_features(features)) if quantised else model.embed_features(features)
            likeness = e[:8] @ e.T
            likeness[torch.arange(8), torch.arange(8)] = -2
        return torch.cat([x[:8], *(x[near.cpu()] for near in likeness.topk(4).indices.T)])


class PaintTask(GeneratorTask):
    """Train a generator of ours to draw a seed's codes: `--codes-of SEED`."""

    seed: SEED

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """As `GeneratorTask`. Raises: ValueError: for a generator by class."""
        if not model.by_text:
            raise ValueError("--codes-of is for a generator by text: set --model.condition text")
        super().__init__(config, model, images)

    def read_captions(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """The codes of every image, once.

        Raises:
            ValueError: if there is no such seed, or the model's captions have other sizes than its codes.
        """
        seed = from_pretrained(config.codes_of)
        if not isinstance(seed, SEED):
            raise ValueError(f"--codes-of {config.codes_of} holds a {seed.kind}: give a seed")
        c = seed.config
        if model.config.text_dim != c.target_dim:
            raise ValueError(
                f"--codes-of {config.codes_of} gives an embedding of {c.target_dim} channels: set --model.text-dim "
                f"{c.target_dim} --model.text-length 1"
            )
        object.__setattr__(self, "seed", seed)  # not a submodule: it isn't trained, moved or saved
        features = cached_tokens(seed.image_encoder(), images, flip=config.data.flip, device=training_device())
        self.codes = torch.cat([seed.encode_features(part).values for part in features.split(256)])
        self.shown = self.as_text(torch.linspace(0, len(images) - 1, 8).long())

    @torch.no_grad()
    def as_text(self, rows: torch.Tensor, kept: torch.Tensor | None = None) -> Text:
        """What the model draws some images from, the first `kept` codes of each."""
        return self.seed.as_text(Tokens(self.codes[rows], self.seed.spec, kept))

    def condition(self, index: torch.Tensor, rows: torch.Tensor, noise: Noise) -> Condition:
        """Codes, of the mirrored image where the tokens are; every fourth image has only its first few."""
        n, u = self.seed.config.queries, noise.at(purpose="prefix").uniform(2)
        return self.as_text(rows, torch.where(u[:, 0] < PREFIX, (u[:, 1] * n).long() + 1, n))

    def preview(self, model: Any) -> torch.Tensor:
        """Eight originals, and below each four drawings of its codes."""
        picks = torch.linspace(0, len(self.images) - 1, 8).long()
        drawn = super().preview(model)
        return torch.cat([to_float(self.images.batch(picks)), *drawn.view(8, 8, *drawn.shape[1:])[:, :4].unbind(1)])

    def before_export(self, model: Any) -> None:
        """Note whose codes it draws."""
        super().before_export(model)
        del model.extra["text_encoder"]  # it reads no words
        model.extra["codes_of"] = lasting(self.config.codes_of)


def reader_of(model: SEED) -> TextEncoder:
    """The model's text encoder.

    Raises:
        ValueError: if its width isn't the config's.
    """
    reader, c = model.reader(), model.config
    if reader.dim != c.text_dim:
        raise ValueError(
            f"{c.text_encoder} gives {reader.dim} channels, not {c.text_dim}: --model.text-dim {reader.dim}"
        )
    return reader


def seed_task(config: TrainConfig) -> SeedTask:
    """The task of a config whose model is a seed.

    Raises:
        ValueError: if a stage lacks what it stands on.
    """
    c, data = config.model, config.data
    if c.stage != "contrastive" and not config.init:
        raise ValueError("stage codes of a seed starts from stage contrastive: give --init MODEL")
    if config.tokenizer:
        raise ValueError(
            "a seed takes no --tokenizer: it reads images itself, and what draws its codes is trained aside"
        )
    torch.manual_seed(config.seed)
    model = SEED(c)
    if config.init:
        source = from_pretrained(config.init)
        load_initial(model, config.init, source.parts() if isinstance(source, SEED) else None)
    model.freeze_others()
    freeze(model, config.freeze)
    images = open_images(data.source, split=data.split, size=c.image_size, on_error=data.on_error)
    return SeedTask(config, model, images)
