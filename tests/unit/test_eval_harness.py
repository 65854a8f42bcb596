"""The harness end to end on a tiny extractor: sources, cache, resumption, processes, refusals, tables."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as E
from eval import harness
from eval.features import EXTRACTORS, Extractor
from eval.sources import GeneratedImages, npz_images, open_source
from eval.store import TILE

SOURCE = textwrap.dedent(
    """
    import torch
    from eval import harness
    from eval.features import EXTRACTORS, Extractor

    class Tiny(Extractor):
        name, resize, size = "tiny", "torch-bilinear", 8
        calls = 0

        def __init__(self, weights=None, device="cpu"):
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.randn(3 * 8 * 8, 20, generator=generator) / 40
            self.layers, self.weights_hash = {"pool": 20}, "0" * 64

        def forward(self, x, layers):
            type(self).calls += len(x)
            return {"pool": torch.tanh((x.flatten(1) / 127.5 - 1) @ self.weight)}

    EXTRACTORS["tiny"] = Tiny
    families = {"fd_tiny": "frechet", "kd_tiny": "kernel", "fd_infinity_tiny": "infinity"}
    families |= {f"{name}_tiny": name for name in ("precision", "recall", "density", "coverage")}
    harness.METRICS.update({name: harness.Metric(family, "tiny") for name, family in families.items()})
    """
)
exec(SOURCE)
Tiny: type[Extractor] = EXTRACTORS["tiny"]
ALL = (
    "fd_tiny",
    "kd_tiny",
    "fd_infinity_tiny",
    "precision_tiny",
    "recall_tiny",
    "density_tiny",
    "coverage_tiny",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(n, seed=0, size=12):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (n, 3, 1, 1)) + rng.integers(0, 56, (n, 3, size, size))
    return torch.from_numpy(base.astype(np.uint8))


def folder(path: Path, x, suffix="png"):
    path.mkdir(parents=True)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:05d}.{suffix}")
    return path


def test_every_form_of_a_source_gives_one_figure(tmp_path):
    x, y = images(60), images(50, seed=1)
    np.savez(tmp_path / "adm.npz", x.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "small.npz", x.permute(0, 2, 3, 1).numpy())
    forms = [
        x,
        x.numpy(),
        [x[:7], x[7:50], x[50:]],
        tmp_path / "adm.npz",
        str(tmp_path / "small.npz"),
        folder(tmp_path / "pngs", x),
        GeneratedImages(lambda indices: x[indices], 60, "model", "m"),
    ]
    values = [E.evaluate(form, y, metrics=("fd_tiny",))["fd_tiny"] for form in forms]
    assert {v.value for v in values} == {values[0].value}
    assert {v.standard_error for v in values} == {values[0].standard_error}


def test_batch_size_changes_nothing_beyond_rounding():
    x, y = images(70), images(64, seed=1)
    figures = [E.evaluate(x, y, metrics=ALL, batch_size=b) for b in (1, 7, 64, 70)]
    for name in ALL:
        values = [result[name].value for result in figures]
        assert max(values) - min(values) <= 1e-5 * abs(values[0]), name  # the extractor's own kernels


def test_statistics_in_is_features_in(tmp_path):
    x, y = images(60), images(50, seed=1)
    path = E.make_statistics(y, extractor="tiny").save(tmp_path / "ref.npz")
    whole = E.evaluate(x, y, metrics=("fd_tiny",), reference_is_sample=False)["fd_tiny"]
    ours = E.evaluate(x, path, metrics=("fd_tiny",))
    assert ours["fd_tiny"].value == pytest.approx(whole.value, rel=1e-9)
    assert ours["fd_tiny"].standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    assert ours.reference.n == 50
    with pytest.raises(ValueError, match=r"kd_tiny needs the images' features"):
        E.evaluate(x, path, metrics=("kd_tiny",))
    both = E.evaluate(path, path, metrics=("fd_tiny",))["fd_tiny"]
    assert both.value == pytest.approx(0.0, abs=1e-9)
    assert both.low is None


def test_statistics_of_another_dimension_or_extractor(tmp_path):
    rng = np.random.default_rng(0)
    E.Statistics(mean_D=np.zeros(7), cov_DD=np.eye(7), n=9).save(tmp_path / "seven.npz")
    Tiny.calls = 0
    with pytest.raises(ValueError, match="has 7 dimensions, but tiny's pool has 20"):
        E.evaluate(images(9), tmp_path / "seven.npz", metrics=("fd_tiny",))
    assert Tiny.calls == 0  # refused before anything is computed
    from eval.statistics import statistics_of

    stats = statistics_of(rng.standard_normal((30, 20)), extractor="other/1/x")
    with pytest.raises(ValueError, match="made with other/1/x"):
        E.evaluate(images(9), stats.save(tmp_path / "other.npz"), metrics=("fd_tiny",))


def test_a_reference_that_is_not_there_is_refused_before_anything_is_drawn(tmp_path):
    drawn = []
    ours = GeneratedImages(lambda i: drawn.extend(i) or images(len(i)), 9, "model", "m")
    for reference, reason in ((tmp_path / "none.npz", "no such file"), (tmp_path / "none", "no such source")):
        with pytest.raises(FileNotFoundError, match=reason):
            E.evaluate(ours, reference, metrics=("fd_tiny",))
    with pytest.raises(ValueError, match="fewer than the 30"):
        E.evaluate(ours, str(folder(tmp_path / "few", images(20))), metrics=("fd_tiny",), reference_n=30)
    assert not drawn


def test_the_cache_goes_by_content(tmp_path):
    path, y = folder(tmp_path / "a", images(20)), images(20, seed=1)
    Tiny.calls = 0
    first = E.evaluate(path, y, metrics=("fd_tiny",))
    once = Tiny.calls
    assert E.evaluate(path, y, metrics=("fd_tiny",)) == first
    assert Tiny.calls - once == 32  # the reference lives in memory and is computed anew, the folder is not
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(path / "00003.png")  # same names, other content
    assert E.evaluate(path, y, metrics=("fd_tiny",))["fd_tiny"].value != first["fd_tiny"].value


def test_killed_and_resumed_is_uninterrupted():
    x, y = images(3 * TILE + 100), images(300, seed=1)

    class Killed(Exception):
        pass

    def sample(indices, stop=None):
        if stop is not None and indices[0] >= stop:
            raise Killed
        return x[indices]

    whole = E.evaluate(GeneratedImages(sample, len(x), "whole", "m"), y, metrics=("fd_tiny",))
    with pytest.raises(Killed):
        E.evaluate(GeneratedImages(lambda i: sample(i, 2 * TILE + 64), len(x), "cut", "m"), y, metrics=("fd_tiny",))
    asked = []
    resumed = E.evaluate(
        GeneratedImages(lambda i: asked.extend(i) or sample(i), len(x), "cut", "m"), y, metrics=("fd_tiny",)
    )
    assert min(asked) == 2 * TILE + 64  # whole tiles were kept, the torn one is computed again
    assert resumed["fd_tiny"] == whole["fd_tiny"]


def test_more_images_of_one_model_are_another_set():
    x, y = images(700), images(90, seed=1)
    few, many = (
        E.evaluate(GeneratedImages(lambda i: x[i], n, "same", "m"), y, metrics=("fd_tiny", "precision_tiny"))
        for n in (600, 700)
    )
    for ours, other in zip(many.figures, E.evaluate(x, y, metrics=("fd_tiny", "precision_tiny")).figures, strict=True):
        assert ours.value == pytest.approx(other.value, rel=1e-9)  # tiles of another size: other rounding
        assert ours.standard_error == pytest.approx(other.standard_error, rel=1e-9)
    assert (few.generated.n, many.generated.n) == (600, 700)


def test_two_processes_give_the_figure_of_one(tmp_path):
    x, y = images(2 * TILE + 90), images(200, seed=1)
    np.savez(tmp_path / "x.npz", x.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "y.npz", y.permute(0, 2, 3, 1).numpy())
    script = SOURCE + textwrap.dedent(
        f"""
        import eval as E, os
        x, y = {str(tmp_path / "x.npz")!r}, {str(tmp_path / "y.npz")!r}
        result = E.evaluate(x, y, metrics=("fd_tiny", "precision_tiny"))
        open({str(tmp_path)!r} + f"/{{os.environ['RANK']}}.json", "w").write(result.to_json())
        print(Tiny.calls)
        """
    )
    env = {**os.environ, "PYTHONPATH": str(Path(E.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000)}

    def run(cache, **more):
        more |= {"GENLAB_CACHE": str(tmp_path / cache)}
        return subprocess.Popen([sys.executable, "-c", script], env=env | more, stdout=-1, text=True)

    two = [run("two", RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in range(2)]
    shares = [int(p.communicate(timeout=120)[0]) for p in two]
    assert [p.returncode for p in two] == [0, 0]
    first, second = (E.Result.from_json((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    Tiny.calls = 0
    one = E.evaluate(tmp_path / "x.npz", tmp_path / "y.npz", metrics=("fd_tiny", "precision_tiny"))
    assert first.figures == second.figures == one.figures
    assert sum(shares) == Tiny.calls  # the work was shared, none of it done twice
    assert all(0 < share < Tiny.calls for share in shares)


def test_bad_input(tmp_path):
    x, y = images(12), images(12, seed=1)

    def run(path, **options):
        return E.evaluate(path, y, metrics=("fd_tiny",), **options)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        run(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        run(folder(tmp_path / "one", x[:1]))
    mixed = folder(tmp_path / "mixed", x)
    Image.new("RGB", (9, 9)).save(mixed / "zz.png")
    with pytest.raises(ValueError, match=r"2 sizes.*12x12: 12 images.*9x9: 1 images.*zz\.png.*--size"):
        run(mixed)
    resized = run(mixed, size=12)
    assert resized.generated.n == 13
    assert any("1 images of" in note and "not 12x12: the centre cropped and resized" in note for note in resized.notes)
    wide = tmp_path / "wide"
    wide.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 10)).save(wide / f"{i}.png")
    with pytest.raises(ValueError, match=r"20x10, not square.*--size"):
        run(wide)
    torn = folder(tmp_path / "torn", x)
    (torn / "00004.png").write_bytes((torn / "00004.png").read_bytes()[:90])
    with pytest.raises(ValueError, match=r"00004\.png"):
        run(torn)
    with pytest.warns(UserWarning, match="skipped 1 of 12"):
        result = run(torn, on_error="skip")
    assert (result.generated.n, result.generated.skipped) == (11, 1)
    assert any("1 images" in note and "00004.png" in note for note in result.notes)
    assert "1 images skipped" in result.table()
    odd = folder(tmp_path / "odd", x)
    Image.fromarray(np.full((12, 12), 30000, np.uint16)).save(odd / "deep.png")
    Image.new("L", (12, 12), 90).save(odd / "grey.png")
    Image.new("RGBA", (12, 12), (0, 0, 0, 0)).save(odd / "alpha.png")
    notes = " ".join(run(odd).notes)
    assert all(word in notes for word in ("16-bit: scaled", "grey: the channel", "alpha: composited on white"))
    assert " were " not in " ".join(run(odd, n=12).notes)  # those are the last ones
    Image.new("L", (12, 12), 90).save(torn / "grey.png")
    Image.new("L", (12, 12), 90).save(torn / "00004.png")
    assert any("2 images of" in note and "grey" in note for note in run(torn).notes)
    for broken, message in (
        (x.float(), "uint8"),
        (x[:, :1], "uint8 of shape"),
        (x[0], "uint8 of shape"),
        (17, "cannot read images"),
        ([x[:5], images(3, size=9)], "two sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            run(broken)
    with pytest.raises(ValueError, match="n is 0; expected the number of images"):
        run(x, n=0)
    with pytest.raises(ValueError, match="fewer than the 13 asked for"):
        run(x, n=13)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="neither images"):
        run(tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match="not a readable npz"):
        run(tmp_path / "torn.npz")


def test_nan_features_are_refused(monkeypatch):
    def broken(self, x, layers):
        return {"pool": torch.full((len(x), 20), float("nan"))}

    monkeypatch.setattr(Tiny, "forward", broken)
    with pytest.raises(ValueError, match="NaN or infinite features"):
        E.evaluate(images(12), images(12), metrics=("fd_tiny",))


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown metric"):
        E.evaluate(images(4), images(4), metrics=("fjd",))
    with pytest.raises(ValueError, match="unknown protocol"):
        E.evaluate(images(4), images(4), metrics=("fd_tiny",), protocol="x")
    with pytest.raises(ValueError, match="needs a reference"):
        E.evaluate(images(4), metrics=("fd_tiny",))


def test_result_says_what_it_measured():
    result = E.evaluate(
        images(40),
        images(30, seed=1),
        metrics=("fd_tiny",),
        class_protocol="4 classes",
        seeds="0-39",
        sampler="s",
    )
    assert E.Result.from_json(result.to_json()) == result
    data = json.loads(result.to_json())
    assert data["comparable"] is False
    assert data["generated"]["n"] == 40
    assert len(data["reference"]["hash"]) == 64
    assert data["figures"][0]["extractor"] == "tiny/0000000000000000/torch-bilinear-8"
    assert {"torch", "numpy"} <= set(data["versions"])
    assert "not comparable with published figures" in result.table()
    figure = result["fd_tiny"]
    assert figure.low < figure.value < figure.high
    with pytest.raises(KeyError, match="no figure 'fid'"):
        result["fid"]


def test_tables_do_not_mix():
    import dataclasses

    y = images(30, seed=1)
    a, b = (E.evaluate(images(40, seed=s), y, metrics=("fd_tiny",)) for s in (0, 2))
    assert E.tabulate([a, b], ["a", "b"]).count("fd_tiny") == 2
    with pytest.raises(ValueError, match="different protocols"):
        E.tabulate([a, dataclasses.replace(b, protocol="adm")])
    with pytest.raises(ValueError, match="different references"):
        E.tabulate([a, E.evaluate(images(40), images(30, seed=5), metrics=("fd_tiny",))])
    with pytest.raises(ValueError, match=r"different confidence levels \(50%, 95%\)"):
        E.tabulate([a, dataclasses.replace(b, confidence=0.5)])
    other = dataclasses.replace(b.figures[0], extractor="tiny/1/x")
    with pytest.raises(ValueError, match="different extractors of fd_tiny"):
        E.tabulate([a, dataclasses.replace(b, figures=(other,))])


def test_npz_is_mapped_not_read(tmp_path):
    x = images(30).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", x)
    opened = npz_images(tmp_path / "x.npz")
    assert isinstance(opened._array, np.memmap)
    np.testing.assert_array_equal(opened.batch([3, 1]).permute(0, 2, 3, 1).numpy(), x[[3, 1]])
    assert open_source(tmp_path / "x.npz", n=5).batch(range(5)).shape == (5, 3, 12, 12)


def test_precision_rounds_as_its_protocol_does(monkeypatch):
    for name in ("precision", "recall", "density"):
        monkeypatch.setitem(harness.METRICS, name, harness.Metric(name, "tiny"))
    monkeypatch.setattr(harness, "in_single_precision", lambda x, y: (0.25, 0.75))
    results = {
        p: E.evaluate(images(20), images(20, seed=1), metrics=("precision", "recall", "density"), protocol=p)
        for p in ("torch-fidelity", "adm")
    }
    exact = results["adm"]
    assert [results["torch-fidelity"][n].value for n in ("precision", "recall")] == [0.25, 0.75]
    assert results["torch-fidelity"]["recall"].detail == {"in_double_precision": exact["recall"].value}
    assert exact["precision"].value not in (0.25, 0.75)
    assert results["torch-fidelity"]["density"].value == exact["density"].value


def test_protocols_only_touch_inception():
    result = E.evaluate(images(10), images(10, seed=1), metrics=("fd_tiny",), protocol="adm")
    assert result.protocol == "genlab"
    assert harness.METRICS["fid"].extractor == "inception-2015"
    named = [n for n, m in harness.METRICS.items() if n.split("_")[0] in ("fid", "sfid", "is", "kid")]
    assert all(harness.METRICS[n].extractor == "inception-2015" for n in named)


def test_statistics_are_not_made_of_statistics(tmp_path):
    """Who made a foreign file isn't known: it must not come out as made here."""
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(20), sigma=np.eye(20))
    with pytest.raises(ValueError, match="holds statistics already; give the images"):
        E.make_statistics(tmp_path / "foreign.npz", extractor="tiny")


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    E.make_statistics(images(30, seed=1), extractor="tiny").save(tmp_path / "ref.npz")
    a, b = (E.evaluate(images(30), name, metrics=("fd_tiny",)) for name in ("~/ref.npz", tmp_path / "ref.npz"))
    assert a["fd_tiny"].value == b["fd_tiny"].value
