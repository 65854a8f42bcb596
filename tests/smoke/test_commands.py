"""Every command, end to end on tiny models and pictures, in this process."""

import ctypes
import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import genlab
from genlab import cli
from genlab.cli import COMMANDS
from genlab.commands import shared
from genlab.config import to_json
from genlab.hub import from_pretrained


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(w) for w in words])
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def good(run):
    """Run a command line that must succeed; gives stdout."""

    def call(*words):
        code, out, err = run(*words)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def bad(run):
    """Run a command line of bad input: exit code 2, nothing like a traceback; gives stderr."""

    def call(*words):
        code, out, err = run(*words)
        assert code == 2, out
        assert "Traceback" not in err
        assert err.strip()
        return err

    return call


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# -- the command line itself --------------------------------------------------------------------------------


def test_top_level(good, bad):
    assert good() == good("--help") == good("-h")
    assert all(f"  {name} " in good() for name in COMMANDS)
    assert good("--version").strip() == genlab.__version__
    assert "unknown command 'smaple'; did you mean `genlab sample`?" in bad("smaple")
    assert "Commands: list, data" in bad("xyzzy")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_teaches(good, command):
    text = good(command, "--help")
    assert "usage" in text.lower()
    assert len(text) > 200 or command == "bench"


@pytest.mark.parametrize(
    "words",
    [
        "sample m",
        "reconstruct m",
        "data d",
        "convert xar a b",
        "demo",
        "stats d --out o",
        "eval",
        "list",
        "bench baseline",
    ],
)
def test_unknown_options_are_refused(bad, words):
    assert "--colour" in bad(*words.split(), "--colour", "red")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sample xar-cell-emoji64 --grid taken/a.png", "taken is a file; choose another --grid"),
        ("sample xar-cell-emoji64 --out taken", "expected the name of a folder to make: choose another --out"),
        ("reconstruct kl_vae-f8c16-emoji64 --grid folder.png", "expected the name of a file to make"),
        ("inpaint elm a.png --box 0,0,8,8 --grid taken/a.png", "taken is a file"),
        ("eval --model xar-cell-emoji64 --reference emoji:train --html taken/a.html", "choose another --html"),
        ("eval --generated emoji:heldout --reference emoji:train --json folder.png/taken/b.json", "taken is a file"),
        ("stats emoji:heldout --out taken/a.npz", "taken is a file"),
        ("report runs --out taken/a.html", "taken is a file"),
        ("demo --out taken", "taken is a file; expected the name of a folder"),
        ("data emoji --out taken/emoji", "taken is a file"),
        ("bench resgen --out taken", "taken is a file; expected the name of a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(bad, tmp_path, words, expected):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "taken").write_text("mine")
    assert expected in bad(*words.split())
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_file_that_is_not_there_is_named(bad):
    assert bad("eval", "--table", "none.json").strip() == "genlab eval: none.json: No such file or directory"


def test_a_read_only_folder_is_refused(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert f"{tmp_path} is read-only; choose another --out" in bad("report", "runs", "--out", "new/a.html")


def test_interruption_and_debugging(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("genlab.commands.list.collect", stop)
    code, _, err = run("list")
    assert (code, err.strip()) == (130, "genlab list: interrupted")
    monkeypatch.setenv("GENLAB_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run("sample", "no-such-model")


@pytest.mark.parametrize(
    ("text", "want"), [("3", [3]), ("0-3", [0, 1, 2, 3]), ("1,5,9-11", [1, 5, 9, 10, 11]), (" 2 , 4-4", [2, 4])]
)
def test_ranges_of_numbers(text, want):
    assert shared.numbers(text) == want


@pytest.mark.parametrize("text", ["", "a", "1,,2", "5-3", "1,5-3", "-4", "1-2-3", "1.5", "9" * 20])
def test_odd_ranges_are_refused(text):
    with pytest.raises(ValueError, match=r"expected e\.g\. 0-15"):
        shared.numbers(text)


def test_demo(good, tmp_path):
    """Its page holds every picture and figure; a prompt refines there where the zoo is at hand."""
    said = good("demo", "--n", "12", "--columns", "1", "--prompts", "red apple", "--out", "page")
    page, files = (tmp_path / "page/index.html").read_text(), {p.name for p in (tmp_path / "page").iterdir()}
    assert files == {"index.html", "demo.json", "reconstructions.png", "samples.png", "refining.png"}
    assert page.count("data:image/png;base64,") == 3
    assert "token by token" in page
    assert 'src="http' not in page
    assert "href" not in page
    assert "index.html" in said
    assert len(json.loads((tmp_path / "page/demo.json").read_text())["distances"]) == 2


def test_demo_without_the_zoo(monkeypatch, capsys, tmp_path, tiny_xar):
    from genlab.commands import demo

    with monkeypatch.context() as m:
        m.setattr("genlab.hub.shipped", dict)
        assert demo.refine(demo.DemoConfig(), torch.float32) == ""
        assert "flexar-text-emoji64 is not part of this install" in capsys.readouterr().out
    for option in ("--n", "--columns"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1"):
            demo.main([option, "0", "--out", str(tmp_path / "page")])
    with pytest.raises(ValueError, match="there are 1,530 held-out images"):
        demo.main(["--n", "1531", "--out", str(tmp_path / "page")])
    with pytest.raises(ValueError, match=r"no class .* knows .*red"):
        demo.main(["--model", str(tiny_xar), "--out", str(tmp_path / "page")])
    with pytest.raises(ValueError, match="draws by class"):
        demo.refine(demo.DemoConfig(refining="flexar-emoji64"), torch.float32)


# -- list, data ---------------------------------------------------------------------------------------------


def test_list(good):
    table = json.loads(good("list", "--json"))
    text = good("list")
    for kind in ("shipped", "presets", "samplers"):
        assert table[kind]
        for row in table[kind]:
            assert row["name"] in text
            assert all(row.get(k) for k in ("what",) if k in row), row
            assert row.get("what", ".").endswith("."), row  # a whole sentence
    assert "kl_vae" in table["tokenizers"]
    assert "xar" in table["generators"]
    assert all(row["megabytes"] < 15.8 for row in table["shipped"])  # at most 15 MiB each


def test_data(good, bad, picture_folder, tmp_path):
    counts = json.loads(good("data", picture_folder, "--out", "out", "--size", 16, "--json"))
    assert counts == {"out": "out", "images": {"train": 24, "heldout": 24}, "skipped": []}
    for split in ("train", "heldout"):
        for label in ("red", "blue"):
            a, b = (sorted((root / split / label).glob("*.png")) for root in (picture_folder, tmp_path / "out"))
            assert len(a) == 12
            assert all((pixels(p) == pixels(q)).all() for p, q in zip(a, b, strict=True))
    assert "is not empty" in bad("data", picture_folder, "--out", "out", "--size", 16)
    assert "wrote out: 24 train" in good(
        "data", picture_folder, "--out", "out", "--size", 16, "--overwrite", "--split", "train"
    )
    assert not (tmp_path / "out" / "heldout").exists()
    assert "nowhere" in bad("data", "nowhere", "--out", "other")
    assert not (tmp_path / "other").exists()


def test_data_writes_the_splits_there_are(good, bad, picture_folder, tmp_path):
    for split in ("train", "heldout"):
        shutil.copytree(picture_folder / split, tmp_path / f"only-{split}" / split)
        counts = json.loads(good("data", f"only-{split}", "--out", f"out-{split}", "--size", 16, "--json"))
        assert counts["images"] == {split: 24}
        assert [p.name for p in (tmp_path / f"out-{split}").iterdir() if p.is_dir()] == [split]
    asked = bad("data", "only-train", "--split", "heldout", "--out", "other")
    assert "no images in split 'heldout' (there are 24 train)" in asked
    assert not (tmp_path / "other").exists()
    (tmp_path / "none").mkdir()
    assert "no images found" in bad("data", "none", "--out", "other")


def test_data_with_a_broken_image(good, bad, picture_folder, tmp_path):
    shutil.copytree(picture_folder / "train", tmp_path / "mine")
    broken = tmp_path / "mine" / "red" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert "03.png" in bad("data", "mine", "--split", "train", "--out", "out", "--size", 16)
    assert not (tmp_path / "out").exists()
    skipped = ("data", "mine", "--split", "train", "--out", "out", "--size", 16, "--on-error", "skip")
    assert "03.png" in good(*skipped)
    counts = json.loads(good(*skipped, "--overwrite", "--json"))
    assert len(counts["skipped"]) == 1
    assert counts["images"]["train"] == len(list((tmp_path / "out").rglob("*.png"))) < 24


# -- train --------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, picture_folder):
    """A tiny run's config file."""
    from tokenizers_img.kl_vae import KLVAEConfig
    from tokenizers_img.losses import AutoencoderLossConfig
    from train.config import DataConfig, OptimConfig, run_config

    config = run_config(
        name="tiny-vae",
        model=KLVAEConfig(image_size=16, patch=4, channels=(8,), layers=1, latent_channels=2, norm_groups=4),
        loss=AutoencoderLossConfig(perceptual=0.0),
        data=DataConfig(source=str(picture_folder)),
        optim=OptimConfig(lr=1e-3, warmup=8),
        images=32,
        batch_size=8,
        precision="fp32",
        save_every=16,
        log_every=8,
        sample_every=0,
        threads=1,
    )
    (tmp_path / "tiny.json").write_text(to_json(config))
    return tmp_path / "tiny.json"


def test_train_and_again(good, recipe, tmp_path):
    result = json.loads(good("train", "--config", recipe, "--out", "a", "--device", "cpu", "--json").splitlines()[-1])
    assert result == {"model": "a/model"}
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model"} <= names
    a = from_pretrained("a/model")
    # the same command finds that nothing is left to do; the config it wrote repeats it bit for bit
    assert "trained: a/model" in good("train", "--config", recipe, "--out", "a")
    good("train", "--config", "a/config.json", "--out", "b")
    b = from_pretrained("b/model").state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.state_dict().items())
    good("train", "--config", "a/config.json", "--out", "c", "--seed", 1, "--optim.lr", "2e-3", "--images", 16)
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (written["seed"], written["optim"]["lr"], written["images"]) == (1, 2e-3, 16)
    good("train", "--config", "c/config.json", "--out", "a", "--resume", "never")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["seed"] == 1


def test_train_dry_run(good, recipe, tmp_path):
    before = set(tmp_path.rglob("*"))
    text = good("train", "--config", recipe, "--dry-run")
    for word in ("tiny-vae", "parameters", "continuous 4x4 raster, 2 channels", "(8, 3, 16, 16)", "MiB"):
        assert word in text
    report = json.loads(good("train", "--config", recipe, "--dry-run", "--json"))
    assert report["parameters"] > 0
    assert report["training_images"] == 24
    assert set(tmp_path.rglob("*")) == before


def test_train_print_config_and_overrides(good):
    text = good("train", "xar-cell-emoji64", "--print-config", "--optim.lr", "3e-4", "--model.dim", 32, "--data.flip")
    config = json.loads(text)
    assert (config["optim"]["lr"], config["model"]["dim"], config["data"]["flip"]) == (3e-4, 32, True)
    plain = json.loads(good("train", "xar-cell-emoji64", "--print-config"))
    assert plain["model"]["kind"] == config["model"]["kind"] == "xar"
    assert plain["optim"]["warmup"] == config["optim"]["warmup"]
    assert "--optim.lr" in good("train", "xar-cell-emoji64", "--help")
    assert "kl_vae-f8c16-emoji64" in good("train")
    for words, minutes in (((), 25), (("--images", 9), 0), (("--images=9", "--cpu_minutes", 2), 2)):
        timed = json.loads(good("train", "var-emoji64", "--print-config", *words))
        assert (timed["cpu_minutes"], timed["images"]) == (minutes, 9 if words else 100_000)


def test_train_refuses(bad, recipe, tmp_path):
    assert "did you mean 'xar-cell-emoji64'" in bad("train", "xar-cel-emoji64")
    assert "--optim.rl" in bad("train", "xar-cell-emoji64", "--optim.rl", 1)
    assert "name a preset first" in bad("train", "--optim.lr", 1)
    assert "auto or never" in bad("train", "xar-cell-emoji64", "--resume", "maybe")
    assert "--out needs a value" in bad("train", "xar-cell-emoji64", "--out")
    assert "no config file at none.json" in bad("train", "--config", "none.json")
    assert "no/such/folder" in bad("train", "--config", recipe, "--data.source", "no/such/folder", "--out", "a")
    recipe.write_text(recipe.read_text().replace('"images"', '"imagse"'))
    assert "imagse" in bad("train", "--config", recipe)
    recipe.write_text('{"hello": 1}')
    assert "is not a training config" in bad("train", "--config", recipe)
    refused = bad("train", "xar-cell-emoji64", "--tokenizer", "xar-cell-emoji64", "--out", "a")
    assert "holds a xar, not a tokenizer" in refused
    small = ("train", "xar-cell-emoji64", "--tokenizer", "kl_vae-f8c16-emoji64", "--model.num-classes", 2)
    assert "emoji has 10 classes, the model takes 2: set --model.num-classes 10" in bad(*small, "--out", "a")
    assert "they differ in kind" in bad("train", "xar-cell-emoji64", "--tokenizer", "vq-f4-emoji64", "--out", "a")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "a" / "config.json").exists()


def test_train_refuses_a_device_that_is_not_there(bad, recipe, tmp_path):
    for name in ("foo", "cuda:99"):
        for more in ((), ("--dry-run",)):
            assert f"no device '{name}' here" in bad("train", "--config", recipe, "--out=a", "--device", name, *more)
    assert not (tmp_path / "a").exists()
    assert "name a preset first" in bad("train", "--device=cpu")


def test_options_are_taken_in_either_form():
    words = ["x", "--out=a=b", "--resume", "never", "--outer=1"]
    assert (shared.take(words, "--out"), shared.take(words, "--resume"), shared.take(words, "--device", "auto")) == (
        "a=b", "never", "auto",
    )  # fmt: skip
    assert words == ["x", "--outer=1"]
    for words in (["--out"], ["--out="]):
        with pytest.raises(ValueError, match="--out needs a value"):
            shared.take(words, "--out")


def test_train_fails_with_1(run, recipe, tmp_path):
    code, _, err = run("train", "--config", recipe, "--out", "a", "--optim.lr", "1e30", "--optim.clip", 0)
    assert code == 1
    assert "genlab train: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "a" / "model").exists()


# -- reconstruct --------------------------------------------------------------------------------------------


def test_reconstruct(good, bad, tiny_tokenizer, tiny_xar, picture_folder, tmp_path):
    words = ("reconstruct", tiny_tokenizer, "--images", picture_folder, "--no-fd", "--n", 16)
    figures = json.loads(good(*words, "--json", "--grid", "rec.png", "--rows", 2))
    assert figures["images"] == 16
    assert figures["pixel_values_per_latent_number"] == 3 * 16 * 16 / (4 * 4 * 4)
    assert figures["tokens"] == "continuous 4x4 raster, 4 channels"
    rows = good(*words)
    assert f"{figures['psnr_all_pixels_pooled']:.4f}" in rows
    # the same figure by hand, from the grid
    with Image.open(tmp_path / "rec.png") as picture:
        assert picture.height == 4 * (32 + 4) + 4
    from genlab.data import open_images
    from genlab.pictures import to_float, to_uint8

    model = from_pretrained(tiny_tokenizer)
    x = open_images(str(picture_folder), split="heldout", size=16).batch(range(16))
    with torch.no_grad():
        y = to_uint8(model.decode(model.encode(to_float(x))))
    mse = (x.double() - y.double()).square().mean()
    assert figures["psnr_all_pixels_pooled"] == pytest.approx(float(10 * (255**2 / mse).log10()), abs=0.01)
    assert json.loads(good(*words[:2], "--images", f"{picture_folder}:train", "--no-fd", "--json"))["images"] == 24
    assert "not a tokenizer" in bad("reconstruct", tiny_xar, "--images", picture_folder)
    assert "no checkpoint 'nope'" in bad("reconstruct", "nope")
    assert "nowhere" in bad("reconstruct", tiny_tokenizer, "--images", "nowhere")
    assert figures["source"] == f"{picture_folder}:heldout"  # no split named: its held-out part
    for option in ("--n", "--rows", "--batch-size"):
        assert f"{option} must be at least 1, got 0" in bad(*words[:2], option, 0)
    assert "no device 'abacus'" in bad("eval", "--generated", "x", "--device", "abacus")
    assert "--reference-n must be at least 1, got -2" in bad("eval", "--generated", "x", "--reference-n", -2)
    assert "--batch-size must be at least 1" in bad("stats", "emoji", "--out", "s.npz", "--batch-size", 0)


# -- sample -------------------------------------------------------------------------------------------------

QUICK = ("--set", "steps=3", "--device", "cpu")


def test_sample_a_grid_and_its_manifest(good, tiny_xar, tiny_tokenizer, tmp_path):
    out = good("sample", tiny_xar, "--seeds", "0-2", "--grid", "g/out.png", "--guidance", 2, *QUICK)
    assert "6 images -> g/out.png" in out
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    assert manifest["command"].startswith(f"genlab sample {tiny_xar} --seeds 0-2")
    assert manifest["command_config"]["guidance"] == 2
    assert (manifest["classes"], manifest["class_names"], manifest["seeds"]) == ([0, 1], ["blue", "red"], [0, 1, 2])
    assert manifest["sampler"]["name"] == "flow"
    assert manifest["sampler"]["exact"] is True
    assert manifest["sampler"]["steps"] == 3
    assert manifest["guidance"]["scale"] == 2
    for model in (tiny_xar, tiny_tokenizer):
        assert manifest["weights_sha256"][str(model)] == json.loads((model / "config.json").read_text())["sha256"]
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["versions"]["genlab"] == genlab.__version__
    assert manifest["seconds"] > 0
    assert manifest["stats"]["images"] == 6
    assert manifest["stats"]["model_calls"] >= 4 * 3  # groups times steps
    with Image.open(tmp_path / "g" / "out.png") as image:
        assert json.loads(image.text["genlab"]) == manifest["command_config"]
        assert image.height == 2 * (16 + 2) + 2
        assert image.width > 3 * (16 + 2) + 2  # captions at the left


def test_a_manifest_repeats_bit_for_bit(good, tiny_xar, tmp_path):
    good("sample", tiny_xar, "--classes", "red", "--seeds", "4,7", "--out", "a", "--guidance", 1.5, *QUICK)
    good("sample", "--config", "a/manifest.json", "--out", "b")
    names = sorted(p.name for p in (tmp_path / "a").glob("*.png"))
    assert names == ["class0001_seed00000004.png", "class0001_seed00000007.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / names[0]) as image:
        assert image.text == {"model": str(tiny_xar), "class": "1", "seed": "4", "sampler": "flow"}
    a, b = (json.loads((tmp_path / d / "manifest.json").read_text()) for d in "ab")
    assert {**a["command_config"], "out": "b"} == b["command_config"]
    assert a["sampler"] == b["sampler"]
    config = json.loads(good("sample", "--config", "a/manifest.json", "--print-config"))
    assert config == a["command_config"]


@pytest.mark.parametrize("sampler", [(), ("--set", "method=heun"), ("--set", "method=euler")])
def test_an_image_depends_on_its_class_and_seed_alone(good, tiny_xar, sampler, tmp_path):
    """Whatever else is drawn and in what batches: within one of 255 levels (float rounding), most pixels equal."""
    words = ("--set", "steps=3", *sampler)
    good("sample", tiny_xar, "--classes", "red", "--seeds", 5, "--out", "alone", "--batch-size", 1, *words)
    good("sample", tiny_xar, "--seeds", "0-7", "--out", "many", "--batch-size", 32, *words)
    good("sample", tiny_xar, "--seeds", "9,5,2", "--out", "odd", "--batch-size", 3, *words)
    name = "class0001_seed00000005.png"
    alone = pixels(tmp_path / "alone" / name)
    for folder in ("many", "odd"):
        difference = abs(pixels(tmp_path / folder / name) - alone)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    other = pixels(tmp_path / "many" / "class0001_seed00000004.png")
    assert abs(other - alone).max() > 1


def test_tokens_dont_depend_on_the_batch(tiny_xar):
    """The promise of `--seeds`, in numbers: 1e-5 of the largest token, float32."""
    from samplers.flow import FlowConfig, FlowSampler

    model = from_pretrained(tiny_xar)
    labels, seeds = torch.arange(32) % 2, torch.arange(32)
    sampler = FlowSampler(FlowConfig(steps=5))
    want = sampler.sample(model, labels, seeds, batch_size=32).tokens.values
    for batch_size in (1, 8):
        got = sampler.sample(model, labels[16:20], seeds[16:20], batch_size=batch_size).tokens.values
        assert float((got - want[16:20]).abs().max()) <= 1e-5 * float(want.abs().max())


def test_an_interrupted_folder_goes_on(run, good, bad, tiny_xar, tmp_path, monkeypatch):
    words = ("sample", tiny_xar, "--seeds", "0-3", "--batch-size", 2, *QUICK)
    good(*words, "--out", "whole")
    from genlab import pictures

    save, written = pictures.save_png, []

    def stops(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments[1])
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", stops)
        assert run(*words, "--out", "parts")[0] == 130
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.png")}
    assert len(there) == 3
    assert not (tmp_path / "parts" / "manifest.json").exists()
    code, out, err = run(*words, "--out", "parts", "--grid", "parts.png")
    assert code == 0
    assert "3 of 8 images are there already" in err
    assert all(p.stat().st_mtime_ns == t for p, t in there.items())
    for path in (tmp_path / "whole").glob("*.png"):
        assert abs(pixels(path) - pixels(tmp_path / "parts" / path.name)).max() <= 1
    assert len(list((tmp_path / "parts").glob("*.png"))) == 8
    assert json.loads((tmp_path / "parts" / "manifest.json").read_text())["stats"]["images"] == 5
    grid = pixels(tmp_path / "parts.png")
    good(*words, "--grid", "whole.png")
    assert abs(grid - pixels(tmp_path / "whole.png")).max() <= 1
    assert "8 of 8 images are there already" in run(*words, "--out", "parts")[2]
    assert "--guidance must be a number, got nan" in bad("sample", tiny_xar, "--guidance", "nan")
    twice = bad("sample", tiny_xar, "--guidance", 2, "--set", 'guidance={"scale": 7}')
    assert "not by both" in twice
    for other in (("--guidance", 3), ("--set", "method=heun"), ("--dtype", "bfloat16")):
        assert "holds images of another model, sampler, guidance, --best-of or dtype" in bad(
            *words, "--out", "parts", *other
        )


SAMPLES = int(os.environ.get("GENLAB_SAMPLES", "60"))


@pytest.fixture
def small_pages():
    """This process without huge pages on Linux: the kernel's merging small ones into them looks like growth."""
    if sys.platform != "linux":
        yield
        return
    prctl, PR_SET_THP_DISABLE = ctypes.CDLL(None).prctl, 41  # linux/prctl.h
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    yield
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def test_interrupted_five_times_none_is_missing_or_doubled(run, good, tiny_xar, tmp_path, monkeypatch):
    words = ("sample", tiny_xar, "--seeds", f"0-{SAMPLES // 2 - 1}", "--batch-size", max(4, SAMPLES // 50), *QUICK)
    from genlab import pictures

    save, written, stop, rng = pictures.save_png, [], -1, random.Random(0)

    def stops(*arguments):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(arguments[1].name)
        save(*arguments)

    for at in sorted(rng.sample(range(1, SAMPLES), 5)):
        stop = at
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "save_png", stops)
            assert run(*words, "--out", "parts")[0] == 130
    stop = -1
    (tmp_path / "parts" / f".{written[0]}.1234.tmp").write_bytes(b"half")  # of a `kill -9`
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", stops)
        good(*words, "--out", "parts")
    assert len(written) == len(set(written)) == SAMPLES
    there = sorted((tmp_path / "parts").glob("*.png"))
    assert [p.name for p in there] == sorted(written)
    assert not list((tmp_path / "parts").glob(".*.tmp"))
    for path in (there[0], there[SAMPLES // 2], there[-1]):
        seed = str(int(path.stem.split("seed")[1]))
        good(*words, "--seeds", seed, "--classes", str(int(path.stem[5:9])), "--out", "one")
        assert abs(pixels(path) - pixels(tmp_path / "one" / path.name)).max() <= 1


def test_memory_is_flat_over_a_long_sampling_run(good, tiny_xar, small_pages, monkeypatch):
    """No tensor stays behind a batch; with GENLAB_SAMPLES in the thousands, the process doesn't grow either."""
    from genlab import pictures

    save, tensors, pages = pictures.save_png, [], []

    def watched(*arguments):
        save(*arguments)
        if len(pages) % 12 == 0:
            tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0)

    monkeypatch.setattr(pictures, "save_png", watched)
    good("sample", tiny_xar, "--seeds", f"0-{SAMPLES // 2 - 1}", "--batch-size", 4, "--out", "many", *QUICK)
    assert len(pages) == SAMPLES
    assert max(tensors) - min(tensors) < 4
    assert max(pages[SAMPLES // 2 :]) - max(pages[: SAMPLES // 2]) < 2048  # of 4 KiB


def test_sample_refuses(bad, tiny_xar, tiny_tokenizer, tmp_path):
    def refuse(*words):
        return bad("sample", tiny_xar, "--seeds", "0", *QUICK, *words)

    assert "no class 'green'" in refuse("--classes", "green")
    assert "0 blue, 1 red" in refuse("--classes", "0,2")
    assert "expected e.g. 0-15" in refuse("--seeds", "x")
    assert "unknown sampler 'flwo'; did you mean 'flow'?" in refuse("--sampler", "flwo")
    assert "can't draw from a 'xar' generator; these can: flow" in bad(
        "sample", tiny_xar, "--seeds", "0", "--sampler", "ancestral"
    )
    message = refuse("--set", "setps=3")
    assert "setps" in message
    assert "known: " in message
    assert "steps" in message
    assert "--set takes name=value, got 'steps'" in refuse("--set", "steps")
    assert "steps must be at least 1, got 0" in refuse("--set", "steps=0")
    assert "method" in refuse("--set", "method=rk4")
    assert "invalid choice 'float16'" in refuse("--dtype", "float16")
    assert "no device 'gpu' here" in refuse("--device", "gpu")
    assert "must be at least 1, got 0" in refuse("--batch-size", 0)
    assert "must be at least 1, got 32 and -1" in refuse("--zoom", -1)
    assert "holds a xar, not a tokenizer" in refuse("--tokenizer", tiny_xar)
    message = bad("sample", tiny_tokenizer)
    assert "holds a kl_vae tokenizer, which draws nothing" in message
    assert f"genlab reconstruct {tiny_tokenizer}" in message
    assert "no checkpoint 'nope'. Shipped: " in bad("sample", "nope")
    (tmp_path / "xar.pt").touch()
    assert "xar.pt is a file; expected a checkpoint's folder" in bad("sample", tmp_path / "xar.pt")
    (tmp_path / "xar.pt").unlink()
    assert "makes pictures: give --grid a.png" in refuse("--grid", "a.webp")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_doesnt_fit_is_refused(bad, tiny_xar, tmp_path):
    from tokenizers_img.pixels import Pixels, PixelsConfig

    Pixels(PixelsConfig(image_size=16, patch=4)).save_pretrained(tmp_path / "pixels")
    message = bad("sample", tiny_xar, "--tokenizer", "pixels")
    assert "tokenizer 'pixels' makes continuous 4x4 raster, 48 channels" in message
    assert "takes continuous 4x4 raster, 4 channels (they differ in dim)" in message


def test_a_generator_without_its_tokenizer(bad, good, tiny_xar, tiny_tokenizer, tmp_path):
    shutil.copytree(tiny_xar, tmp_path / "lone")
    about = json.loads((tmp_path / "lone" / "config.json").read_text())
    (tmp_path / "lone" / "config.json").write_text(json.dumps({**about, "tokenizer": ""}))
    assert "names no tokenizer; give one with --tokenizer" in bad("sample", "lone")
    (tmp_path / "lone" / "config.json").write_text(json.dumps({**about, "tokenizer": "tok"}))
    assert "no checkpoint 'tok'" in bad("sample", "lone")
    shutil.copytree(tiny_tokenizer, tmp_path / "lone" / "tok")  # beside its generator it is found by its name
    good("sample", "lone", "--seeds", "0", *QUICK)
    assert (tmp_path / "grid.png").is_file()


# -- stats, eval --------------------------------------------------------------------------------------------


def test_stats_and_eval(good, bad, run, picture_folder, tiny_xar, tmp_path):
    line = json.loads(good("stats", picture_folder, "--out", "ref.npz", "--n", 3, "--json"))
    assert (line["out"], line["images"]) == ("ref.npz", 3)
    with np.load(tmp_path / "ref.npz") as file:
        assert any(file[k].shape == (line["dimensions"],) for k in file.files)
    shown = good("eval", "--generated", picture_folder, "--n", 3, "--reference", "ref.npz", "--print-json")
    figure = next(f for f in json.loads(shown)["figures"] if f["name"] == "fd_efficientnet_lite0")
    assert figure["value"] == pytest.approx(0, abs=1e-3)  # the same images
    table = good(
        "eval", "--model", tiny_xar, "--like", f"{picture_folder}:heldout", "--n", 2, "--set", "steps=2",
        "--reference", "ref.npz", "--json", "result.json", "--device", "cpu",
    )  # fmt: skip
    assert "fd_efficientnet_lite0" in table
    result = json.loads((tmp_path / "result.json").read_text())
    assert next(f for f in result["figures"] if f["name"] == "fd_efficientnet_lite0")["value"] > 1
    text = json.dumps(result)
    assert "flow" in text
    assert "0-1" in text  # the seeds
    assert "name the images to judge" in bad("eval")
    assert "--model or --generated, not both" in bad("eval", "--model", tiny_xar, "--generated", picture_folder)
    assert "nowhere" in bad("eval", "--generated", "nowhere", "--reference", "ref.npz")
    refused = bad("eval", "--model", tiny_xar, "--reference", "ref.npz")  # like emoji:heldout
    assert "no class 'Activities'" in refused
    assert "knows 0 blue, 1 red: take a set of its classes (`genlab eval`: --like)" in refused
    assert bad("eval", "--generated", picture_folder, "--reference", "ref.npz", "--metrics", "fdi")
    assert "nowhere" in bad("stats", "nowhere", "--out", "b.npz")
    assert not (tmp_path / "b.npz").exists()


# -- convert ------------------------------------------------------------------------------------------------


def test_convert(good, bad, tiny_tokenizer, tmp_path):
    from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

    sizes = {"image_size": 64, "patch": 4, "channels": (16,), "layers": 1, "norm_groups": 4}
    KLVAE(KLVAEConfig(latent_channels=16, **sizes)).save_pretrained("fits")
    from safetensors import safe_open

    from genlab.convert.xar import convert_xar
    from tests.parity.fill import fill

    case = os.path.join(os.path.dirname(__file__), "..", "parity", "cases", "xar-velocity.safetensors")
    with safe_open(case, "pt") as file:
        meta = file.metadata()
    state = fill(json.loads(meta["shapes"]), int(meta["seed"]))
    heads = json.loads(meta["config"])["num_heads"]
    torch.save(state, "published.pth")
    out = good("convert", "xar", "published.pth", "mine", "--heads", heads, "--tokenizer", "fits")
    assert "wrote mine: xar" in out
    ours, want = from_pretrained("mine"), convert_xar(state, heads=heads)
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in ours.state_dict().items())
    assert ours.extra["tokenizer"] == "fits"
    assert "takes continuous 16x16" in bad(
        "convert", "xar", "published.pth", "b", "--heads", heads, "--tokenizer", tiny_tokenizer
    )
    assert "published.pth" in (tmp_path / "mine" / "README.md").read_text()
    save_file(state, "published.safetensors")
    good("convert", "xar", "published.safetensors", "mine", "--heads", heads)  # replaces it
    assert "tokenizer" not in from_pretrained("mine").extra

    assert "unknown system to convert 'xra'; did you mean 'xar'" in bad("convert", "xra", "published.pth", "b")
    assert "no checkpoint file at none.pth" in bad("convert", "xar", "none.pth", "b")
    assert "give heads=" in bad("convert", "xar", "published.pth", "b") or heads in (12, 16)
    assert "--heads has no effect" in bad("convert", "kl_vae", "published.pth", "b", "--heads", 2)
    assert bad("convert", "kl_vae", "published.pth", "b")
    odd = {**state, "surplus": torch.zeros(1)}
    save_file(odd, "odd.safetensors")
    assert "unexpected: surplus" in bad("convert", "xar", "odd.safetensors", "b", "--heads", heads)
    (tmp_path / "odd.safetensors").write_bytes(b"half")
    assert "not a whole safetensors file" in bad("convert", "xar", "odd.safetensors", "b", "--heads", heads)
    assert not (tmp_path / "b").exists()
