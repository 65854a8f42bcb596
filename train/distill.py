"""Distilled Decoding's training (Liu et al., arXiv 2412.17153): a student learns where its teacher's noise leads.

    genlab train dd-llamagen-emoji64          the teacher is a MODEL; no data is read

First the pair set: noise of known seeds, followed through the teacher by `CodeFlow`. A pair is a seed and its tokens,
since the seed gives the noise and the class again. Pairs are kept in the cache, in shards that are whole or absent,
under a fingerprint of all that decides them: an interrupted run goes on where it stopped, more pairs extend the set,
and students of one teacher share it. Then the student trains on them as any model does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from genlab.code_flow import CodeFlow, code_vectors
from genlab.config import to_json
from genlab.data.cache import cache_folder
from genlab.generators.base import Generator
from genlab.generators.distilled import Distilled, MapConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import require_fit
from samplers.distilled import follow

from .config import DataConfig, TrainConfig
from .tasks import Batch, Task, freeze, load_initial

SHARD = 64
"""Pairs a shard, one batch of the teacher."""


class PairSet:
    """Seeds, and the tokens that a teacher's map makes of their noise."""

    def __init__(self, teacher: Generator, flow: CodeFlow, how: MapConfig, n: int, seed: int) -> None:
        """Generate what the cache lacks.

        Args:
            teacher: whose map it is.
            flow: noise to ids.
            how: shapes the teacher's distributions.
            n: pairs.
            seed: of the whole set. Its pairs' seeds lie far above those that people draw with.

        Raises:
            ValueError: for fewer than one pair.
        """
        from accelerate import PartialState
        from tqdm import tqdm

        if n < 1:
            raise ValueError(f"a student needs pairs to learn from, got --model.pairs {n}")
        self.n, self.num_classes = n, teacher.num_classes
        shards = -(-n // SHARD)
        self.seeds = (1 << 62) + (seed << 40) + torch.arange(shards * SHARD)
        self.folder = cache_folder() / "pairs" / fingerprint(teacher, flow, how, seed)
        paths = [self.folder / f"{i:06d}.safetensors" for i in range(shards)]
        found = [read(path) for path in paths]
        lacking, process = [i for i, tokens in enumerate(found) if tokens is None], PartialState()
        mine = lacking[process.process_index :: process.num_processes]
        with tqdm(
            total=n, unit="img", desc="the teacher's pairs", disable=None if mine and process.is_main_process else True
        ) as bar:
            bar.update(min(n, SHARD * (shards - len(lacking))))
            for i in mine:
                write(paths[i], draw(teacher, self.seeds[i * SHARD : (i + 1) * SHARD], flow, how))
                bar.update(min(SHARD, n - i * SHARD) * process.num_processes)
        process.wait_for_everyone()
        whole = [read(path) if tokens is None else tokens for path, tokens in zip(paths, found, strict=True)]
        self.tokens = torch.cat([tokens for tokens in whole if tokens is not None])[:n]
        self.seeds = self.seeds[:n]
        self.labels = classes(self.seeds, self.num_classes)

    def __len__(self) -> int:
        return self.n

    def report(self) -> str:
        """One line for people."""
        return f"{self.n:,} pairs of a teacher's noise and tokens, in {self.folder}"


def classes(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """The class of each seed's pair, uniform over n."""
    return (Noise(seeds, purpose="class").uniform(1)[:, 0] * n).long()


def draw(teacher: Generator, seeds: torch.Tensor, flow: CodeFlow, how: MapConfig) -> torch.Tensor:
    """Token values (B, *spec.shape), on the host, that the seeds' noise leads to."""
    labels, noise = classes(seeds, teacher.num_classes).to(teacher.device), Noise(seeds.to(teacher.device))
    K, L = teacher.spec.depth, teacher.spec.length
    noise = noise.at(position=torch.arange(L, device=teacher.device), purpose="start")
    with torch.inference_mode():
        state = teacher.start(labels, how.guidance)
        for _ in follow(teacher, state, flow, how, noise.normal(K * flow.channels), teacher.n_groups):
            pass
        return teacher.tokens(state).values.cpu()


def fingerprint(teacher: Generator, flow: CodeFlow, how: MapConfig, seed: int) -> str:
    """Hash of all that decides the pairs but their number."""
    digest = hashlib.sha256(f"1 {SHARD} {seed} {teacher.kind} {to_json(teacher.config)} {to_json(how)}".encode())
    for name, value in {**teacher.state_dict(), "codes": flow.codes_VC}.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read(path: Path) -> torch.Tensor | None:
    """The tokens of a shard; None if there is none, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["tokens"].long() if path.exists() else None
    except (SafetensorError, KeyError):
        return None


def write(path: Path, tokens: torch.Tensor) -> None:
    """Write a shard, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({"tokens": tokens.int()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class DistillTask(Task):
    """Train a student on its teacher's pairs."""

    model: Distilled
    images: Any
    tokenizer: Any

    def __init__(self, config: TrainConfig, model: Distilled, pairs: PairSet, tokenizer: Any, extra: Any) -> None:
        """Args: as `Task`; pairs: what it learns. tokenizer: for previews. extra: what the teacher's checkpoint says.

        Neither teacher nor tokenizer is a submodule: they aren't trained, moved or saved.
        """
        super().__init__(config, model, pairs)  # type: ignore[arg-type]
        self.extra = extra
        object.__setattr__(self, "tokenizer", tokenizer)

    def load(self, start: int, n: int) -> Batch:
        """Tokens, classes, and the noise that leads to them."""
        index, pairs = self.order(start, n), self.images
        return Batch(pairs.tokens[index], pairs.labels[index], Noise(pairs.seeds[index]))

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """The student's loss; what it is given of each pair changes from epoch to epoch."""
        return self.model.loss(batch.x, batch.labels, batch.noise.at(step=images_seen))

    def preview(self, model: Any) -> torch.Tensor:
        """One row a class, fixed seeds, one step."""
        from samplers import default_sampler

        labels = torch.arange(min(self.model.num_classes, 10)).repeat_interleave(8)
        out = default_sampler(model).sample(model, labels.to(model.device), seeds=torch.arange(len(labels)))
        with torch.no_grad():
            return self.tokenizer.to(model.device).decode(out.tokens).cpu()

    def before_export(self, model: Any) -> None:
        """Note the tokenizer, the classes and the teacher."""
        model.extra |= self.extra


def distill_task(config: TrainConfig) -> DistillTask:
    """The task of a student's config: the teacher loaded, its pairs drawn, the student started from it.

    Raises:
        ValueError: if no teacher is named, it is of other sizes, or an option is set that has no effect here.
    """
    c = config.model
    if not c.teacher:
        raise ValueError("a student needs a teacher: --model.teacher MODEL (see `genlab list`)")
    if config.tokenizer or config.data != DataConfig():
        raise ValueError("a student reads its teacher's tokens, not data: leave --tokenizer and --data.* as they are")
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
    device = PartialState().device
    flow = CodeFlow(code_vectors(tokenizer).to(device), c.map.method, c.map.steps)
    pairs = PairSet(teacher.to(device), flow, c.map, c.pairs, config.seed)
    extra = {key: teacher.extra[key] for key in ("tokenizer", "data") if key in teacher.extra}
    return DistillTask(config, student, pairs, tokenizer, extra)
