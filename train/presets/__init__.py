"""Recipes by name, `{system}-{variant}-{data}{px}`: plain functions that return a `TrainConfig`.

The emoji64 recipes are what the shipped weights were trained with.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from genlab.registry import Registry

from ..config import TrainConfig

PRESETS = Registry("preset", {})
_FILES = (
    "continuous", "continuous_generators", "discrete", "discrete_generators", "distilled", "resgen", "flextok", "seed",
    "seed_llama", "divot",
)  # fmt: skip


def preset(name: str) -> Callable[[Callable[[str], TrainConfig]], Callable[[str], TrainConfig]]:
    """Register a recipe; the function takes its own name."""

    def add(make: Callable[[str], TrainConfig]) -> Callable[[str], TrainConfig]:
        named = functools.partial(make, name)
        PRESETS.register(name)(functools.update_wrapper(named, make))
        return make

    return add


for _file in _FILES:
    importlib.import_module(f".{_file}", __name__)
