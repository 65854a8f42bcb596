"""Evaluation: extractors, streaming statistics, Fréchet distances and their kin, protocols and reports.

`evaluate(generated, reference)` gives a `Result`; `make_statistics(images)` gives `Statistics`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EvalConfig, StatsConfig, run_eval, run_stats
    from .harness import evaluate, make_statistics
    from .neighbours import nearest, nearest_pixels
    from .page import write_html
    from .reconstruction import reconstruction_figures
    from .result import Figure, Result, tabulate
    from .selftest import self_test
    from .sources import GeneratedImages
    from .statistics import RunningStatistics, Statistics, load_statistics

_HOME = {
    "EvalConfig": "config",
    "StatsConfig": "config",
    "run_eval": "config",
    "run_stats": "config",
    "evaluate": "harness",
    "make_statistics": "harness",
    "nearest": "neighbours",
    "nearest_pixels": "neighbours",
    "write_html": "page",
    "reconstruction_figures": "reconstruction",
    "Figure": "result",
    "Result": "result",
    "tabulate": "result",
    "self_test": "selftest",
    "GeneratedImages": "sources",
    "RunningStatistics": "statistics",
    "Statistics": "statistics",
    "load_statistics": "statistics",
}
__all__ = [
    "EvalConfig",
    "Figure",
    "GeneratedImages",
    "Result",
    "RunningStatistics",
    "Statistics",
    "StatsConfig",
    "evaluate",
    "load_statistics",
    "make_statistics",
    "nearest",
    "nearest_pixels",
    "reconstruction_figures",
    "run_eval",
    "run_stats",
    "self_test",
    "tabulate",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
