"""Recipes of Distilled Decoding's students (Liu et al., arXiv 2412.17153); their teachers are MODELs.

At 256 tokens, 64 at once, a pair costs about 0.15 CPU seconds in fp32, two thirds of them the guided teacher's, most of
that its cache's way from memory. In 30 minutes of bf16 a student sees 56,000, each nine times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.distilled import DistilledConfig

from ..config import OptimConfig, TrainConfig, run_config
from . import PRESETS, preset


def _student(name: str, teacher: str, code_dim: int, pairs: int = 4_096, minutes: float = 25) -> TrainConfig:
    net: Any = PRESETS[teacher]().model
    if hasattr(net, "dropout"):
        net = dataclasses.replace(net, dropout=0.0)
    return run_config(
        name=name,
        model=DistilledConfig(net=net, code_dim=code_dim, teacher=teacher, pairs=pairs),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, warmup=2_000),
        images=100_000,
        cpu_minutes=minutes,
        batch_size=16,
        ema=0.9995,
        threads=1,
    )


@preset("dd-llamagen-emoji64")
def dd_llamagen_emoji64(name: str) -> TrainConfig:
    """A student of `llamagen-emoji64`: 256 tokens in one step."""
    return _student(name, "llamagen-emoji64", 8, pairs=6_144, minutes=30)


@preset("dd-elm-2-6-emoji64")
def dd_elm_2_6_emoji64(name: str) -> TrainConfig:
    """A student of `elm-2-6-emoji64`: noise flows to bits."""
    return _student(name, "elm-2-6-emoji64", 6)


@preset("dd-var-emoji64")
def dd_var_emoji64(name: str) -> TrainConfig:
    """A student of `var-emoji64`: six scales in one step."""
    return _student(name, "var-emoji64", 16, minutes=19)


@preset("dd-llamagen-text-emoji64")
def dd_llamagen_text_emoji64(name: str) -> TrainConfig:
    """A student of `llamagen-text-emoji64`, by caption."""
    return _student(name, "llamagen-text-emoji64", 8)
