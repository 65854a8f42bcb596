"""Distilled Decoding's training (Liu et al., arXiv 2412.17153): a student learns where its teacher's noise leads.

    genlab train dd-llamagen-emoji64          the teacher is a MODEL; no data is read

First the pair set: noise of known seeds, followed through the teacher by `CodeFlow`. A pair is a seed and its tokens,
since the seed gives the noise and the class or caption again. Pairs are kept in the cache, in shards that are whole or
absent, under a fingerprint of all that decides them: an interrupted run goes on where it stopped, more pairs extend
the set, and students of one teacher share it. Then the student trains on them as any model does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from genlab.code_flow import CodeFlow, code_vectors
from genlab.config import to_json
from genlab.data import open_images
from genlab.data.cache import cache_folder, cached_captions, captions_of, digest_of, write_tensors
from genlab.generators.base import Condition, Generator
from genlab.generators.distilled import Distilled, MapConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import require_fit
from samplers.distilled import DistilledSampler, follow

from .config import DataConfig, TrainConfig
from .tasks import Batch, Task, freeze, lasting, load_initial, training_device, weights_of

SHARD = 64
"""Pairs a shard, one batch of the teacher."""


class ByClass:
    """The class of each pair, uniform."""

    def __init__(self, n: int) -> None:
        """Args: n: classes."""
        self.n = n
        self.key = f"{n} classes"

    def __call__(self, seeds: torch.Tensor) -> Condition:
        """The classes (B,) of these seeds."""
        return (Noise(seeds, purpose="class").uniform(1)[:, 0] * self.n).long()


class ByText:
    """The caption of each pair: of an entry of a list, uniform, then one of those it has."""

    def __init__(self, encoder: Any, captions: list[tuple[str, ...]]) -> None:
        """Args: encoder: the teacher's. captions: the list, several ways to say it an entry."""
        self.captions, self.n = cached_captions(encoder, captions), len(captions)
        self.key = f"captions {encoder.name} {encoder.length} {captions}"

    def __call__(self, seeds: torch.Tensor) -> Condition:
        """The captions of these seeds."""
        noise = Noise(seeds, purpose="class")
        return self.captions.batch((noise.uniform(1)[:, 0] * self.n).long(), noise)


class PairSet:
    """Seeds, and the tokens that a teacher's map makes of their noise."""

    def __init__(
        self, teacher: Generator, flow: CodeFlow, how: MapConfig, conditions: ByClass | ByText, n: int, seed: int
    ) -> None:
        """Generate what the cache lacks.

        Args:
            teacher: whose map it is.
            flow: noise to ids.
            how: shapes the teacher's distributions.
            conditions: seeds to classes or captions.
            n: pairs.
            seed: of the whole set. Its pairs' seeds lie far above those that people draw with.

        Raises:
            ValueError: for fewer than one pair.
        """
        from accelerate import PartialState
        from tqdm import tqdm

        if n < 1:
            raise ValueError(f"a student needs pairs to learn from, got --model.pairs {n}")
        self.n, self.conditions, shards = n, conditions, -(-n // SHARD)
        self.seeds = (1 << 62) + (seed << 40) + torch.arange(shards * SHARD)
        self.folder = cache_folder() / "pairs" / fingerprint(teacher, flow, how, f"{seed} {conditions.key}")
        paths = [self.folder / f"{i:06d}.safetensors" for i in range(shards)]
        found = [read(path) for path in paths]
        lacking, process = [i for i, tokens in enumerate(found) if tokens is None], PartialState()
        mine = lacking[process.process_index :: process.num_processes]
        quiet = True if not mine or not process.is_main_process else None
        with tqdm(total=n, unit="img", desc="the teacher's pairs", disable=quiet) as bar:
            bar.update(min(n, SHARD * (shards - len(lacking))))
            for i in mine:
                seeds = self.seeds[i * SHARD : (i + 1) * SHARD]
                write_tensors(paths[i], tokens=draw(teacher, conditions(seeds), seeds, flow, how).int())
                bar.update(min(SHARD, n - i * SHARD) * process.num_processes)
        process.wait_for_everyone()
        whole = [read(path) if tokens is None else tokens for path, tokens in zip(paths, found, strict=True)]
        self.tokens = torch.cat([tokens for tokens in whole if tokens is not None])[:n]
        self.seeds = self.seeds[:n]

    def __len__(self) -> int:
        return self.n

    def report(self) -> str:
        """One line for people."""
        return f"{self.n:,} pairs of a teacher's noise and tokens, in {self.folder}"


def draw(teacher: Generator, condition: Condition, seeds: torch.Tensor, flow: CodeFlow, how: MapConfig) -> torch.Tensor:
    """Token values (B, *spec.shape), on the host, that the seeds' noise leads to."""
    K, L, device = teacher.spec.depth, teacher.spec.length, teacher.device
    noise = Noise(seeds.to(device)).at(position=torch.arange(L, device=device), purpose="start")
    with torch.inference_mode():
        state = teacher.start(condition.to(device), how.guidance)
        for _ in follow(teacher, state, flow, how, noise.normal(K * flow.channels), teacher.n_groups):
            pass
        return teacher.tokens(state).values.cpu()


def fingerprint(teacher: Generator, flow: CodeFlow, how: MapConfig, what: str) -> str:
    """Hash of all that decides the pairs but their number."""
    head = f"1 {SHARD} {what} {teacher.kind} {to_json(teacher.config)} {to_json(how)}"
    return digest_of(head, {**teacher.state_dict(), "codes": flow.codes_VC})


def read(path: Path) -> torch.Tensor | None:
    """The tokens of a shard; None if there is none, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["tokens"].long() if path.exists() else None
    except (SafetensorError, KeyError):
        return None


class DistillTask(Task):
    """Train a student on its teacher's pairs."""

    model: Distilled
    images: Any
    tokenizer: Any

    def __init__(
        self, config: TrainConfig, model: Distilled, pairs: PairSet, tokenizer: Any, shown: Condition, extra: Any
    ) -> None:
        """As `Task`; neither teacher nor tokenizer is a submodule: they aren't trained, moved or saved.

        Args:
            config: the run.
            model: the student.
            pairs: what it learns.
            tokenizer: for previews.
            shown: the classes or captions of previews, a row each.
            extra: what the checkpoint shall say, as the teacher's does.
        """
        super().__init__(config, model, pairs)  # type: ignore[arg-type]
        self.shown, self.extra = shown, extra
        object.__setattr__(self, "tokenizer", tokenizer)

    def load(self, start: int, n: int) -> Batch:
        """Tokens, classes or captions, and the noise that leads to them."""
        index, pairs = self.order(start, n), self.images
        seeds = pairs.seeds[index]
        return Batch(pairs.tokens[index], pairs.conditions(seeds), Noise(seeds))

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The student's loss; what it is given of each pair changes from epoch to epoch."""
        return self.model.loss(batch.x, batch.labels, batch.noise.at(step=images_seen))

    def preview(self, model: Any) -> torch.Tensor:
        """One row a class or caption, fixed seeds, one step."""
        labels = self.shown[torch.arange(len(self.shown)).repeat_interleave(8)].to(model.device)
        out = DistilledSampler().sample(model, labels, seeds=torch.arange(len(labels)))
        with torch.no_grad():
            return self.tokenizer.to(model.device).decode(out.tokens).cpu()

    def stands_on(self) -> dict[str, str]:
        """The teacher, which drew the pairs."""
        return {"model.teacher": weights_of(self.config.model.teacher)}

    def before_export(self, model: Any) -> None:
        """Note the tokenizer, and the classes or the text encoder."""
        model.extra |= self.extra


def distill_task(config: TrainConfig) -> DistillTask:
    """The task of a student's config: the teacher loaded, its pairs drawn, the student started from it.

    Raises:
        ValueError: if no teacher is named, it is of other sizes, or an option is set that has no effect here.
    """
    c = config.model
    if not c.teacher:
        raise ValueError("a student needs a teacher: --model.teacher MODEL (see `genlab list`)")
    if config.tokenizer or config.teacher or config.data != DataConfig():
        raise ValueError(
            "a student reads the tokens of its --model.teacher, not data: leave --tokenizer, --teacher and --data.* as "
            "they are"
        )
    teacher = from_pretrained(c.teacher)
    size = lambda net: dataclasses.replace(net, dropout=0.0) if hasattr(net, "dropout") else net  # noqa: E731
    if size(teacher.config) != size(c.net):
        raise ValueError(
            f"teacher {c.teacher} is a {teacher.kind} of {teacher.config}, the student's net is {c.net}: set the "
            "--model.net.* options as the teacher's config.json has them"
        )
    if not teacher.extra.get("tokenizer"):
        raise ValueError(f"teacher {c.teacher} names no tokenizer, so there are no codes for noise to flow to")
    tokenizer = from_pretrained(teacher.extra["tokenizer"])
    require_fit(teacher.extra["tokenizer"], tokenizer.spec, c.teacher, teacher.spec)
    from accelerate import PartialState

    torch.manual_seed(config.seed)
    student = Distilled(c)
    student.inherit(teacher, tokenizer)
    if config.init:
        load_initial(student, config.init)
    freeze(student, config.freeze)
    conditions, shown = conditions_of(config, teacher)
    device = PartialState().device
    flow = CodeFlow(code_vectors(tokenizer).to(device), c.map.method, c.map.steps)
    pairs = PairSet(teacher.to(device), flow, c.map, conditions, c.pairs, config.seed)
    noted = ("tokenizer", "tokenizer_sha256", "data", "text_encoder")
    extra = {key: teacher.extra[key] for key in noted if key in teacher.extra}
    return DistillTask(config, student, pairs, tokenizer, shown, extra)


def conditions_of(config: TrainConfig, teacher: Generator) -> tuple[ByClass | ByText, Condition]:
    """What the pairs are drawn by, and what previews show.

    A teacher by text needs captions, though no images: those of `--model.captions`, a file with one a line, else of
    the teacher's training set.

    Raises:
        ValueError: for captions without a teacher by text, or a teacher that doesn't say who reads them.
        FileNotFoundError: if there are no captions.
    """
    path = config.model.captions
    if not teacher.by_text:
        if path or config.prompts:
            raise ValueError(f"{config.model.teacher} draws by class: leave --model.captions and --prompts away")
        return ByClass(teacher.num_classes), torch.arange(min(teacher.num_classes, 10))
    from genlab.text import TextEncoder

    name = teacher.extra.get("text_encoder")
    if not name or not {config.text_encoder, lasting(config.text_encoder)} & {name, TrainConfig.text_encoder}:
        raise ValueError(
            f"a student reads captions with its teacher's text encoder; {config.model.teacher} names {name!r}, "
            f"--text-encoder says {config.text_encoder!r}"
        )
    captions: list[tuple[str, ...]]
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no captions at {path}: --model.captions takes a text file, one caption a line")
        captions = [(line.strip(),) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        source = teacher.extra.get("data", {}).get("source", "")
        try:
            captions = captions_of(open_images(source, split="train"))
        except (FileNotFoundError, ValueError) as error:
            raise FileNotFoundError(
                f"no captions to draw the teacher's images by: its training set {source!r} isn't there ({error}); "
                "give a file with one a line: --model.captions FILE.txt"
            ) from error
    if not captions:
        raise ValueError(f"{path} holds no captions: write one a line")
    encoder = TextEncoder(name, teacher.text_length).to(training_device())
    some = [captions[i][0] for i in torch.linspace(0, len(captions) - 1, 8).long().tolist()]
    return ByText(encoder, captions), encoder(config.prompts or some)
