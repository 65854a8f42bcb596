"""Replay recorded outputs of the official code of each system.

    python -m tests.parity.replay FILE [FILE …]

One line a file, `system case max|Δ|=… ok|FAIL`; exit 1 if any fails or names what the replayer doesn't know.
Tolerance: 1e-4 of the output's largest magnitude; integers must be equal.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from .fill import fill

TOLERANCE = 1e-4
# system, or system-case -> module with one function `{case}(config, state, inputs) -> {output name: tensor}` a case
SYSTEMS = {
    "xar": "tests.parity.xar",
    "mar": "tests.parity.mar",
    "kl_vae": "tests.parity.kl_vae",
    "llamagen": "tests.parity.llamagen",
    "elm": "tests.parity.elm",
    "var": "tests.parity.var",
    "llamagen-vq": "tests.parity.llamagen_vq",
    "elm-bae": "tests.parity.elm_bae",
    "var-vq": "tests.parity.var_vq",
    "flextok": "tests.parity.flextok",
    "divot": "tests.parity.divot",
    "seed": "tests.parity.seed",
}


def replay(path: str | Path) -> tuple[str, bool]:
    """The line for one file, and whether it passes."""
    with safe_open(str(path), "pt") as file:
        meta = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    system, case = meta["system"], meta["case"]
    path_of = SYSTEMS.get(f"{system}-{case}") or SYSTEMS.get(system)
    module = importlib.import_module(path_of) if path_of else None
    run = getattr(module, case.replace("-", "_"), None)
    if run is None:
        return f"{system} {case} unknown to the replayer FAIL", False
    inputs = {k.removeprefix("in."): v for k, v in tensors.items() if k.startswith("in.")}
    wanted = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.")}
    config = json.loads(meta["config"]) | {"note": meta.get("note", "")}
    torch.manual_seed(0)
    with torch.no_grad():
        got = run(config, fill(json.loads(meta["shapes"]), int(meta["seed"])), inputs)
    if set(got) != set(wanted):
        return f"{system} {case} outputs {sorted(got)}, recorded {sorted(wanted)} FAIL", False
    worst, passed = 0.0, bool(wanted)
    for name, want in wanted.items():
        have = got[name]
        if have.shape != want.shape:
            return (
                f"{system} {case} {name} has shape {tuple(have.shape)}, recorded {tuple(want.shape)} FAIL",
                False,
            )
        exact = not want.is_floating_point() or name == "codes"
        delta = float((have.double() - want.double()).abs().max())
        limit = 0.0 if exact else TOLERANCE * float(want.abs().max())
        worst, passed = max(worst, delta), passed and delta <= limit  # NaN fails the comparison
    return f"{system} {case} max|Δ|={worst:.2e} {'ok' if passed else 'FAIL'}", passed


def main(paths: list[str]) -> int:
    """Replay the files; 0 if all pass."""
    if not paths:
        print(__doc__)
        return 1
    passed = True
    for path in paths:
        try:
            line, ok = replay(path)
        except Exception as error:
            line, ok = f"{Path(path).name} {type(error).__name__}: {error} FAIL", False
        print(line)
        passed = passed and ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
