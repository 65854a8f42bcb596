"""A generator with its tokenizer and classes, as `sample`, `eval`, `demo` and `bench` use them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genlab.config import to_dict
from genlab.generators.base import Condition, Generator, Text
from genlab.hub import CONFIG, from_pretrained, locate, read_description, write_atomic
from genlab.pictures import to_uint8
from genlab.tokens import Tokens, concatenate, require_fit
from samplers.base import SampleOutput, Sampler, Stats
from tokenizers_img.base import Tokenizer


@dataclass(frozen=True, eq=False)
class Line:
    """What it takes to draw pictures: generator, tokenizer, names of the classes or the text encoder's."""

    name: str
    generator: Generator
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    hashes: dict[str, str]

    def condition(self, wanted: Sequence[int] | Sequence[str]) -> Condition:
        """Classes, or captions where it draws by text, as the generator takes them."""
        if self.generator.by_text:
            return self.generator.read_captions([str(words) for words in wanted])
        return torch.tensor([int(i) for i in wanted])

    def needs_classes(self, command: str) -> None:
        """Refuse a generator by text where a command goes by classes.

        Raises:
            ValueError: naming what to do.
        """
        if self.generator.by_text:
            raise ValueError(
                f"genlab {command} goes by classes, and {self.name} draws by text; "
                f'try `genlab sample {self.name} --prompt "a red apple"`, or `genlab eval --model {self.name}`'
            )

    @property
    def n_classes(self) -> int:
        """Classes that it was trained on; its table may have more rows than the training set had classes."""
        return len(self.classes) or self.generator.num_classes

    def class_of(self, names: Sequence[str], labels: torch.Tensor) -> torch.Tensor:
        """Classes of another set, by their names, as this model numbers them; without names, the numbers themselves.

        Raises:
            ValueError: for a name that it doesn't know.
        """
        if not (self.classes and names):
            return labels
        if unknown := [name for name in names if name not in self.classes]:
            known = self.describe_classes()
            raise ValueError(
                f"no class {unknown[0]!r}; {self.name} knows {known}: take a set of its classes (`genlab eval`: --like)"
            )
        own = torch.tensor([self.classes.index(name) for name in names])
        return own[labels].where(labels >= 0, labels)

    def class_ids(self, chosen: str) -> list[int]:
        """Class numbers out of `all`, numbers (`0,3-5`) and names.

        Raises:
            ValueError: for a class there is not.
        """
        if chosen == "all":
            return list(range(self.n_classes))
        ids = []
        for part in chosen.split(","):
            part = part.strip()
            names = [c for c in self.classes if c.lower() == part.lower()] or [
                c for c in self.classes if c.lower().startswith(part.lower()) and part and not part[0].isdigit()
            ]
            if names:
                ids.append(self.classes.index(names[0]))
                continue
            from .shared import numbers

            try:
                found = numbers(part)
            except ValueError:
                found = [-1]
            if all(str(i) in self.classes for i in found):  # classes named by numbers
                found = [self.classes.index(str(i)) for i in found]
            if not all(0 <= i < self.n_classes for i in found):
                raise ValueError(f"no class {part!r}; {self.name} knows {self.describe_classes()}")
            ids += found
        return ids

    def describe_classes(self) -> str:
        """The classes, numbered."""
        if not self.classes:
            return f"0-{self.n_classes - 1}"
        return ", ".join(f"{i} {c}" for i, c in enumerate(self.classes))

    def draw(
        self,
        sampler: Sampler,
        labels: Condition,
        seeds: torch.Tensor,
        batch_size: int = 32,
        progress: bool = False,
        keep: Path | None = None,
    ) -> tuple[torch.Tensor, Stats]:
        """uint8 images (N, 3, H, W), one a label and seed, and what they cost.

        With `keep`, tokens are written to this folder batch by batch, and taken from there the next time: an
        interrupted drawing goes on, and another tokenizer's decoder needs no new drawing.
        """
        if keep is None:
            out = sampler.sample(self.generator, labels, seeds, batch_size, progress)
        else:
            out = self._draw_kept(sampler, labels, seeds, batch_size, progress, keep)
        with torch.inference_mode():
            parts = [
                to_uint8(self.tokenizer.decode(out.tokens[i : i + batch_size], seeds[i : i + batch_size])).cpu()
                for i in range(0, len(labels), batch_size)
            ]
        return torch.cat(parts), out.stats

    def _draw_kept(
        self, sampler: Sampler, labels: Condition, seeds: torch.Tensor, batch_size: int, progress: bool, keep: Path
    ) -> SampleOutput:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save
        from tqdm import tqdm

        what = [
            self.hashes[self.name],
            sampler.name,
            to_dict(sampler.config),
            str(next(self.generator.parameters()).dtype),
        ]
        parts, total = [], Stats()
        for i in tqdm(range(0, len(labels), batch_size), unit="batch", desc="drawing", disable=not progress):
            rows = slice(i, i + batch_size)
            condition, of = labels[rows], seeds[rows]
            shown = condition.digests() if isinstance(condition, Text) else torch.as_tensor(condition).tolist()
            text = json.dumps([what, shown, of.tolist()], sort_keys=True)
            path = keep / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
            try:
                with safe_open(path, framework="pt") as file:
                    stats = Stats(**json.loads(file.metadata()["stats"]))
                    values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                tokens = Tokens(spec=self.generator.spec, **values)
            except (FileNotFoundError, SafetensorError):
                out = sampler.sample(self.generator, condition, of, batch_size)
                tokens, stats = out.tokens.to("cpu"), out.stats
                values = {"values": tokens.values, "kept": tokens.kept, "depths": tokens.depths}
                values = {name: value.contiguous() for name, value in values.items() if value is not None}
                write_atomic(path, save(values, {"stats": json.dumps(vars(stats))}))
            parts.append(tokens)
            total = total + stats
        return SampleOutput(concatenate(parts), total)

    def fingerprint(self, sampler: Sampler, labels: Sequence[int] | Sequence[str], seeds: Sequence[int]) -> str:
        """Hash of all that the images depend on."""
        what = {"weights": self.hashes, "sampler": sampler.name, "config": to_dict(sampler.config)}
        text = json.dumps([what, list(labels), list(seeds)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_line(
    model: str | Path, *, tokenizer: str = "", device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> Line:
    """Load a generator and the tokenizer that its checkpoint names (or the one given).

    Raises:
        ValueError: if MODEL is a tokenizer, or the two don't fit.
        FileNotFoundError: if either is missing.
    """
    folder = locate(model)
    generator = from_pretrained(folder, device=device, dtype=dtype)
    if not isinstance(generator, Generator):
        raise ValueError(
            f"{model} holds a {generator.kind} tokenizer, which draws nothing; try `genlab reconstruct {model}`"
        )
    wanted = tokenizer or generator.extra.get("tokenizer", "")
    if not wanted:
        raise ValueError(
            f"{model} names no tokenizer; give one with --tokenizer MODEL (it makes {generator.spec.describe()})"
        )
    # a tokenizer beside its generator wins over a name, so that a copied folder stays whole
    beside = folder / wanted
    t = from_pretrained(beside if (beside / CONFIG).is_file() else wanted, device=device)
    if not isinstance(t, Tokenizer):
        raise ValueError(f"--tokenizer {wanted} holds a {t.kind}, not a tokenizer")
    require_fit(wanted, t.spec, str(model), generator.spec)
    hashes = {
        str(model): read_description(folder).get("sha256", ""),
        wanted: read_description(locate(beside if (beside / CONFIG).is_file() else wanted)).get("sha256", ""),
    }
    noted = generator.extra.get("tokenizer_sha256")
    if noted and not tokenizer and hashes[wanted] != noted:
        warnings.warn(
            f"{model} was trained on tokens of other weights than {wanted} holds now, which may read them otherwise: "
            "train it anew, or give the tokenizer that it was trained with by --tokenizer MODEL",
            stacklevel=2,
        )
    classes = tuple(generator.extra.get("data", {}).get("classes", ()))
    return Line(str(model), generator, t, classes, hashes)
