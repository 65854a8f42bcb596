"""The best of several drawings."""

import json

import pytest
import torch

from genlab.cli import main
from genlab.rerank import Judge, candidate_seeds
from tests.unit.test_seed import painted
from tests.unit.test_seed_llama import make


def test_more_candidates_hold_the_fewer():
    seeds = torch.tensor([0, 7, 2**31])
    assert candidate_seeds(seeds, 1).tolist() == seeds.tolist()
    four, two = candidate_seeds(seeds, 4).view(3, 4), candidate_seeds(seeds, 2).view(3, 2)
    assert torch.equal(four[:, :2], two)
    assert torch.equal(four[:, 0], seeds)
    assert len(set(four.flatten().tolist())) == 12


class ByBrightness:
    """A judge's model: captions and images lie on a circle, by their first digit and by their brightness."""

    kind, device = "bright", torch.device("cpu")

    class config:
        contrastive_dim, image_size = 2, 4

    def embed_text(self, captions):
        return self.on_circle(torch.tensor([float(c) for c in captions]))

    def embed_images(self, images):
        assert images.shape[-2:] == (4, 4)
        return self.on_circle((images.mean((1, 2, 3)) + 1) / 2)

    def state_dict(self):
        return {}

    def on_circle(self, x):
        return torch.stack([torch.cos(x), torch.sin(x)], 1)


def test_the_best_is_the_one_that_fits():
    levels = torch.tensor([0, 51, 102, 153, 204, 255])
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8)
    judge = Judge(ByBrightness(), "it")
    assert judge.best(images, ["0.2", "1"], 3).tolist() == [1, 5]
    assert judge.best(images, ["0.15", "0.45", "0.95"], 2).tolist() == [1, 2, 5]
    assert judge(images, ["0.2"] * 6, batch_size=4).argmax() == 1


def test_best_of_in_the_sample_command(tmp_path, capsys, monkeypatch):
    seed = painted(tmp_path)
    seed.save_pretrained(tmp_path / "seed")
    model = make(vocab=40, grid=(6,))
    model.extra["tokenizer"] = str(tmp_path / "seed")
    model.save_pretrained(tmp_path / "lm")
    words = ["sample", str(tmp_path / "lm"), "--prompt", "a red square", "--seeds", "0-1", "--grid"]
    best = ["--best-of", "3", "--judge", str(tmp_path / "seed")]
    grid = lambda name: str(tmp_path / name / "grid.png")  # noqa: E731
    assert main([*words, grid("one")]) == 0
    assert main([*words, grid("three"), *best]) == 0
    note = json.loads((tmp_path / "three" / "manifest.json").read_text())
    assert (note["best_of"]["n"], note["best_of"]["judge"]) == (3, str(tmp_path / "seed"))
    assert note["stats"]["images"] == 2
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["best_of"] is None
    # a judge that always takes the first leaves what is drawn without one
    monkeypatch.setattr(Judge, "best", lambda self, images, captions, n: n * torch.arange(len(images) // n))
    assert main([*words, grid("first"), *best]) == 0
    pixels = [(tmp_path / name / "grid.png").read_bytes().split(b"IDAT")[1] for name in ("one", "first")]
    assert pixels[0] == pixels[1]
    # single images: other settings are refused, the same go on
    out = ["--out", str(tmp_path / "out")]
    assert main([*words[:-1], *out]) == 0
    assert main([*words[:-1], *out, *best]) == 2
    assert "holds images of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--best-of", "0"], "must be at least 1"),
        (["--best-of", "2", "--judge", "vq-f4-emoji64"], "no space of images and captions"),
        (["--best-of", "2", "--tokens", "1"], "doesn't go with --tokens"),
    ],
)
def test_what_can_not_be_chosen_is_refused(tmp_path, capsys, words, message):
    painted(tmp_path).save_pretrained(tmp_path / "seed")
    model = make(vocab=40, grid=(6,))
    model.extra["tokenizer"] = str(tmp_path / "seed")
    model.save_pretrained(tmp_path / "lm")
    if "--judge" not in words:
        words = [*words, "--judge", str(tmp_path / "seed")]
    assert main(["sample", str(tmp_path / "lm"), "--prompt", "a", *words, "--grid", str(tmp_path / "g.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "g.png").exists()


def test_a_model_by_class_has_no_best(tmp_path, capsys):
    assert main(["sample", "flexar-emoji64", "--best-of", "2", "--grid", str(tmp_path / "g.png")]) == 2
    assert "draws by class" in capsys.readouterr().err
