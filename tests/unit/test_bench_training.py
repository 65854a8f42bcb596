"""`genlab bench training`: what it measures, and what it refuses."""

import pytest

from train import bench_training
from train.bench_training import TrainingBenchConfig, describe, measure, run


def test_a_row_of_the_table():
    """Real steps of a small preset; shares of a step are of its operations, and no more than the step."""
    row = measure("ecar-pixels-emoji64", TrainingBenchConfig(seconds=0.01, profiled=2, batch_size=2), keep=True)
    assert row["images_per_cpu_second"] > 0
    assert 0 < row["mfu"] < 1
    assert row["batch_size"] == 2
    assert min(row["shares"][kind] for kind in ("matrix products", "optimiser", "elementwise")) > 0
    table = describe({"presets": {"a preset": {**row, "kept_memory": 1.25}}})
    assert "| `a preset` | 2 |" in table
    assert "1.25x" in table
    assert "compiled" not in table
    wide = describe({"presets": {"a preset": {**row, "compiled": 1.5, "compiled_mfu": 0.25}}}).splitlines()
    assert wide[0].endswith("| compiled | MFU then |")
    assert wide[2].endswith("| 1.50x | 25% |")
    assert len({line.count("|") for line in wide}) == 1


def test_compiled_steps_stand_beside_the_others(monkeypatch):
    """Each preset is timed in processes of its own: as it is, handing memory back, compiled."""
    calls = []

    def apart(spawn, name, c, keep=True, compiled=False):
        calls.append((keep, compiled))
        return {"images_per_cpu_second": 30.0 if compiled else 20.0 if keep else 10.0, "mfu": 0.6 if compiled else 0.4}

    monkeypatch.setattr(bench_training, "_apart", apart)
    row = run(TrainingBenchConfig(presets=("ecar-pixels-emoji64",), compile=True))["presets"]["ecar-pixels-emoji64"]
    assert calls == [(True, False), (False, False), (True, True)]
    assert (row["mfu"], row["kept_memory"], row["compiled"], row["compiled_mfu"]) == (0.4, 2.0, 1.5, 0.6)


def test_unknown_presets_and_missing_starts_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="no preset nonsense"):
        run(TrainingBenchConfig(presets=("nonsense",)))
    monkeypatch.setattr(bench_training, "at_hand", lambda name: False)
    with pytest.raises(ValueError, match="flow-emoji64: what it starts from isn't there"):
        run(TrainingBenchConfig(presets=("flow-emoji64",)))
