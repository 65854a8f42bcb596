"""The zoo's script: what it names exists, and comes after what it stands on."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import torch

from genlab.hub import shipped
from genlab.registry import model_class
from train.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "zoo.py"))


def test_every_model_has_its_recipes_and_follows_its_tokenizer(script):
    zoo = script["ZOO"]
    names = [entry.name for entry in zoo]
    assert len(set(names)) == len(names)
    for i, entry in enumerate(zoo):
        for stage in entry.stages:
            tokenizer = PRESETS[stage]().tokenizer
            assert not tokenizer or tokenizer in names[:i], f"{entry.name} comes before {tokenizer}"


def test_every_model_keeps_its_budget_of_bytes_and_all_keep_theirs(script):
    """Of what ships, by its files; of what is still to be trained, by its parameters."""
    zoo, page = script["ZOO"], (ROOT / "docs" / "zoo.md").read_text()
    total = 0.0
    for entry in zoo:
        config = PRESETS[entry.stages[-1]]().model
        with torch.device("meta"):
            state = model_class(config.kind)(config).state_dict()
        borrowed = {part for part, _ in entry.borrows}
        numbers = sum(v.numel() for k, v in state.items() if k.split(".")[0] not in borrowed)
        expected = numbers * (1 if entry.dtype == torch.int8 else 2) / 1e6
        assert expected < entry.budget, entry.name
        assert entry.megabytes <= entry.budget, entry.name
        assert f"| `{entry.name}` | " in page, "the table in docs/zoo.md: python scripts/zoo.py --sizes"
        total += entry.budget
    assert total <= script["BUDGET"] == 200
    beside = {name: folder for name, folder in shipped().items() if name not in {entry.name for entry in zoo}}
    assert sum(path.stat().st_size for folder in beside.values() for path in folder.glob("*")) < 1e5, beside


def test_every_card_has_its_figures_and_the_command_that_made_them(script):
    for entry in script["ZOO"]:
        if entry.megabytes:
            _, _, figures = (entry.folder / "README.md").read_text().partition("\n## Figures\n")
            found = re.search(r"\n    (python scripts/zoo.py|genlab) ", figures)
            assert found, f"{entry.name} is to be measured: python scripts/zoo.py {entry.name} --measure"


def test_a_model_beyond_its_budget_is_refused(script, tmp_path, tiny_tokenizer, monkeypatch):
    (tmp_path / "README.md").write_text("# x\n")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(tiny_tokenizer) / name).read_bytes())
    entry = dataclasses.replace(script["ZOO"][2], name="tiny", presets=("tiny",), budget=1e-3)
    monkeypatch.setitem(script["pack"].__globals__, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"tiny takes .* MB, its budget in scripts/zoo.py is 0.001"):
        script["pack"](entry, tmp_path)
    script["pack"](dataclasses.replace(entry, budget=1), tmp_path)
    assert "| `tiny` | 0." in script["sizes"]([dataclasses.replace(entry, budget=1)])
