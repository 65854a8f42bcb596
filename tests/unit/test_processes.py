"""Two gloo processes train as one does: same losses, same weights, resumed onto either number of processes; and they
read, encode, draw and judge the same images, each its share."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genlab.cli import main
from genlab.config import to_json
from genlab.data import open_images
from genlab.data.cache import cached_tokens
from genlab.hub import from_pretrained
from genlab.pictures import to_float
from genlab.registry import GENERATORS, TOKENIZERS
from tests.unit.families import family_runs
from tests.unit.test_train import generator_run, tokenizer_run
from tests.unit.two_processes import train_until
from train import checkpoint

STEPS, BATCH = 50, 8
ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "two": [("fsdp", 2, 17), ("fsdp", 2, 34), ("ddp", 2, 50)],
    "two-one": [("fsdp", 2, 17), ("ddp", 1, 50)],
    "one-two": [("ddp", 1, 17), ("ddp", 2, 34), ("fsdp", 2, 50)],
}
"""Each in parts: how, on how many processes, up to which step."""
SHARDED = 24
"""Images in the shards: a run over them sees each once."""
SHARD_RUNS = [("two", 0), ("two-one", BATCH), ("one-two", 0)]
"""Runs over shards of two processes, and after how many images they are stopped."""
SEEDS = "0-12"
JUDGED = 70
"""Images: a tile of 64 and a part of one."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, picture_folder, tiny_tokenizer, tiny_xar):
    """All runs, `whole` of one process; and what two processes and one drew."""
    root = tmp_path_factory.mktemp("runs")
    plain = generator_run(picture_folder, tiny_tokenizer, images=STEPS * BATCH, save_every=STEPS * BATCH)
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, dropout=0.0))  # drawn a process

    def alone(name, stop):
        train_until(plain, root / name, stop * BATCH % (STEPS * BATCH))

    alone("whole", STEPS)
    todo = []
    for name, parts in RUNS.items():
        for parallel, processes, stop in parts:
            if processes == 2:
                file = root / f"{parallel}.json"
                how = {"parallel": parallel, "recompute": parallel == "fsdp"}
                file.write_text(to_json(dataclasses.replace(plain, **how)))
                todo.append((str(file), str(root / name), stop * BATCH % (STEPS * BATCH)))
        if parts[0][1] == 1:
            alone(name, parts[0][2])
    shards = root / "shards"
    shards.mkdir()
    for i, file in enumerate(sorted((picture_folder / "train").rglob("*.png"))):
        with tarfile.open(shards / f"train-{i % 3:06d}.tar", "a") as shard:
            shard.add(file, f"{i:03d}.png")
    read = tokenizer_run(shards, images=SHARDED, batch_size=BATCH, save_every=0, log_every=BATCH)
    (root / "shards.json").write_text(to_json(read))
    read_alone = {"one": train_until(read, root / "read" / "one", 0)}
    train_until(read, root / "read" / "one-two", BATCH)
    todo += [(str(root / "shards.json"), str(root / "read" / name), stop) for name, stop in SHARD_RUNS]
    families = family_runs(root / "families", picture_folder)
    for name, config in families.items():
        file = root / "families" / f"{name}.json"
        file.write_text(to_json(dataclasses.replace(config, parallel="fsdp")))
        todo.append((str(file), str(root / "families" / "two" / name), 0))
        train_until(config, root / "families" / "one" / name, 0)
    (root / "runs.json").write_text(json.dumps(todo))
    words = ["sample", str(tiny_xar), "--seeds", SEEDS, "--set", "steps=2", "--batch-size", "4", "--device", "cpu"]
    judge = ["eval", "--model", str(tiny_xar), "--set", "steps=2", "--n", str(JUDGED), "--batch-size", "16"]
    judge += ["--reference", f"{picture_folder}:heldout", "--like", f"{picture_folder}:heldout", "--device", "cpu"]
    commands = [[*words, "--out", str(root / "drawn")], [*words, "--grid", str(root / "two.png")]]
    commands += [[*judge, "--json", str(root / "judged-two.json")]]
    (root / "tokens.json").write_text(json.dumps([str(tiny_tokenizer), str(picture_folder)]))
    (root / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/unit/two_processes.py"), str(root)],
        capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GENLAB_CACHE": str(root / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for name, parts in RUNS.items():
        if parts[-1][1] == 1:
            alone(name, parts[-1][2])
    read_alone["two-one"] = train_until(read, root / "read" / "two-one", 0)
    (root / "read-alone.json").write_text(json.dumps(read_alone))
    assert main([*words, "--out", str(root / "alone"), "--grid", str(root / "one.png")]) == 0
    assert main([*judge, "--json", str(root / "judged-one.json")]) == 0
    return root


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([line["loss"] for line in lines])


@pytest.mark.parametrize("name", RUNS)
def test_over_two_processes_it_trains_as_one_does(runs, name):
    whole = losses(runs / "whole")
    assert whole[-10:].mean() < 0.95 * whole[:10].mean()  # it learns something to agree upon
    assert (losses(runs / name) - whole).abs().max() <= 1e-5
    one, two = (from_pretrained(runs / run / "model").state_dict() for run in ("whole", name))
    assert max((one[k].float() - two[k].float()).abs().max() for k in one) <= 1e-4


def test_every_family_trains_with_its_weights_split(runs):
    """By FSDP2, two steps: the losses and gradients of one process."""
    names = {path.name for path in (runs / "families" / "one").iterdir()}
    assert names >= {*GENERATORS, *TOKENIZERS} - {"pixels"}  # which has nothing to train
    for name in names:
        one, two = (
            [json.loads(line) for line in (runs / "families" / how / name / "metrics.jsonl").open()]
            for how in ("one", "two")
        )
        assert len(one) == len(two) == 2, name
        for a, b in zip(one, two, strict=True):  # measured: at most 1e-6, and 4e-4 of the norm
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3), name
            assert b.get("nats", 0) == pytest.approx(a.get("nats", 0), abs=1e-5), name  # of errors met on the way


def test_shards_are_read_once_by_whom_they_concern(runs):
    """Each image in one process, for its part of a batch; in one process's order; after a stop, what comes next."""
    alone = json.loads((runs / "read-alone.json").read_text())
    first, second = did(runs, "read")

    def in_order(*loads):
        """Files by the number of the image, of the run's first epoch."""
        parts = {int(start): files for own in loads for start, files in own.items() if int(start) < SHARDED}
        for start, files in parts.items():
            assert not [at for at in range(start + 1, start + len(files)) if at in parts]
        return {start + i: file for start, files in parts.items() for i, file in enumerate(files)}

    whole = in_order(alone["one"])
    assert sorted(whole) == list(range(SHARDED))
    assert len(set(whole.values())) == SHARDED
    assert len({file.partition("::")[0] for file in whole.values()}) == 3
    mine, other = in_order(first["two"]), in_order(second["two"])
    assert len(mine) == len(other) == SHARDED // 2
    assert not set(mine.values()) & set(other.values())
    assert mine | other == whole
    rest = in_order(alone["two-one"])  # stopped as two processes, gone on as one
    assert 0 < len(rest) < SHARDED
    assert rest == {at: file for at, file in whole.items() if at >= min(rest)}
    seen = {at: file for at, file in in_order(first["two-one"], second["two-one"]).items() if at < min(rest)}
    assert seen | rest == whole
    rest = in_order(first["one-two"]) | in_order(second["one-two"])
    assert 0 < min(rest) < SHARDED
    assert rest == {at: file for at, file in whole.items() if at >= min(rest)}


def test_split_weights_are_saved_in_parts_that_one_process_reads(runs):
    newest = checkpoint.candidates(runs / "one-two" / "checkpoints")[0]
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


def test_two_processes_share_the_drawing(runs):
    two, one = (json.loads((runs / folder / "manifest.json").read_text()) for folder in ("drawn", "alone"))
    assert two["stats"]["images"] == one["stats"]["images"] == 26  # drawn once, counted once
    assert two["stats"]["rows"] == one["stats"]["rows"]
    names = sorted(p.name for p in (runs / "alone").glob("*.png"))
    assert len(names) == 26
    assert sorted(p.name for p in (runs / "drawn").glob("*.png")) == names
    pairs = [(runs / "drawn" / n, runs / "alone" / n) for n in names] + [(runs / "two.png", runs / "one.png")]
    for pair in pairs:
        a, b = (np.asarray(Image.open(path)).astype(int) for path in pair)
        assert abs(a - b).max() <= 1


def did(runs, what):
    return [json.loads((runs / f"did-{rank}.json").read_text())[what] for rank in (0, 1)]


def test_two_processes_share_the_judging(runs):
    two, one = (json.loads((runs / f"judged-{n}.json").read_text()) for n in ("two", "one"))
    assert two["figures"] == one["figures"]
    assert two["generated"]["n"] == JUDGED
    drawn = [sum(own) for own in did(runs, "drawn")]
    assert sum(drawn) == JUDGED + 26 + 26  # each image once: those judged, and two grids of 26
    assert drawn == [64 + 14 + 14, JUDGED - 64 + 12 + 12]


def test_two_processes_share_the_encoding(runs, tiny_tokenizer, picture_folder, monkeypatch):
    files = {p.name: p for p in (runs / "cache" / "tokens").glob("*.safetensors")}
    assert not [p for p in (runs / "cache" / "tokens").iterdir() if p.is_dir()]  # no parts are left
    assert [sum(own) for own in did(runs, "encoded")] == [24, 24]  # 24 images and their mirror images, by fives
    monkeypatch.setenv("GENLAB_CACHE", str(runs / "alone-cache"))
    tokenizer, images = from_pretrained(tiny_tokenizer), open_images(picture_folder, "heldout", 16)
    alone = cached_tokens(tokenizer, images, flip=True, batch_size=5)
    (path,) = (runs / "alone-cache" / "tokens").iterdir()
    assert files[path.name].read_bytes() == path.read_bytes()
    x = to_float(images.batch(range(24)))
    with torch.inference_mode():
        assert torch.allclose(alone, tokenizer.encode(torch.cat([x, x.flip(-1)])).values, atol=1e-5)
