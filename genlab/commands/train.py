"""`genlab train PRESET`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from genlab.processes import processes

from . import shared

HELP = """usage: genlab train PRESET [--out DIR] [--resume auto|never] [--device auto|cpu|cuda] [--dry-run] [options]
       genlab train --config runs/mine/config.json --out runs/again

Train a tokenizer or a generator. PRESET gives every setting; any can be changed by name, e.g.
--optim.lr 3e-4 --images 50000 --data.source path/to/images. `genlab train PRESET --help` lists them all.

  --out DIR          output folder (default runs/PRESET): config.json, metrics.jsonl, samples/, checkpoints/, model/
  --resume auto      go on from the newest whole checkpoint in DIR (default); `never` starts over
  --device NAME      auto (default), cpu, cuda
  --dry-run          build everything, run one small batch, print parameters, shapes and memory, train nothing
  --print-config     print the resolved config and stop
  --json             print the result as JSON

Stop with Ctrl-C or SIGTERM at any time: the state is saved, and the same command goes on.
"""


def _flag(argv: list[str], name: str) -> bool:
    if name in argv:
        argv.remove(name)
        return True
    return False


def main(argv: list[str]) -> int:
    """Parse, then train."""
    presets = shared.load("train.presets").PRESETS
    run = shared.load("train.config")
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP + "\npresets: " + ", ".join(presets))
        return 0
    argv = list(argv)
    out, resume = shared.take(argv, "--out", ""), shared.take(argv, "--resume", "auto")
    device, config_file = shared.take(argv, "--device", "auto"), shared.take(argv, "--config", "")
    dry, as_json = _flag(argv, "--dry-run"), _flag(argv, "--json")
    if resume not in ("auto", "never"):
        raise ValueError(f"--resume takes auto or never, got {resume!r}")
    if config_file:
        from genlab.config import load_json

        default = run.read_config(load_json(config_file), config_file)
    elif not argv or argv[0].startswith("-"):
        raise ValueError("name a preset first: genlab train PRESET [options]; `genlab list` shows them")
    else:
        default = presets[argv.pop(0)]()
    given = {word.partition("=")[0].replace("_", "-") for word in argv}
    if "--images" in given and "--cpu-minutes" not in given:  # or the number would count for nothing
        default = dataclasses.replace(default, cpu_minutes=0.0)
    config: Any = shared.parse(type(default), argv, prog=f"genlab train {default.name}", default=default)
    if device != "auto":
        shared.torch_device(device)
    loop = shared.load("train.loop")
    if dry:
        report = loop.dry_run(config)
        print(json.dumps(report, indent=2) if as_json else describe(report))
        return 0
    folder = Path(out or f"runs/{config.name}")
    try:
        model = loop.train(config, folder, resume=resume, device=None if device == "auto" else device)
    except loop.TrainingError as error:
        print(f"genlab train: {error}", file=sys.stderr)
        return 1
    if processes()[0] == 0:  # one process speaks
        print(json.dumps({"model": str(model)}) if as_json else f"trained: {model}")
    return 0


def describe(report: dict[str, Any]) -> str:
    """A dry run for people."""
    losses = ", ".join(f"{k} {v:.4f}" for k, v in report["loss"].items())
    return "\n".join(
        [
            f"preset            {report['config']['name']}",
            f"parameters        {report['parameters']:,} ({report['trained_parameters']:,} trained)",
            f"tokens            {report['spec']}",
            f"one small batch   {tuple(report['batch'])}: {losses}",
            f"training images   {report['training_images']:,} ({report['data_report']})",
            f"state in memory   {report['state_bytes'] / 2**20:.0f} MiB (weights, gradients, moments, average; "
            "activations on top)",
            f"small batch       {report['seconds_of_one_small_batch_fp32']:.2f} s forward and backward in float32",
        ]
    )
