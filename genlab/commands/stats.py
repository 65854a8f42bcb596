"""`genlab stats --images SOURCE --out ref.npz`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from genlab.processes import processes

from . import shared


def main(argv: list[str]) -> int:
    """Compute reference statistics and write them."""
    configs = shared.load("eval.config")
    argv = positional(argv, "--images")
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    c: Any = shared.parse(configs.StatsConfig, argv, prog="genlab stats")
    shared.require_positive(c, "n", "batch_size")
    c = dataclasses.replace(c, device=str(shared.torch_device(c.device)))
    statistics = configs.run_stats(c, progress=not as_json)
    if processes()[0] > 0:  # one process speaks
        return 0
    line = {"out": str(c.out), "images": int(statistics.n), "dimensions": int(statistics.mean_D.shape[0])}
    print(json.dumps(line) if as_json else f"wrote {c.out}: {line['images']:,} images, {line['dimensions']} dimensions")
    return 0


def positional(argv: list[str], option: str) -> list[str]:
    """Let the first word stand for `option`."""
    return [option, *argv] if argv and not argv[0].startswith("-") else argv
