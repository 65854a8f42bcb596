"""What every sampler does: draw tokens for classes and seeds, and count what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, ClassVar

import torch

from genlab.config import config
from genlab.generators.base import Condition, Generator, Guidance
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from genlab.tokens import Tokens, TokenSpec, concatenate

Known = tuple[torch.Tensor, torch.Tensor]
"""Token values (B, *spec.shape) and which of them are given, (B, L): only the others are drawn."""
Tally = list[tuple[int, int]]
"""How many were tested, and how many accepted, at each of some places."""


@dataclass
class Stats:
    """What drawing cost."""

    images: int = 0
    model_calls: int = 0
    """Network evaluations, each over a batch."""
    rows: int = 0
    """Rows of all evaluations, unconditional ones too: compute, whatever the batch size."""
    proposed: int = 0
    """Tokens proposed by a draft; 0 for plain samplers."""
    accepted: int = 0
    """Of these, accepted."""
    seconds: float = 0.0
    head_calls: int = 0
    """Evaluations of a diffusion head, each over a batch; they are not among `model_calls`."""
    trials: int = 0
    """Proposals that residuals took."""
    by_step: Tally = field(default_factory=list)
    """Where the draft is a path: by denoising step, transitions tested (all before them stood) and accepted."""
    by_position: Tally = field(default_factory=list)
    """The same by number of the token, in order of generation."""

    def __add__(self, other: Stats) -> Stats:
        return Stats(**{name: _plus(value, getattr(other, name)) for name, value in vars(self).items()})


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [(x[0] + y[0], x[1] + y[1]) for x, y in zip_longest(a, b, fillvalue=(0, 0))]
    return a + b


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """Tokens of all images, in order, and what they cost."""

    tokens: Tokens
    stats: Stats = field(default_factory=Stats)


@config
class SamplerConfig:
    """What all samplers share."""

    guidance: Guidance | None = None
    """Classifier-free guidance; None takes the generator's default."""
    fixed_batch: bool = False
    """Pad the last batch, so that every image sees the same batch size (bitwise repeatable discrete tokens)."""


class Sampler:
    """A config and `sample`. Subclasses define `draw` and `supports`."""

    name: ClassVar[str]
    Config: ClassVar[type]
    exact: ClassVar[bool] = True
    """Whether it draws from the generator's own distribution."""
    completes: ClassVar[bool] = False
    """Whether it can draw the rest of an image; then `draw` takes `known` too."""

    def __init__(self, config: Any = None) -> None:
        """Args: config: an instance of this class's `Config`; None takes its defaults."""
        self.config = config if config is not None else self.Config()

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Whether this sampler can draw from the generator's distributions."""
        raise NotImplementedError

    def draw(self, generator: Generator, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """Draw one batch."""
        raise NotImplementedError

    def start(self, generator: Generator, labels: Condition, known: Known | None, **options: Any) -> Any:
        """A generator's state, holding what is known already."""
        state = generator.start(labels, self.config.guidance, **options)
        if known is not None:
            generator.hold(state, *known)
        return state

    def sample(
        self,
        generator: Generator,
        labels: Condition,
        seeds: torch.Tensor,
        batch_size: int = 32,
        progress: bool = False,
        known: Known | None = None,
    ) -> SampleOutput:
        """Draw one image a label and seed.

        Args:
            generator: what to draw from.
            labels: classes (N,), or captions.
            seeds: one seed an image, (N,); an image depends on its own alone.
            batch_size: rows a batch.
            progress: show a bar.
            known: tokens that are given, to draw the rest around them (see `Generator.hold`).

        Raises:
            ValueError: if this sampler doesn't work on this generator, or can't complete an image; the message names
                those that do.
        """
        from tqdm import tqdm

        if not self.supports(generator):
            able = [name for name in SAMPLERS if SAMPLERS[name].supports(generator)]
            raise ValueError(
                f"sampler {self.name!r} can't draw from a {generator.kind!r} generator; these can: {', '.join(able)}"
            )
        if len(labels) != len(seeds) or not len(labels):
            raise ValueError(f"{len(labels)} labels and {len(seeds)} seeds given: one of each an image, at least one")
        if known is not None and not self.completes:
            able = [n for n in SAMPLERS if SAMPLERS[n].completes and SAMPLERS[n].supports(generator)]
            raise ValueError(
                f"sampler {self.name!r} draws whole images only; these complete one: {', '.join(able) or 'none here'}"
            )
        if known is not None:
            _check_known(*known, generator.spec, len(labels))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts, total = [], Stats()
        with (
            _evaluating(generator),
            torch.inference_mode(),
            tqdm(total=len(labels), unit="img", disable=not progress, desc="sampling") as bar,
        ):
            for start in range(0, len(labels), batch_size):
                rows = torch.arange(start, min(start + batch_size, len(labels)))
                n = len(rows)
                if self.config.fixed_batch and n < batch_size:
                    rows = torch.cat([rows, rows[-1:].expand(batch_size - n)])
                noise = Noise(seeds.to(generator.device)[rows])
                clock = time.perf_counter()
                given = {} if known is None else {"known": (known[0][rows], known[1][rows])}
                tokens, stats = self.draw(generator, labels.to(generator.device)[rows], noise, **given)
                parts.append(tokens[:n])
                total = total + replace(stats, images=n, seconds=time.perf_counter() - clock)
                bar.update(n)
        return SampleOutput(concatenate(parts), total)


def _check_known(values: torch.Tensor, known_BL: torch.Tensor, spec: TokenSpec, n: int) -> None:
    """Refuse given tokens that aren't a row an image, or are no tokens of this kind."""
    if values.shape != (n, *spec.shape) or known_BL.shape != (n, spec.length):
        raise ValueError(
            f"known tokens of shape {tuple(values.shape)} and their mask of {tuple(known_BL.shape)} given for {n} "
            f"images: expected {(n, *spec.shape)} and {(n, spec.length)}"
        )
    given = known_BL.to(values.device).view(n, spec.length, *[1] * (values.ndim - 2))
    Tokens(values.where(given, 0), spec)  # the others are not read


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def default_sampler(generator: Generator) -> Sampler:
    """The plain sampler of a generator.

    Raises:
        ValueError: if no registered sampler works on it.
    """
    for name in SAMPLERS:
        if SAMPLERS[name].supports(generator):
            return SAMPLERS[name]()
    raise ValueError(f"no sampler works on a {generator.kind!r} generator")
