"""Every recorded case replays, and the replayer can fail."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .replay import main, replay

CASES = sorted((Path(__file__).parent / "cases").glob("*.safetensors"))


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case_replays(path):
    line, passed = replay(path)
    assert passed, line


def _rewrite(source: Path, target: Path, *, meta=(), nudge=0.0):
    with safe_open(str(source), "pt") as file:
        info = {**file.metadata(), **dict(meta)}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for k in tensors:
        if k.startswith("out.") and nudge:
            tensors[k] = tensors[k] + nudge * tensors[k].abs().max()
    save_file(tensors, target, metadata=info)
    return target


def test_a_wrong_output_fails(tmp_path, capsys):
    source = next(p for p in CASES if p.stem == "xar-velocity")
    wrong = _rewrite(source, tmp_path / "wrong.safetensors", nudge=3e-4)
    assert main([str(wrong)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_other_weights_fail(tmp_path):
    source = next(p for p in CASES if p.stem == "xar-velocity")
    assert not replay(_rewrite(source, tmp_path / "w.safetensors", meta={"seed": "1"}))[1]


@pytest.mark.parametrize("meta", [{"system": "nobody"}, {"case": "nothing"}, {"config": json.dumps({})}])
def test_unknown_cases_fail(tmp_path, meta, capsys):
    source = next(p for p in CASES if p.stem == "xar-velocity")
    assert main([str(_rewrite(source, tmp_path / "u.safetensors", meta=meta))]) == 1


def test_nan_fails(tmp_path):
    save_file({"in.x": torch.zeros(1)}, tmp_path / "broken.safetensors")
    assert main([str(tmp_path / "broken.safetensors")]) == 1
