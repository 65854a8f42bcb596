"""Features on disk: a real kill, worker processes, the cache's limit, torchrun."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# the tiny extractor and its metrics
from test_eval_harness import SOURCE, cache, folder, images

import eval as E
from eval.features import EXTRACTORS
from eval.sources import GeneratedImages
from eval.store import TILE, cache_limit, evict, in_use

__all__ = ["cache"]  # a fixture: every test has a cache of its own
ROOT = str(Path(E.__file__).parents[1])


def environment(cache, **more):
    return {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "GENLAB_CACHE": str(cache), **more}


def test_kill_9_half_way_and_the_next_run_gives_the_same_figure(tmp_path):
    """SIGKILL in a tile: no handler runs. The resumed figure is the uninterrupted one, bit for bit."""
    x, y = images(2 * TILE + 300), images(100, seed=1)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    script = SOURCE + textwrap.dedent(
        f"""
        import time, numpy as np, torch, eval as E
        x, y = (torch.from_numpy(np.load({str(tmp_path)!r} + f"/{{name}}.npy")) for name in "xy")
        def sample(indices):
            if indices[0] >= {TILE + 96}:
                print("half-way", flush=True)
                time.sleep(600)
            return x[indices]
        E.evaluate(E.GeneratedImages(sample, len(x), "same", "m"), y, metrics=("fd_tiny",))
        """
    )
    run = subprocess.Popen([sys.executable, "-c", script], env=environment(tmp_path / "cache"), stdout=-1, text=True)
    assert run.stdout.readline().strip() == "half-way"
    run.send_signal(signal.SIGKILL)
    assert run.wait(30) == -signal.SIGKILL
    run.stdout.close()
    (tiles,) = (tmp_path / "cache" / "features").iterdir()
    assert len(list(tiles.glob("pool-*.npy"))) == TILE // 64 + 1  # 64 images each; the torn one is not there

    asked = []
    resumed = E.evaluate(
        GeneratedImages(lambda i: asked.extend(i) or x[i], len(x), "same", "m"), y, metrics=("fd_tiny",)
    )
    whole = E.evaluate(GeneratedImages(lambda i: x[i], len(x), "other", "m"), y, metrics=("fd_tiny",))
    assert min(asked) == TILE + 64
    assert resumed.figures == whole.figures


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(workers, tmp_path):
    path, y = folder(tmp_path / "pngs", images(90)), images(40, seed=1)
    before = torch.random.get_rng_state()
    figures = [
        E.evaluate(path, y, metrics=("fd_tiny",), workers=n, batch_size=8, cache=tmp_path / f"cache{n}").figures
        for n in (0, workers)
    ]
    assert figures[0] == figures[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    (path / "00037.png").write_bytes((path / "00037.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00037\.png.*on_error='skip'"):  # as it was raised over there
        E.evaluate(path, y, metrics=("fd_tiny",), workers=workers, batch_size=8)
    with pytest.raises(ValueError, match="workers 0 or more"):
        E.evaluate(path, y, metrics=("fd_tiny",), workers=-1)


def test_workers_decode_elsewhere(tmp_path, monkeypatch):
    """The decoding of files is seen in other processes only."""
    from genlab.data.images import ImageSet

    path, seen = folder(tmp_path / "pngs", images(64)), tmp_path / "pids"
    batch = ImageSet.batch

    def noted(self, indices):
        with open(seen, "a") as file:
            file.write(f"{os.getpid()}\n")
        return batch(self, indices)

    monkeypatch.setattr(ImageSet, "batch", noted)
    E.evaluate(path, images(10), metrics=("fd_tiny",), workers=2, batch_size=8)
    pids = set(seen.read_text().split())
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


def test_the_cache_keeps_to_its_limit(tmp_path, cache, monkeypatch):
    y = images(20, seed=9)
    paths = [folder(tmp_path / str(i), images(40, seed=i)) for i in range(3)]
    for path in paths:
        E.evaluate(path, y, metrics=("fd_tiny",))
        time.sleep(0.02)  # the order of use is told by file times
    stores = sorted((cache / "features").iterdir(), key=lambda p: (p / ".lock").stat().st_mtime)
    assert len(stores) == 3
    E.evaluate(paths[0], y, metrics=("fd_tiny",))  # used again: now the second is the longest unused
    size = sum(f.stat().st_size for s in stores for f in s.iterdir())
    with in_use(stores[1]):
        assert evict(cache, size - 1) == [stores[2]]  # the second is being read, so the third goes
    assert evict(cache, size) == []
    monkeypatch.setenv("GENLAB_CACHE_GB", "0")
    E.evaluate(paths[0], y, metrics=("fd_tiny",))
    assert list((cache / "features").iterdir()) == []
    monkeypatch.setenv("GENLAB_CACHE_GB", "lots")
    with pytest.raises(ValueError, match="GENLAB_CACHE_GB is 'lots'"):
        cache_limit()


def test_models_on_both_sides(tiny_xar, picture_folder, tmp_path, monkeypatch, capsys):
    """`--model` and `--reference-model`: drawn on the fly, the classes in turn, other seeds for the reference."""
    from genlab.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["eval", "--like", f"{picture_folder}:heldout", "--device", "cpu"]
    both = ["--model", str(tiny_xar), "--set", "steps=2", "--n", "30", "--reference-model", str(tiny_xar)]
    assert main([*words, *both, "--reference-n", "4", "--json", "r.json"]) == 0
    assert "fd_efficientnet_lite0" in capsys.readouterr().out
    result = E.Result.from_json((tmp_path / "r.json").read_text())
    assert (result.generated.n, result.reference.n) == (30, 4)
    assert result.generated.source.endswith("seeds 0-29)")
    assert result.reference.source.endswith("seeds 1000000-1000003)")
    assert (result.seeds, result.class_protocol) == ("0-29", f"classes of {picture_folder}:heldout, in its order")
    assert '"steps": 2' in result.sampler
    (tmp_path / "again.json").write_text((tmp_path / "r.json").read_text())
    assert main(["eval", "--table", "r.json", "again.json"]) == 0
    assert capsys.readouterr().out.count("fd_efficientnet_lite0") == 2
    (tmp_path / "adm.json").write_text((tmp_path / "r.json").read_text().replace('"genlab",', '"adm",', 1))
    assert main(["eval", "--table", "r.json", "adm.json"]) == 2
    assert "different protocols (adm, genlab)" in capsys.readouterr().err
    for extra, message in (
        (["--reference", "x", "--reference-model", "y"], "--reference-model or --reference, not both"),
        (["--set", "steps=2", "--generated", "x"], "need --model"),
    ):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_eval_under_torchrun(tmp_path):
    """The command line on two processes over gloo writes the figures that one process writes, and speaks once."""
    for name, n, seed in (("x", TILE + 40, 0), ("y", 60, 1)):
        np.savez(tmp_path / f"{name}.npz", images(n, seed).permute(0, 2, 3, 1).numpy())
    line = ["-m", "genlab.cli", "eval", "--generated", "x.npz", "--reference", "y.npz", "--json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = []
    for out, words in (("one.json", line), ("two.json", torchrun + line)):
        done = subprocess.run(
            [sys.executable, *words, out],
            cwd=tmp_path,
            env=environment(tmp_path / out[:3]),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["figures"] == two["figures"]
    assert told[0] == told[1]
    assert told[1].count("fd_efficientnet_lite0") == 1


def test_reference_batches_hold_statistics_and_images(tmp_path):
    """ADM's references: Fréchet distances go by mu and sigma, precision and recall by the images beside them."""
    x, y, full = images(60), images(50, seed=1), images(400, seed=2)
    stats = E.make_statistics(full, extractor="tiny")
    np.savez(
        tmp_path / "ref.npz", arr_0=y.permute(0, 2, 3, 1).numpy(), mu=stats.mean_D, sigma=stats.cov_DD,
        mu_s=np.zeros(3), sigma_s=np.eye(3),
    )  # fmt: skip
    stats.save(tmp_path / "stats.npz")
    both = E.evaluate(x, tmp_path / "ref.npz", metrics=("fd_tiny", "precision_tiny", "kd_tiny"))
    by_stats = E.evaluate(x, tmp_path / "stats.npz", metrics=("fd_tiny",))
    by_images = E.evaluate(x, y, metrics=("precision_tiny", "kd_tiny"))
    assert both["fd_tiny"].value == by_stats["fd_tiny"].value
    assert both["fd_tiny"].interval.endswith("taken as exact")
    assert both.figures[1:] == by_images.figures
    assert any("its mu and sigma, the rest its 50 images" in note for note in both.notes)
    calls = EXTRACTORS["tiny"].calls
    assert E.evaluate(x, tmp_path / "ref.npz", metrics=("fd_tiny",))["fd_tiny"] == both["fd_tiny"]
    assert EXTRACTORS["tiny"].calls - calls == 64  # 60 images in padded batches; none of the reference's


def test_a_hugging_face_data_set_is_a_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    x, y = images(30), images(20, seed=1)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(30)]})
    table.save_to_disk(str(tmp_path / "set"))
    out = E.evaluate(f"hf:{tmp_path / 'set'}", y, metrics=("fd_tiny",))
    assert out["fd_tiny"].value == E.evaluate(x, y, metrics=("fd_tiny",))["fd_tiny"].value
    assert out.generated.n == 30
