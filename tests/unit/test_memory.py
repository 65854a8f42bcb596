"""Remembered images: who is nearest, what survives a checkpoint, which caption is given."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genlab.cider import Cider
from genlab.cli import main
from genlab.data import open_images
from genlab.generators.seed_llama import SeedLlama
from genlab.hub import from_pretrained
from genlab.memory import Memory
from genlab.pictures import to_float
from tests.unit.test_bench_seed import short
from tests.unit.test_seed import painted
from tests.unit.test_seed_llama import make


def features(n=12, channels=7):
    return torch.rand(n, channels, generator=torch.Generator().manual_seed(3))


def test_an_image_is_nearest_to_itself_and_captions_come_once():
    caption = torch.tensor([0, 1, 2, 3, 4, 5] * 2)  # two images each
    memory = Memory.of(features(), caption, 7)
    likeness, found = memory.nearest(features(), 6)
    assert torch.equal(found[:, 0], caption)
    assert likeness[:, 0] == pytest.approx(torch.ones(12), abs=1e-5)
    assert all(len(set(row)) == 6 for row in found.tolist())
    assert bool((likeness.diff(dim=1) <= 0).all())
    assert memory.nearest(features(), 99)[1].shape == (12, 6)  # there are no more


def test_all_axes_keep_all_cosines_and_few_keep_the_order():
    x = features(30)
    unit = torch.nn.functional.normalize(x, dim=-1)
    exact = (unit @ unit.T).topk(5, dim=1)
    likeness, found = Memory.of(x, torch.arange(30), 7).nearest(x, 5)
    assert torch.equal(found, exact.indices)
    assert likeness == pytest.approx(exact.values, abs=1e-5)
    assert torch.equal(Memory.of(x, torch.arange(30), 5).nearest(x, 1)[1][:, 0], torch.arange(30))


WORDS = st.lists(st.sampled_from(["a", "cat", "dog", "red", "flag"]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_captions_have_in_common_what_the_other_has_with_them(a, b):
    cider = Cider([["a cat"], ["a dog"], ["red flag"]])
    assert 0 <= cider(a, b) <= 10 + 1e-9
    if len(set(a.split())) == len(a.split()) and len(set(b.split())) == len(b.split()):  # nothing is clipped
        assert cider(a, b) == pytest.approx(cider(b, a))


def captioned(tmp_path, picture_folder, **changes):
    """A model over a tiny seed that remembers the training pictures, and both."""
    seed = painted(tmp_path, contrastive_dim=0)  # untrained, its space would know no captions
    model = make(vocab=40, grid=(6,), neighbours=2, **changes)
    model.extra["tokenizer"] = str(seed.save_pretrained(tmp_path / "seed"))
    train = open_images(picture_folder, split="train", size=16)
    x = to_float(train.batch(range(len(train))))
    from genlab.memory import Looks

    model.remember(Looks("efficientnet-lite0", 16)(x), [f"a {train.classes[y]} square" for y in train.labels.tolist()])
    return model, seed


def test_a_held_out_picture_is_called_as_those_like_it(tmp_path, picture_folder, monkeypatch, capsys):
    model, seed = captioned(tmp_path, picture_folder)
    monkeypatch.setattr(SeedLlama, "describe", short(SeedLlama.describe))
    held = open_images(picture_folder, split="heldout", size=16)
    x, names = to_float(held.batch(range(len(held)))), [f"a {held.classes[y]} square" for y in held.labels.tolist()]
    likeness, found = model.recall(x)
    assert likeness.shape == (len(held), 2)
    assert [row[0] for row in found] == names
    assert [row[0] for row in model.recall(x, 1)[1]] == names
    given_ = model.caption(x, seed)
    assert given_ == names
    assert model.caption(x, seed, neighbours=0) == model.describe(seed.encode(x))

    again = from_pretrained(model.save_pretrained(tmp_path / "lm"))  # the memory is part of the checkpoint
    assert again.caption(x, seed) == given_
    picture = sorted(picture_folder.rglob("*.png"))[0]
    words = ["caption", str(picture), "--model", str(tmp_path / "lm"), "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)[0]["caption"]
    assert main([*words, "--neighbours", "0"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["caption"] != said == f"a {picture.parent.name} square"
    for more, message in (
        (["--neighbours", "-1"], "must not be negative"),
        (["--neighbours", "2", "--temperature", "1"], "goes with neither"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_merged_model_remembers():
    model = make(vocab=40, lora_rank=2)
    model.remember(features(), [f"caption {i}" for i in range(12)])
    merged = model.merged()
    assert torch.equal(merged.memory.vectors_ND, model.memory.vectors_ND)
    assert float(merged.memory.vectors_ND.abs().sum()) > 0
    assert merged.extra["memory"] == model.extra["memory"]


def test_what_can_not_be_remembered_is_refused(tmp_path, picture_folder, capsys):
    model = make()
    with pytest.raises(ValueError, match="one caption an image, got 2 and 3"):
        model.remember(features(3), ["a", "b"])
    with pytest.raises(ValueError, match="remembers no images"):
        model.recall(torch.zeros(1, 3, 16, 16))
    remembering = make(vocab=40)
    remembering.remember(features(), [f"caption {i}" for i in range(12)])
    with pytest.raises(ValueError, match="neighbours must be at most 256, got 99999"):
        remembering.vote(torch.zeros(1, 3, 16, 16), None, ["a"], 99999)
    model.extra["tokenizer"] = str(painted(tmp_path).save_pretrained(tmp_path / "seed"))
    model = make(vocab=40)
    model.extra["tokenizer"] = str(tmp_path / "seed")
    model.save_pretrained(tmp_path / "lm")
    picture = sorted(picture_folder.rglob("*.png"))[0]
    assert main(["caption", str(picture), "--model", str(tmp_path / "lm"), "--neighbours", "3"]) == 2
    assert "remembers no images" in capsys.readouterr().err
    for wrong, words in (
        (["--beams", "0"], "--beams must be at least 1"),
        (["--max-new", "-1"], "--max-new must be at least 1"),
        (["--top-p", "2"], "--top-p must be above 0 and at most 1"),
        (["--temperature", "-1"], "--temperature must not be negative"),
    ):
        assert main(["caption", str(picture), "--model", str(tmp_path / "lm"), *wrong]) == 2
        assert words in capsys.readouterr().err
