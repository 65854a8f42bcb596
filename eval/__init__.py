"""Evaluation: extractors, streaming statistics, Fréchet distances and their kin, protocols and reports.

`evaluate(generated, reference)` gives a `Result`; `make_statistics(images)` gives `Statistics`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import evaluate, make_statistics
    from .neighbours import nearest, nearest_pixels
    from .result import Figure, Result, tabulate
    from .statistics import RunningStatistics, Statistics, load_statistics

_HOME = {
    "evaluate": "harness",
    "make_statistics": "harness",
    "nearest": "neighbours",
    "nearest_pixels": "neighbours",
    "Figure": "result",
    "Result": "result",
    "tabulate": "result",
    "RunningStatistics": "statistics",
    "Statistics": "statistics",
    "load_statistics": "statistics",
}
__all__ = [
    "Figure",
    "Result",
    "RunningStatistics",
    "Statistics",
    "evaluate",
    "load_statistics",
    "make_statistics",
    "nearest",
    "nearest_pixels",
    "tabulate",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
