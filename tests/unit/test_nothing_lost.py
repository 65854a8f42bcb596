"""What a run survives: docs/reliability.md has a row for each."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.unit.test_train import equal, tokenizer_run, weights
from train import checkpoint
from train.loop import TrainingError, restore, train, writing
from train.tasks import build_task


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"task": {"w": torch.randn(64, 64, generator=generator)}, "step": seed}


@pytest.fixture
def two(tmp_path):
    """A folder with two whole checkpoints."""
    for seen in (1, 2):
        checkpoint.write(tmp_path, seen, state(seen), keep=2)
    return tmp_path


def spoil(two, spoiling):
    """Spoil the newest checkpoint; what is read then must be the one before, with a word of why."""
    spoiling(checkpoint.candidates(two)[0])
    seen, was, complaints = checkpoint.newest(two)
    assert seen == 1
    assert torch.equal(was["task"]["w"], state(1)["task"]["w"])
    assert len(complaints) == 1
    return complaints[0]


def test_whole_checkpoints_are_read(two):
    seen, was, complaints = checkpoint.newest(two)
    assert (seen, complaints) == (2, [])
    assert torch.equal(was["task"]["w"], state(2)["task"]["w"])


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST, checkpoint.SUMS])
def test_a_flipped_bit_anywhere_is_found(two, name):
    newest, rng = checkpoint.candidates(two)[0], random.Random(0)
    whole = (newest / name).read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (newest / name).write_bytes(data)
        assert checkpoint.newest(two)[0] == 1
    (newest / name).write_bytes(whole)
    assert checkpoint.newest(two)[0] == 2


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST, checkpoint.SUMS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_found(two, name, share):
    def cut(newest):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: int(len(data) * share)])

    assert "damaged" in spoil(two, cut)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST])
def test_a_missing_file_is_found(two, name):
    assert "damaged" in spoil(two, lambda newest: (newest / name).unlink())


class Payload:
    """Runs when unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_offered_as_a_checkpoint_is_refused_and_nothing_runs(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def swap(newest):
        (newest / checkpoint.TENSORS).write_bytes(pickle.dumps(Payload()))
        sums = "".join(f"{checkpoint.sha256(newest / n)}  {n}\n" for n in (checkpoint.MANIFEST, checkpoint.TENSORS))
        (newest / checkpoint.SUMS).write_text(sums)  # its hash is right

    assert "damaged" in spoil(two, swap)
    assert not (tmp_path / "executed").exists()


def test_a_later_format_is_refused(two):
    def later(newest):
        manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
        (newest / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
        sums = "".join(f"{checkpoint.sha256(newest / n)}  {n}\n" for n in (checkpoint.MANIFEST, checkpoint.TENSORS))
        (newest / checkpoint.SUMS).write_text(sums)

    assert "has format 99, this genlab reads" in spoil(two, later)


def test_wrong_shapes_are_named():
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = {"task": other.state_dict(), "ema": other.state_dict(), "optimizer": {"state": {}, "param_groups": []}}
    with pytest.raises(ValueError, match="does not fit the model of its own config"):
        restore(model, model, optimizer, saved, where="here")


FULL = """
import resource, sys, torch
from pathlib import Path
from train import checkpoint
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    checkpoint.write(folder, 3, {"task": {"w": torch.zeros(64, 64)}}, keep=2)
except OSError as error:
    print("refused:", error)
"""


def test_no_room_for_a_checkpoint_leaves_those_before(two):
    """A limit on the size of files stands for a full disk: the same write fails part of the way."""
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run([sys.executable, "-c", FULL, str(two)], capture_output=True, text=True, check=False)
    assert "refused:" in done.stdout, done.stderr
    assert sorted(p.name for p in two.iterdir()) == ["000000001", "000000002"]
    assert checkpoint.newest(two)[0] == 2


def test_what_cannot_be_written_is_said():
    with pytest.raises(TrainingError, match="make room, and the same command goes on"), writing("a checkpoint"):
        raise OSError(28, "No space left on device")


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, picture_folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another --out"):
        train(tokenizer_run(picture_folder), tmp_path / "file" / "run", device="cpu")


@pytest.fixture
def mounted(tmp_path):
    """Mount a small tmpfs with these options; skips where that is not allowed."""
    folders = []

    def mount(options):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs can't be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_and_goes_on_when_there_is_room(mounted, picture_folder, tmp_path):
    disk = mounted("size=2m")
    config = tokenizer_run(picture_folder, images=32)
    task = build_task(config)
    load, filler = task.load, disk / "filler"

    def fills(start, n):
        if start == 24:  # the checkpoint at 16 is written, the one at 32 isn't yet
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return load(start, n)

    task.load = fills
    with pytest.raises(TrainingError, match="could not be written"):
        train(config, disk / "run", device="cpu", task=task)
    assert checkpoint.newest(disk / "run" / "checkpoints")[::2] == (16, [])
    filler.unlink()
    whole = weights(train(config, tmp_path / "whole", device="cpu"))
    assert equal(weights(train(config, disk / "run", device="cpu")), whole)


def test_a_write_that_finds_no_space_leaves_what_was_there(tmp_path, picture_folder, monkeypatch):
    """The same everywhere: the error that a full disk gives, at the second checkpoint's last file."""
    write_text = Path.write_text

    def full(path, text, *arguments, **options):
        if path.name == checkpoint.SUMS and "000000032" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, *arguments, **options)

    config = tokenizer_run(picture_folder, images=32)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(TrainingError, match="No space left on device"):
            train(config, tmp_path / "run", device="cpu")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000016"]
    train(config, tmp_path / "run", device="cpu")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[::2] == (32, [])


def test_a_read_only_output_folder_is_refused(request, tmp_path, picture_folder):
    if os.geteuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    else:  # root may write anywhere but to a read-only file system
        folder = request.getfixturevalue("mounted")("ro")
    for out in (folder, folder / "run"):
        with pytest.raises(ValueError, match="choose another --out"):
            train(tokenizer_run(picture_folder), out, device="cpu")


def test_a_config_of_another_version_is_named(tmp_path, picture_folder):
    config = tokenizer_run(picture_folder, images=16)
    train(config, tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "warp": 9}))
    with pytest.raises(ValueError, match=r"run/config.json is not a valid TrainConfig:\n  warp: "):
        train(config, tmp_path / "run", device="cpu")
    assert json.loads(path.read_text())["warp"] == 9


def test_ctrl_c_saves_and_twice_ends_at_once(tmp_path, picture_folder):
    config = tokenizer_run(picture_folder, images=64)
    whole = weights(train(config, tmp_path / "whole", device="cpu"))

    def interrupted(at, times):
        task = build_task(config)
        forward = task.forward

        def presses(batch, images_seen):
            for _ in range(times if images_seen == at else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return forward(batch, images_seen)

        task.forward = presses
        return task

    with pytest.raises(SystemExit) as end:
        train(config, tmp_path / "run", device="cpu", task=interrupted(24, 1))
    assert end.value.code == 130
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 32
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", device="cpu", task=interrupted(40, 2))
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[::2] == (32, [])
    assert equal(weights(train(config, tmp_path / "run", device="cpu")), whole)


KILLED = """
import sys, torch
from pathlib import Path
from train import checkpoint
print("ready", flush=True)
seen = int(sys.argv[2])
while True:
    seen += 1
    checkpoint.write(Path(sys.argv[1]), seen, {"task": {"w": torch.full((256, 256), float(seen))}}, keep=2)
"""


def kill_while_writing(folder, times, rng):
    """`kill -9` a process that does nothing but write checkpoints, at random moments; each time all must be well."""
    last = 0
    for _ in range(times):
        command = [sys.executable, "-c", KILLED, str(folder), str(last)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0.05, 0.4))
        process.kill()
        process.wait()
        process.stdout.close()
        found = checkpoint.newest(folder)
        if found is None:
            assert last == 0, "checkpoints were lost"
            continue
        seen, was, complaints = found
        assert not complaints, "a checkpoint under its final name must be whole"
        assert seen >= last
        assert torch.equal(was["task"]["w"], torch.full((256, 256), float(seen)))
        last = seen
    assert last > 0


@pytest.mark.parametrize("times", [3])
def test_killed_while_writing(tmp_path, times):
    kill_while_writing(tmp_path, int(os.environ.get("GENLAB_KILLS", times)), random.Random(0))
