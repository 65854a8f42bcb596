"""Distilled Decoding's sampler (Liu et al., arXiv 2412.17153): a student jumps, and may hand over to its teacher.

One step: the student says all tokens from noise. S steps: what it said of the first groups is kept, and it jumps
again from there, with the same noise. `teacher_groups` lets the teacher draw that many groups in front of the last
jump, by the map that the student has learnt and with the same noise: the more, the closer to the teacher's own image.
"""

from __future__ import annotations

from typing import Any

import torch

from genlab.code_flow import CodeFlow
from genlab.config import config
from genlab.generators.base import Condition, Generator
from genlab.generators.distilled import Distilled, MapConfig
from genlab.noise import Noise
from genlab.tokens import Tokens

from .base import Sampler, SamplerConfig, Stats


@config
class DistilledSamplerConfig(SamplerConfig):
    """Where the student jumps."""

    steps: int = 1
    """Jumps of the student, a network evaluation each."""
    starts: tuple[int, ...] = ()
    """The groups in front of which it jumps, the first being 0; empty: (k / steps)^(5/3) of the way, hence 0 and 80 of
    256 as published, or evenly over a generator's scales."""
    teacher_groups: int = 0
    """Groups in front of the last jump that the teacher draws, an evaluation each; with one step, the first ones. All
    groups: the teacher alone."""
    teacher: str = ""
    """The teacher, a MODEL; empty: the one that the student names."""


class DistilledSampler(Sampler):
    """A student of Distilled Decoding: one or a few jumps, mixed with its teacher if wanted."""

    name = "distilled"
    Config = DistilledSamplerConfig
    config: DistilledSamplerConfig
    exact = False
    _loaded: tuple[str, Any] | None = None

    @classmethod
    def supports(cls, generator: Generator) -> bool:
        """Students."""
        return isinstance(generator, Distilled)

    def starts(self, generator: Generator) -> list[int]:
        """The groups in front of which the student jumps.

        Raises:
            ValueError: for steps, starts or teacher's groups that this generator has no room for.
        """
        c, n = self.config, generator.n_groups
        power = 1.0 if generator.spec.order == "scale" else 5 / 3
        starts = list(c.starts) or [int(n * (k / c.steps) ** power) for k in range(c.steps)]
        if not 1 <= c.steps <= n or len(starts) != c.steps:
            raise ValueError(f"steps must be in 1..{n}, and starts as many; got {c.steps} and {starts}")
        if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= n:
            raise ValueError(f"starts must rise from 0 to less than {n}, got {starts}: give others with starts=[0, …]")
        room = n if c.steps == 1 else starts[-1]
        if not 0 <= c.teacher_groups <= room:
            raise ValueError(f"teacher_groups must be in 0..{room} with these starts {starts}, got {c.teacher_groups}")
        return [c.teacher_groups] if c.steps == 1 else starts

    def draw(self, generator: Any, labels: Condition, noise: Noise) -> tuple[Tokens, Stats]:
        """One batch."""
        c, starts = self.config, self.starts(generator)
        state = generator.start(labels, c.guidance)
        last, stats = starts[-1], Stats()
        hand_over = last - c.teacher_groups
        for stop in [*(min(s, hand_over) for s in starts[1:-1]), hand_over, generator.n_groups]:
            if stop == generator.n_groups and c.teacher_groups:
                stats = self._teach(generator, state, labels, noise, last)
            if stop <= state.group:
                continue
            event = generator.predict(state).sample(noise.at(position=generator.rest(state)))
            generator.commit(state, event[:, : generator.ends[stop - 1] - generator.ends[-1] + event.shape[1]])
        stats.model_calls += state.calls
        stats.rows += state.rows_computed
        return generator.tokens(state), stats

    def _teach(self, student: Any, state: Any, labels: Condition, noise: Noise, stop: int) -> Stats:
        """Let the teacher draw the groups up to `stop`."""
        begin, student_map = state.group, student.config.map
        teacher = self._load(student)
        teacher_state = teacher.start(labels, student_map.guidance)
        for g in range(begin):
            teacher.commit(teacher_state, state.ids_BLK[:, student.where(g)])
        for event in follow(teacher, teacher_state, student.flow, student_map, student.noise_of(noise), stop):
            student.commit(state, event)
        return Stats(model_calls=teacher_state.calls, rows=teacher_state.rows_computed)

    def _load(self, student: Any) -> Any:
        from genlab.hub import from_pretrained

        name = self.config.teacher or student.config.teacher
        if not name:
            raise ValueError("this student names no teacher; give one with --set teacher=MODEL")
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = name, from_pretrained(name)
        teacher = self._loaded[1]
        if teacher.spec != student.spec:
            raise ValueError(f"{name} makes {teacher.spec.describe()}: it is not this student's teacher")
        return teacher.to(student.device)


def follow(teacher: Any, state: Any, flow: CodeFlow, how: MapConfig, noise_BLM: torch.Tensor, stop: int) -> Any:
    """Let a teacher draw group after group by the map from noise, up to group `stop`; yields the events.

    Args:
        teacher: a generator of `Categorical` groups that follow one another.
        state: its state; gets the commits.
        flow: noise to ids.
        how: shapes the distributions.
        noise_BLM: noise (B, L, K C) of all places.
        stop: the group to end before.
    """
    for g in range(state.group, stop):
        event = flow.ids(how.shape(teacher.predict(state)), noise_BLM[:, teacher.where(g)])
        teacher.commit(state, event)
        yield event
