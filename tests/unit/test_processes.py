"""Two gloo processes train as one does: same losses, same weights, resumed onto either number of processes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlab.config import to_json
from genlab.hub import from_pretrained
from tests.unit.test_train import generator_run
from tests.unit.two_processes import train_until
from train import checkpoint

STEPS, BATCH = 50, 8
HALF = STEPS // 2 * BATCH
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, picture_folder, tiny_tokenizer):
    """All runs: `whole` of one process; the others over two, or half of each."""
    root = tmp_path_factory.mktemp("runs")
    plain = generator_run(picture_folder, tiny_tokenizer, images=STEPS * BATCH, save_every=STEPS * BATCH)
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, dropout=0.0))  # drawn a process
    todo = []
    train_until(plain, root / "whole", 0)
    train_until(plain, root / "one-two-ddp", HALF)
    shutil.copytree(root / "one-two-ddp", root / "one-two-fsdp")
    for parallel in ("ddp", "fsdp"):
        file = root / f"{parallel}.json"
        file.write_text(to_json(dataclasses.replace(plain, parallel=parallel, recompute=parallel == "fsdp")))
        for name, stop in ((parallel, 0), (f"two-one-{parallel}", HALF), (f"one-two-{parallel}", 0)):
            todo.append((str(file), str(root / name), stop))
    (root / "runs.json").write_text(json.dumps(todo))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/unit/two_processes.py"), str(root)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for parallel in ("ddp", "fsdp"):
        train_until(plain, root / f"two-one-{parallel}", 0)
    return root


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([line["loss"] for line in lines])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "two-one-ddp", "two-one-fsdp", "one-two-ddp", "one-two-fsdp"])
def test_over_two_processes_it_trains_as_one_does(runs, name):
    whole = losses(runs / "whole")
    assert whole[-10:].mean() < 0.95 * whole[:10].mean()  # it learns something to agree upon
    assert (losses(runs / name) - whole).abs().max() <= 1e-5
    one, two = (from_pretrained(runs / run / "model").state_dict() for run in ("whole", name))
    assert max((one[k].float() - two[k].float()).abs().max() for k in one) <= 1e-4


def test_split_weights_are_saved_in_parts_that_one_process_reads(runs):
    newest = checkpoint.candidates(runs / "fsdp" / "checkpoints")[0]
    parts = list(newest.glob("shard-*.safetensors"))
    assert len(parts) >= 2
    seen, state = checkpoint.read(newest)
    assert seen == STEPS * BATCH
    whole = checkpoint.read(checkpoint.candidates(runs / "whole" / "checkpoints")[0])[1]
    assert state["task"].keys() == whole["task"].keys()
    for name, value in whole["task"].items():
        assert torch.allclose(state["task"][name], value, atol=1e-4), name
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(newest)
