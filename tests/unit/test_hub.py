"""Checkpoints: they come back as they were, replace nothing halfway, and refuse what is odd, by name."""

import json
import os
import pickle
import subprocess
import sys
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genlab import hub
from genlab.config import config
from genlab.convert.keys import read_state
from genlab.hub import CARD, CONFIG, WEIGHTS, Model, from_pretrained, locate, sha256
from genlab.registry import TOKENIZERS


@config
class ToyConfig:
    """Sizes."""

    kind: Literal["toy"] = "toy"
    width: int = 8


class Toy(Model):
    """A kernel, a matrix, a vector, a scalar; buffers of floats and of integers."""

    kind = "toy"
    Config = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, config.width, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(config.width, 5)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("mean", torch.randn(config.width))
        self.register_buffer("count", torch.tensor([2**40 + 1]))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(TOKENIZERS._entries, "toy", Toy)
    torch.manual_seed(0)
    return Toy(ToyConfig())


@pytest.fixture
def saved(toy, tmp_path):
    return toy.save_pretrained(tmp_path / "checkpoints" / "toy")


def describe(folder, **changes):
    """Change a checkpoint's config.json; None removes a key."""
    path = folder / CONFIG
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def rewrite(folder, state):
    """Other weights, with the right hash."""
    save_file(state, folder / WEIGHTS)
    describe(folder, sha256=sha256(folder / WEIGHTS))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- round trips --------------------------------------------------------------------------------------------


def test_float32_comes_back_bit_for_bit(toy, tmp_path):
    toy.extra = {"tokenizer": "t", "data": {"classes": ["a", "ü"]}}
    folder = toy.save_pretrained(tmp_path / "a" / "b" / "toy", card="# hello\n")
    assert sorted(content(folder)) == [CARD, CONFIG, WEIGHTS]
    assert (folder / CARD).read_text() == "# hello\n"
    again = Toy.from_pretrained(folder)
    assert same(again.state_dict(), toy.state_dict())
    assert again.config == toy.config
    assert again.extra == {**toy.extra, "name": "toy"}
    assert not again.training
    assert again.save_pretrained(tmp_path / "c" / "toy")
    assert same(load_file(tmp_path / "c" / "toy" / WEIGHTS), load_file(folder / WEIGHTS))


def test_bf16_halves_the_file_and_rounds(toy, tmp_path):
    folder = toy.save_pretrained(tmp_path / "toy", dtype=torch.bfloat16)
    stored = load_file(folder / WEIGHTS)
    assert stored["conv.weight"].dtype == torch.bfloat16
    assert stored["count"].dtype == torch.long
    again = from_pretrained(folder).state_dict()
    for name, want in toy.state_dict().items():
        assert again[name].dtype == want.dtype
        assert torch.equal(again[name], want.to(torch.bfloat16).to(want.dtype) if want.is_floating_point() else want)
    low = from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert low["conv.weight"].dtype == torch.bfloat16
    assert low["count"].item() == 2**40 + 1


def test_int8_is_within_half_a_step_of_each_channel(toy, tmp_path):
    with torch.no_grad():
        toy.linear.weight[2] = 0  # a row without a scale of its own
        toy.linear.weight[3] *= 1000
    folder = toy.save_pretrained(tmp_path / "toy", dtype=torch.int8)
    stored = load_file(folder / WEIGHTS)
    again = from_pretrained(folder).state_dict()
    assert again.keys() == toy.state_dict().keys()
    for name, want in toy.state_dict().items():
        got = again[name]
        assert got.dtype == want.dtype
        if name in ("conv.weight", "linear.weight"):
            assert stored[name].dtype == torch.int8
            step = want.abs().flatten(1).amax(1) / 127
            worst = (got - want).abs().flatten(1).amax(1)
            assert (worst <= 0.501 * step + 1e-12).all()
            assert (worst[step > 0] > 0).all()
        elif want.is_floating_point():
            assert stored[name].dtype == torch.bfloat16
            assert ((got - want).abs() <= 2**-8 * want.abs()).all()
        else:
            assert torch.equal(got, want)


def test_another_kind_is_refused(saved, tiny_tokenizer):
    from tokenizers_img.kl_vae import KLVAE

    with pytest.raises(ValueError, match=r"holds a 'toy' \(Toy\), expected KLVAE"):
        KLVAE.from_pretrained(saved)
    assert KLVAE.from_pretrained(tiny_tokenizer).kind == "kl_vae"


# -- writing ------------------------------------------------------------------------------------------------


def half_a_file(state, path, **_):
    path.write_bytes(b"half")
    raise OSError("disk full")


@pytest.mark.parametrize("moment", ["weights", "description", "sync", "rename", "kill"])
@pytest.mark.parametrize("there", [True, False])
def test_a_save_that_fails_leaves_what_was_there(toy, tmp_path, monkeypatch, moment, there):
    folder = tmp_path / "toy"
    if there:
        toy.save_pretrained(folder)
        old = content(folder)
    with torch.no_grad():
        toy.scale.add_(1)
    if moment == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", half_a_file)
    elif moment == "description":
        toy.extra = {"trained": object()}  # not JSON
    elif moment == "sync":
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("i/o error")))
    else:
        rename = hub.Path.rename

        def fail(self, target):
            if self.name.endswith(".tmp"):
                raise KeyboardInterrupt if moment == "kill" else OSError("i/o error")
            return rename(self, target)

        monkeypatch.setattr(hub.Path, "rename", fail)
    with pytest.raises((OSError, TypeError, KeyboardInterrupt)):
        toy.save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == (["toy"] if there else [])
    if there:
        assert content(folder) == old
        assert from_pretrained(folder).scale.item() == pytest.approx(0.3)


def test_saving_again_replaces_all(toy, saved):
    toy.extra = {"note": "second"}
    with torch.no_grad():
        toy.scale.add_(1)
    toy.save_pretrained(saved, card="# second\n")
    assert from_pretrained(saved).scale.item() == pytest.approx(1.3)
    assert (saved / CARD).read_text() == "# second\n"
    assert [p.name for p in saved.parent.iterdir()] == ["toy"]
    assert saved.stat().st_mode & 0o777 == 0o755


def test_nothing_but_a_checkpoint_of_ours_is_replaced(toy, tmp_path):
    """`genlab convert … ~/Documents` must not empty the folder."""
    documents = tmp_path / "documents"
    documents.mkdir()
    toy.save_pretrained(documents)  # an empty folder is fine
    (documents / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex.*choose another folder"):
        toy.save_pretrained(documents)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / CONFIG).write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match=r"holds config.json.*no part of a genlab checkpoint"):
        toy.save_pretrained(foreign)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        toy.save_pretrained(tmp_path / "file")
    assert (documents / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("data", ["text ü", b"\x00\xff"])
def test_write_atomic(tmp_path, monkeypatch, data):
    path = tmp_path / "deep" / "file"
    hub.write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    monkeypatch.setattr(hub.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("i/o error")))
    with pytest.raises(OSError, match="i/o"):
        hub.write_atomic(path, "new")
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


# -- odd checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 40, -1])
def test_one_flipped_bit_is_noticed(saved, at):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[at] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged: SHA-256 .* says .*Fetch it again"):
        from_pretrained(saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights(saved, length):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:length])
    with pytest.raises(ValueError, match="is damaged"):
        from_pretrained(saved)
    for options in ({"verify": False}, {}):  # a checkpoint that carries no hash, too
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            from_pretrained(saved, **options)
        describe(saved, sha256=None)


def test_missing_weights(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors.*unfinished copy"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"_class_name": "AutoencoderKL"}', "not a genlab config.*genlab convert"),
        ("[1, 2]", "not a genlab config"),
        ('{"kind": ["toy"], "config": {}, "format": 1}', "not a genlab config"),
        ('{"kind": "toy"', "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_foreign_and_broken_descriptions(saved, text, match):
    (saved / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=match):
        from_pretrained(saved)
    (saved / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, r"checkpoint format 2, this genlab .* reads 1: `pip install -U genlab`"),
        ({"format": None}, "checkpoint format None"),
        ({"kind": "flextok9"}, r"unknown model kind 'flextok9'. Known: kl_vae,"),
        ({"kind": "os:system"}, "unknown model kind 'os:system'"),
        ({"kind": "tests.unit.test_hub.Toy"}, "unknown model kind"),
        (
            {"config": {"kind": "toy", "widht": 8}},
            r"config.json is not a valid ToyConfig:\n  widht: .*known: kind, width",
        ),
        ({"config": {"kind": "toy", "width": "wide"}}, "width: .*integer"),
        ({"config": {"kind": "other"}}, "kind: .*'toy'"),
        ({"config": 3}, "not a valid ToyConfig"),
        (
            {"config": {"kind": "toy", "width": 6}},
            r"wrong shape: .*conv.weight is \(8, 3, 3, 3\), expected \(6, 3, 3, 3\)",
        ),
    ],
)
def test_descriptions_that_dont_fit(saved, changes, match):
    describe(saved, **changes)
    with pytest.raises(ValueError, match=match):
        from_pretrained(saved)


def test_every_key_is_accounted_for(saved):
    state = load_file(saved / WEIGHTS)
    rewrite(saved, {**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not fit Toy: unexpected: extra.weight"):
        from_pretrained(saved)
    rewrite(saved, {k: v for k, v in state.items() if not k.startswith("linear")})
    with pytest.raises(ValueError, match=r"missing: linear\.weight, linear\.bias"):
        from_pretrained(saved)
    rewrite(saved, {f"k{i}": torch.zeros(1) for i in range(9)})
    with pytest.raises(ValueError, match=r"missing: .* … \(7 in all\); unexpected: .* … \(9 in all\)"):
        from_pretrained(saved)


class Payload:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused_and_not_run(saved, tmp_path):
    target = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists()  # the payload is a real one
    target.unlink()
    for write in (lambda p: p.write_bytes(pickle.dumps(Payload(target))), lambda p: torch.save(Payload(target), p)):
        write(saved / WEIGHTS)
        describe(saved, sha256=sha256(saved / WEIGHTS))
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            from_pretrained(saved)
        for suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors"):
            write(tmp_path / f"published{suffix}")
            with pytest.raises(ValueError, match=r"runs no code out of a checkpoint|not a whole safetensors file"):
                read_state(tmp_path / f"published{suffix}")
        (saved / "model.pt").write_bytes(pickle.dumps(Payload(target)))  # beside the weights: not looked at
        assert not target.exists()


def test_published_files(tmp_path):
    state = {"a.weight": torch.randn(2, 3)}
    torch.save({"model_ema": state, "epoch": 3}, tmp_path / "a.pth")
    assert same(read_state(tmp_path / "a.pth", "ema", "model_ema"), state)
    torch.save({"model": {"epoch": 3}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"holds no state dict \(looked under ema, model\)"):
        read_state(tmp_path / "b.pth", "ema", "model")
    save_file(state, tmp_path / "c.safetensors")
    assert same(read_state(tmp_path / "c.safetensors", "model"), state)
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        read_state(tmp_path / "d.pth")


# -- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nope", "../nope", "./nope", "/nope", "/nope/nope", "~/nope", "a/b/c", "http://x/y", "xar-cell-emoji64/.."]
)
def test_names_that_are_nothing(tmp_path, monkeypatch, name):
    """No network is asked, and the message says what there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"Shipped: .*genlab list") as error:
        locate(name)
    assert name in str(error.value)


def test_folders_that_are_none(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder without config.json.*genlab convert"):
        locate(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="it holds toy"):
        locate(saved.parent)


def test_a_local_folder_wins(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(iter(hub.shipped()), "owner/name")
    toy.save_pretrained(name)
    assert from_pretrained(name).kind == "toy"
    assert locate(tmp_path / name) == tmp_path / name


OFFLINE = """
import sys
from genlab.hub import from_pretrained
print(from_pretrained("someone/pixels").spec.describe())
try:
    from_pretrained("someone/else")
except FileNotFoundError as error:
    print(error)
"""


def test_the_hub_offline(tmp_path):
    """What is in the Hub's cache loads; what isn't is an error that says so, at once."""
    from tokenizers_img.pixels import Pixels, PixelsConfig

    revision = "0" * 40
    home = tmp_path / "hub" / "models--someone--pixels"
    Pixels(PixelsConfig(image_size=8, patch=4)).save_pretrained(home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found, missing = run.stdout.strip().split("\n", 1)
    assert found.startswith("continuous 2x2 raster, 48 channels")
    assert "no local checkpoint 'someone/else', and the Hub did not give one" in missing
    assert "genlab list" in missing


def test_int8_without_its_scale_is_refused():
    from genlab.hub import SCALE, dequantise

    whole = {"w": torch.full((2, 3), 2, dtype=torch.int8), "w" + SCALE: torch.tensor([1.0, 0.5])}
    assert torch.equal(dequantise(whole)["w"], torch.tensor([[2.0] * 3, [1.0] * 3]))
    with pytest.raises(ValueError, match="without their scale: w"):
        dequantise({"w": whole["w"]})


def test_the_zoo_wheel_is_found_and_the_package_wins(tmp_path, monkeypatch):
    for name, folder in hub.shipped().items():
        assert folder.is_dir()
        assert folder.name == name
    (tmp_path / "genlab_zoo" / "mine").mkdir(parents=True)
    (tmp_path / "genlab_zoo" / "__init__.py").write_text("")
    (tmp_path / "genlab_zoo" / "mine" / "config.json").write_text("{}")
    (tmp_path / "genlab_zoo" / "xar-cell-emoji64").mkdir()
    (tmp_path / "genlab_zoo" / "xar-cell-emoji64" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    found = hub.shipped()
    assert found["mine"] == tmp_path / "genlab_zoo" / "mine"
    assert found["xar-cell-emoji64"].parent.name == "weights"


# -- borrowed parts -----------------------------------------------------------------------------------------------


class Outer(Model):
    """A toy within another."""

    kind = "outer"
    Config = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.toy = Toy(config)
        self.more = nn.Linear(2, 2)


@pytest.fixture
def outer(saved, monkeypatch):
    monkeypatch.setitem(TOKENIZERS._entries, "outer", Outer)
    model = Outer(ToyConfig())
    model.toy.load_state_dict(from_pretrained(saved).state_dict())
    return model


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_borrowed_part_is_not_written_and_comes_back(outer, saved, tmp_path, dtype):
    folder = outer.save_pretrained(tmp_path / "outer", dtype=dtype, borrow={"toy": str(saved)})
    assert not any(k.startswith("toy.") for k in load_file(folder / WEIGHTS))
    back = from_pretrained(folder)
    for name, value in outer.toy.state_dict().items():
        assert torch.equal(value, back.toy.state_dict()[name]), name
    assert "borrowed" not in back.extra
    whole = from_pretrained(back.save_pretrained(tmp_path / "whole"))  # saved again it stands alone
    saved.rename(saved.with_name("gone"))
    assert torch.equal(from_pretrained(tmp_path / "whole").toy.linear.weight, whole.toy.linear.weight)
    with pytest.raises(FileNotFoundError, match=r"borrows its `toy` from .*, which isn't here: no checkpoint"):
        from_pretrained(folder)
    description = json.loads((folder / "config.json").read_text())
    for change in ({"borrowed": {"toy": "x"}}, {"borrowed": ["toy"]}, {"sha256": 5}, {"kind": None}):
        (folder / "config.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match="not a genlab config"):
            from_pretrained(folder)


def test_a_link_to_a_checkpoint_stays_one(saved, tmp_path, monkeypatch):
    model, link = from_pretrained(saved), tmp_path / "link"
    link.symlink_to(saved)
    with torch.no_grad():
        model.linear.weight.add_(1)
    model.save_pretrained(link)
    assert link.is_symlink()
    assert torch.equal(from_pretrained(saved).linear.weight, model.linear.weight)
    monkeypatch.chdir(saved)
    model.save_pretrained(".")
    assert torch.equal(from_pretrained(saved).linear.weight, model.linear.weight)
    assert not [p for p in (*saved.parent.iterdir(), *tmp_path.iterdir()) if p.name.startswith(".")]


def test_one_of_the_same_kind_lends_its_part_of_that_name(outer, tmp_path):
    lender = outer.save_pretrained(tmp_path / "lender")
    nn.init.normal_(outer.more.weight)
    folder = outer.save_pretrained(tmp_path / "outer", borrow={"toy": str(lender)})
    assert all(k.startswith("more.") for k in load_file(folder / "model.safetensors"))
    back = from_pretrained(folder)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in outer.state_dict().items())
    with pytest.raises(ValueError, match="can't be borrowed"):
        outer.save_pretrained(tmp_path / "other", borrow={"more": str(lender)})


def test_what_another_does_not_hold_is_not_borrowed(outer, saved, tmp_path):
    for change in (lambda: outer.toy.scale.data.add_(1), lambda: setattr(outer.toy, "conv", nn.Identity())):
        change()
        with pytest.raises(ValueError, match="can't be borrowed"):
            outer.save_pretrained(tmp_path / "outer", borrow={"toy": str(saved)})
        assert not (tmp_path / "outer").exists()


def test_a_lender_that_changed_is_noticed(outer, saved, toy, tmp_path):
    folder = outer.save_pretrained(tmp_path / "outer", borrow={"toy": str(saved)})
    toy.linear.weight.data.add_(1)
    toy.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"borrows its `toy` from .*take both from one release"):
        from_pretrained(folder)
    weights = saved / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="fetch it again"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_pretrained(folder, verify=False)
