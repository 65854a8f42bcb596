"""The zoo's script: what it names exists, and comes after what it stands on."""

import runpy
from pathlib import Path

from train.presets import PRESETS

SCRIPT = Path(__file__).parents[2] / "scripts" / "zoo.py"


def test_every_model_has_its_recipes_and_follows_its_tokenizer():
    zoo = runpy.run_path(str(SCRIPT))["ZOO"]
    names = [entry.name for entry in zoo]
    assert len(set(names)) == len(names)
    for i, entry in enumerate(zoo):
        for stage in entry.stages:
            tokenizer = PRESETS[stage]().tokenizer
            assert not tokenizer or tokenizer in names[:i], f"{entry.name} comes before {tokenizer}"
