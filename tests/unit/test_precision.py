"""`auto` takes bfloat16 only where the hardware multiplies it fast; a run goes on in what it began with."""

import dataclasses
import json

import pytest
import torch

from genlab import precision
from genlab.config import to_json
from genlab.hub import from_pretrained
from tests.unit.test_train import tokenizer_run
from train.loop import train


@pytest.mark.parametrize(
    ("units", "has"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": True}, True),
        ({"avx10_2": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_what_a_cpu_has_decides(monkeypatch, units, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert precision.has_bf16() is has
    assert precision.torch_dtype("auto") == (torch.bfloat16 if has else torch.float32)
    assert precision.torch_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="got 'float16'"):
        precision.torch_dtype("float16")


def test_an_older_torch_is_asked_for_the_units_it_knows(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert precision.has_bf16()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not precision.has_bf16()


def test_auto_is_settled_when_a_run_begins_and_stays(tmp_path, picture_folder, monkeypatch):
    config = tokenizer_run(picture_folder, images=16, precision="auto")
    out = tmp_path / "run"

    def used():
        return json.loads((out / "config.json").read_text())["precision"]

    monkeypatch.setattr("train.loop.has_bf16", lambda device: False)
    model = train(config, out, device="cpu")
    assert used() == "fp32"
    assert from_pretrained(model).extra["trained"]["precision"] == "fp32"
    assert "in fp32" in (model / "README.md").read_text()
    monkeypatch.setattr("train.loop.has_bf16", lambda device: True)  # another machine
    train(config, out, device="cpu")
    assert used() == "fp32"
    with pytest.raises(ValueError, match="differs in precision"):
        train(dataclasses.replace(config, precision="bf16"), out, device="cpu")
    train(config, out, device="cpu", resume="never")
    assert used() == "bf16"
    (out / "config.json").write_text(to_json(config))  # as `--print-config` gives it
    train(config, out, device="cpu")
    assert used() == "bf16"
    monkeypatch.setattr("train.loop.has_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="no fast bf16"):
        train(dataclasses.replace(config, precision="bf16"), out, device="cpu")
