"""What the loop trains: a tokenizer on images, or a generator on a tokenizer's tokens.

A task is a module whose forward pass gives the loss terms of a batch; it also says where its batches come
from and how to show what it has learned. The loop knows nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genlab.data import open_images
from genlab.data.cache import cached_captions, cached_tokens, captions_of
from genlab.data.images import ImageSet
from genlab.generators.base import Condition
from genlab.hub import CONFIG, from_pretrained, locate, read_description
from genlab.noise import Noise, permutation
from genlab.pictures import to_float
from genlab.registry import TOKENIZERS, model_class
from genlab.tokens import require_fit
from tokenizers_img.losses import AutoencoderLoss

from .config import TrainConfig

ROWS = 16
"""Classes that a sample grid shows at most."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step sees: images or tokens, classes or captions, noise whose seeds are the examples' numbers."""

    x: torch.Tensor
    labels: Condition
    noise: Noise

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        noise = Noise(self.noise.seeds_B.to(device))
        return Batch(self.x.to(device), self.labels.to(device), noise)


def training_device() -> torch.device | None:
    """Where this process trains: what is encoded for it once is encoded there. None where no training has begun."""
    from accelerate import PartialState

    return PartialState().device if PartialState._shared_state else None


def example_numbers(config: TrainConfig, images_seen: int, n: int) -> torch.Tensor:
    """Seeds of the next n training examples: the run's seed above, the running number below (64 bits)."""
    return (config.seed << 40) + images_seen + torch.arange(n)


class Order:
    """Which image is the i-th of the run: a fresh shuffle every epoch of n, a function of the seed alone."""

    def __init__(self, n: int, seed: int, weights: torch.Tensor | None = None) -> None:
        """Args: n: images in the set. seed: the run's. weights: (n,), how often each is shown; None: once an epoch."""
        self.n, self.seed = n, seed
        self._until = None if weights is None else (weights.double() / weights.double().sum() * n).cumsum(0)
        self._epoch, self._order = -1, torch.empty(0)

    def _shuffled(self, epoch: int) -> torch.Tensor:
        """The n images of an epoch; what is due w times is in it floor(w) or ceil(w) times (systematic sampling)."""
        seed = (self.seed << 32) + epoch
        order = permutation(self.n, seed, "epoch")
        if self._until is None:
            return order
        offset = Noise(torch.tensor([seed]), purpose="due").uniform(1).double().item()
        due = torch.searchsorted(self._until, torch.arange(self.n, dtype=torch.float64) + offset, right=True)
        return due.clamp_max(self.n - 1)[order]

    def __call__(self, start: int, count: int) -> torch.Tensor:
        """Indices of the run's images number start … start + count - 1."""
        parts = []
        while count:
            epoch, at = divmod(start, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._shuffled(epoch)
            parts.append(self._order[at : at + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)


def class_weights(images: Any, balance: float) -> torch.Tensor | None:
    """How often to show each image of a set, n^-balance for one of a class of n; None where each counts alike.

    Raises:
        ValueError: for a balance outside of 0 to 1, or images without a class.
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"--data.balance is between 0 (each image alike) and 1 (each class alike), got {balance}")
    if not balance:
        return None
    if lone := int((images.labels < 0).sum()):
        raise ValueError(
            f"--data.balance is for images with classes, {lone:,} of these {len(images.labels):,} have none: leave it "
            "at 0, or put each image into a class's folder"
        )
    return torch.bincount(images.labels)[images.labels].double() ** -balance


class Task(nn.Module):
    """A model, its training loss and its data."""

    model: Any

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """Args: config: the run. model: what is trained. images: the training set."""
        super().__init__()
        self.config, self.model, self.images = config, model, images
        self.order = Order(len(images), config.seed, class_weights(images, config.data.balance))
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def load(self, start: int, n: int) -> Batch:
        """The batch of the run's images number start … start + n - 1."""
        raise NotImplementedError

    def batch(self, start: int, n: int, following: int | None = None) -> Batch:
        """`load`, while a thread makes ready the batch that starts at `following`."""
        ready = self._next
        batch = ready[1].result() if ready and ready[0] == (start, n) else self.load(start, n)
        self._next = ((following, n), self._worker.submit(self.load, following, n)) if following is not None else None
        return batch

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The loss terms of a batch; `loss` is the one to minimise."""
        raise NotImplementedError

    def preview(self, model: Any) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] that show what `model` (the averaged weights) can do, 8 a row."""
        raise NotImplementedError

    def stands_on(self) -> dict[str, str]:
        """Hashes, by option, of what a run that goes on reads anew: another would give another result."""
        images, digest = self.images, hashlib.sha256()
        for row in zip(images.keys, images.labels.tolist(), images.captions, strict=True):
            digest.update(repr(row).encode())
        models = {"tokenizer": self.config.tokenizer, "teacher": self.config.teacher, "codes-of": self.config.codes_of}
        return {"data.source": digest.hexdigest(), **{k: weights_of(name) for k, name in models.items() if name}}

    def before_export(self, model: Any) -> None:
        """Last touch on the averaged model before it is written; here, a note of the data."""
        model.extra["data"] = {"source": self.config.data.source, "classes": list(self.images.classes)}


@torch.no_grad()
def tokens_move(model: Any, images: torch.Tensor) -> bool:
    """Whether what is trained of a tokenizer has a say in its tokens: tried out on a copy."""
    tried = copy.deepcopy(model).eval()
    before = tried.encode(images).values
    for p in tried.parameters():
        if p.requires_grad:
            p.neg_().add_(1)
    return not torch.equal(before, tried.encode(images).values)


class TokenizerTask(Task):
    """Train a tokenizer to reconstruct images."""

    model: Any

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """As `Task`."""
        super().__init__(config, model, images)
        self.criterion = AutoencoderLoss(config.loss)
        if hasattr(model, "before_training") and not config.init:
            model.before_training(self._some_images(512))
        if config.init and config.freeze and tokens_move(model, self._some_images(4)):
            print(
                f"note: --freeze {' '.join(config.freeze)} leaves parts free that make the tokens, so generators of "
                f"{config.init}'s won't fit them; docs/finetune.md has what to freeze to keep them",
                file=sys.stderr,
            )

    def _some_images(self, n: int) -> torch.Tensor:
        picks = permutation(len(self.images), 0)[:n]
        return to_float(self.images.batch(picks))

    def load(self, start: int, n: int) -> Batch:
        """Images, some mirrored."""
        index = self.order(start, n)
        x = to_float(self.images.batch(index))
        noise = Noise(example_numbers(self.config, start, n))
        if self.config.data.flip:
            flip = noise.at(purpose="flip").uniform(1)[:, 0] < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return Batch(x, self.images.labels[index], noise)

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """Pixels, perceptual, prior, adversarial."""
        return self.criterion(self.model, batch.x, batch.noise, images_seen)

    def preview(self, model: Any) -> torch.Tensor:
        """Rows of originals and, below each, their reconstructions."""
        picks = torch.linspace(0, len(self.images) - 1, 16).long()
        x = to_float(self.images.batch(picks)).to(model.device)
        with torch.no_grad():
            y = model.decode(model.encode(x))
        return torch.cat([x[:8], y[:8], x[8:], y[8:]]).cpu()

    def before_export(self, model: Any) -> None:
        """Measure the latents' scale, where the tokenizer has one."""
        if hasattr(model, "fit_normalisation") and not self.config.freeze:
            model.fit_normalisation(self._some_images(2048).to(model.device))
        super().before_export(model)


class GeneratorTask(Task):
    """Train a generator on cached tokens of a frozen tokenizer."""

    model: Any
    tokenizer: Any

    def __init__(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """As `Task`; the tokens of the whole set are computed once and cached on disk, its captions' embeddings too."""
        super().__init__(config, model, images)
        tokenizer = from_pretrained(config.tokenizer)
        if hasattr(model, "adopt"):  # VAR reads its tokenizer's codebook
            model.adopt(tokenizer)
        self.tokens = cached_tokens(tokenizer, images, flip=config.data.flip, device=training_device())
        object.__setattr__(self, "tokenizer", tokenizer)  # not a submodule: it isn't trained, moved or saved
        if model.by_text:
            self.read_captions(config, model, images)

    def read_captions(self, config: TrainConfig, model: Any, images: ImageSet) -> None:
        """Embed every caption, once.

        Raises:
            ValueError: if the text encoder's width isn't the model's.
        """
        from genlab.text import TextEncoder

        encoder = TextEncoder(config.text_encoder, model.text_length).to(training_device())
        if encoder.dim != model.config.text_dim:
            raise ValueError(
                f"--text-encoder {config.text_encoder} gives {encoder.dim} channels, the model takes "
                f"{model.config.text_dim}: set --model.text-dim {encoder.dim}"
            )
        captions = captions_of(images)
        some = [captions[i][0] for i in torch.linspace(0, len(images) - 1, 8).long().tolist()]
        self.captions = cached_captions(encoder, captions)
        self.shown = encoder(config.prompts or some)

    def load(self, start: int, n: int) -> Batch:
        """Tokens, and classes or captions."""
        index = self.order(start, n)
        noise = Noise(example_numbers(self.config, start, n))
        rows = index
        if self.config.data.flip:
            flip = noise.at(purpose="flip").uniform(1)[:, 0] < 0.5
            rows = index + len(self.images) * flip.long()
        return Batch(self.tokens[rows], self.condition(index, rows, noise), noise)

    def condition(self, index: torch.Tensor, rows: torch.Tensor, noise: Noise) -> Condition:
        """Classes or captions of some images, given their numbers and those of their (perhaps mirrored) tokens."""
        return self.captions.batch(index, noise) if self.model.by_text else self.images.labels[index]

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The generator's own loss."""
        return self.model.loss(batch.x, batch.labels, batch.noise)

    def preview(self, model: Any) -> torch.Tensor:
        """One row a class (of many, `ROWS` at even distances) or prompt, fixed seeds, the default sampler."""
        from samplers import default_sampler

        n = len(self.images.classes)
        shown: Condition = self.shown if model.by_text else torch.linspace(0, n - 1, min(n, ROWS)).long()
        labels = shown[torch.arange(len(shown)).repeat_interleave(8)].to(model.device)
        tokenizer = self.tokenizer.to(model.device)
        tokens = default_sampler(model).sample(model, labels, seeds=torch.arange(len(labels))).tokens
        with torch.no_grad():
            return torch.cat([tokenizer.decode(tokens[i : i + 32]).cpu() for i in range(0, len(labels), 32)])

    def before_export(self, model: Any) -> None:
        """Note the tokenizer, and the classes or the text encoder."""
        super().before_export(model)
        note_tokenizer(model, self.config.tokenizer)
        if model.by_text:
            model.extra["text_encoder"] = lasting(self.config.text_encoder)


def lasting(name: str) -> str:
    """A MODEL's name as a checkpoint notes it: a local folder by its whole path, to be found from anywhere."""
    return str(Path(name).absolute()) if (Path(name) / CONFIG).is_file() else name


def weights_of(name: str) -> str:
    """SHA-256 of a MODEL's weights, as its description has it."""
    return str(read_description(locate(name)).get("sha256", ""))


def note_tokenizer(model: Any, name: str) -> None:
    """Note in a generator whose tokens it draws, and of which weights."""
    model.extra |= {"tokenizer": lasting(name), "tokenizer_sha256": weights_of(name)}


def fitting_tokenizer(config: TrainConfig, model: Any) -> Any:
    """The tokenizer that `--tokenizer` names.

    Raises:
        ValueError: if it is none, or its tokens don't fit the model.
    """
    tokenizer = from_pretrained(config.tokenizer)
    if tokenizer.kind not in TOKENIZERS:
        raise ValueError(f"--tokenizer {config.tokenizer} holds a {tokenizer.kind}, not a tokenizer; see `genlab list`")
    require_fit(config.tokenizer, tokenizer.spec, config.name, model.spec)
    return tokenizer


def load_initial(model: nn.Module, name: str, parts: tuple[str, ...] | None = None) -> None:
    """Copy the weights of MODEL `name` into `model`; parts that the source lacks keep their own start, and are named.

    Args:
        model: what is to be trained.
        name: the MODEL.
        parts: which of the source's to take, by the first part of their names; None: all.

    Raises:
        ValueError: if the two are not of the same kind, or differ in the sizes of what both have.
    """
    source = from_pretrained(name)
    if type(source) is not type(model):
        raise ValueError(
            f"--init {name} is a {source.kind}, this run trains a {model.kind}: give a checkpoint of its kind"
        )
    ours, theirs = model.state_dict(), source.state_dict()
    if getattr(model, "by_text", False) != getattr(source, "by_text", False):  # what reads the other kind of condition
        theirs = {k: v for k, v in theirs.items() if k.split(".")[0] not in ("class_emb", "caption")}
    if parts is not None:
        theirs = {k: v for k, v in theirs.items() if k.split(".")[0] in parts}
    theirs = {k: v for k, v in theirs.items() if k in ours or k.split(".")[0] != "memory"}  # filled anew in the end
    wrong = sorted(f"{k} is not in this run's model" for k in theirs.keys() - ours.keys())
    wrong += sorted(
        f"{k} is {tuple(v.shape)} here, {tuple(theirs[k].shape)} there"
        for k, v in ours.items()
        if k in theirs and theirs[k].shape != v.shape
    )
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"--init {name} has other sizes than this run's model: {'; '.join(wrong[:5])}{more}. "
            "Take the preset it was trained with, or set the --model.* options as its config.json has them"
        )
    if new := sorted({".".join(k.split(".")[:2]) for k in ours.keys() - theirs.keys()}):
        print(f"note: {name} has no {', '.join(new)}: these start afresh", file=sys.stderr)
    model.load_state_dict(theirs, strict=False)


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Exclude parameters from training, by the first part of their names.

    Raises:
        ValueError: if a prefix fits no parameter, or nothing is left to train.
    """
    for prefix in prefixes:
        part = prefix.rstrip(".") + "."
        fitting = [p for name, p in model.named_parameters() if f"{name}.".startswith(part)]
        if not fitting:
            known = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
            raise ValueError(f"--freeze {prefix} fits no parameter of this model; its parts are {known}")
        for p in fitting:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("--freeze leaves nothing to train")


def build_task(config: TrainConfig) -> Task:
    """The task of a config: data opened, model made with the run's seed.

    Raises:
        ValueError: if model, tokenizer and data don't fit together.
    """
    kind = config.model.kind
    if kind == "distilled":
        from .distill import distill_task

        return distill_task(config)
    if kind == "flextok":
        from .flextok import flextok_task

        return flextok_task(config)
    if kind == "seed":
        from .seed import seed_task

        return seed_task(config)
    if kind == "seed_llama":
        from .seed_llama import seed_llama_task

        return seed_llama_task(config)
    if kind == "divot_lm":
        from .divot_lm import divot_lm_task

        return divot_lm_task(config)
    if kind == "divot":
        from .divot import divot_task

        return divot_task(config)
    if (kind in TOKENIZERS) == bool(config.tokenizer):
        needs = "takes no --tokenizer" if kind in TOKENIZERS else "needs --tokenizer MODEL (see `genlab list`)"
        raise ValueError(f"a {kind} {needs}")
    torch.manual_seed(config.seed)
    model = model_class(kind)(config.model)
    if config.init:
        load_initial(model, config.init)
    freeze(model, config.freeze)
    require_use(config, model)
    task: type[Task] = TokenizerTask if kind in TOKENIZERS else GeneratorTask
    if config.teacher:
        from .draft import DraftTask as task
    if config.codes_of:
        from .seed import PaintTask as task
    size = config.model.image_size if kind in TOKENIZERS else None
    if size is None:
        size = fitting_tokenizer(config, model).spec.image_size[-1]
    images = open_images(config.data.source, split=config.data.split, size=size, on_error=config.data.on_error)
    if kind not in TOKENIZERS and not model.by_text:
        require_classes(config, images, model.num_classes)
    return task(config, model, images)


def require_classes(config: TrainConfig, images: ImageSet, most: int) -> None:
    """Refuse images that a generator of `most` classes can't be trained on by class.

    Raises:
        ValueError: if there are more classes, or images without one.
    """
    source, n = config.data.source, len(images.classes)
    if n > most:
        raise ValueError(f"{source} has {n} classes, the model takes {most}: set --model.num-classes {n}")
    if lone := (images.labels < 0).nonzero()[:, 0].tolist():
        by_text = ", or train by captions: --model.condition text" if hasattr(config.model, "condition") else ""
        raise ValueError(
            f"{len(lone):,} of {len(images):,} images of {source} lie in no class folder (first {images.keys[lone[0]]})"
            f", which a generator by class can't train on: put each into a folder named as its class, or away{by_text}"
        )


def require_use(config: TrainConfig, model: Any) -> None:
    """Refuse options that a model's training does not look at.

    Raises:
        ValueError: naming the first one, and what it is for.
    """
    tokenizer, plain = config.model.kind in TOKENIZERS, TrainConfig(name="", model=None)
    by_text = getattr(model, "by_text", False)
    idle = {
        "--teacher": (config.teacher and tokenizer, "a generator"),
        "--codes-of": (config.codes_of and tokenizer, "a generator by text"),
        "--prompts": (config.prompts and not by_text, "a generator by text"),
        "--text-encoder": (config.text_encoder != plain.text_encoder and not by_text, "a generator by text"),
        "--loss": (config.loss != plain.loss and not tokenizer, "an autoencoder"),
        "--data.takes": (config.data.takes != plain.data.takes, "films"),
        "--data.reverse": (config.data.reverse, "films"),
    }
    for option, (given, what) in idle.items():
        if given:
            raise ValueError(f"{option} is for {what}, and does nothing for this {config.model.kind}: leave it away")
