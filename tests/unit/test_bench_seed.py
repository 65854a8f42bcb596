"""Caption metrics, retrieval, the independent classifier, and `genlab bench seed` on tiny models."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from eval import bench_seed
from eval.captions import bleu, cider
from eval.classify import classifier_of, fit_classifier, pooled, some_of_each
from eval.retrieval import beats_random, ranks, top_k
from genlab.cider import words_of
from genlab.cli import main
from genlab.data import open_images
from genlab.generators.seed_llama import SeedLlama, SeedLlamaConfig
from tests.unit.test_seed import painted
from tests.unit.test_seed_llama import LM
from tokenizers_img.vq import VQ, VQConfig
from train.documents import learn_pieces

# -- captions ---------------------------------------------------------------------------------------------------------


def test_a_reference_scores_ten_and_a_stranger_nothing():
    references = [["a red apple on a table"], ["two dogs run on green grass"], ["the flag of France waves"]]
    scores = cider([r[0] for r in references], references)
    assert scores == pytest.approx([10.0] * 3)
    assert cider(["nothing of it here at all", *(r[0] for r in references[1:])], references)[0] == 0


def test_cider_by_hand():
    """One word of weight log 2 shared, n = 1 alone: cosine 1/sqrt(2), of four n, times ten."""
    references = [["cat dog"], ["bird fish"]]
    got = cider(["cat", "bird fish"], references)[0]
    assert got == pytest.approx(10 / 4 * (1 / math.sqrt(2)) * math.exp(-1 / 72))
    # said three times it counts once, as often as in the reference; the length differs by one the other way
    again = cider(["cat cat cat", "bird fish"], references)[0]
    assert again == pytest.approx(
        10 / 4 * (math.log(2) ** 2) / (3 * math.log(2) * math.sqrt(2) * math.log(2)) * math.exp(-1 / 72)
    )


def test_words_that_all_images_share_weigh_nothing():
    references = [["an emoji of a cat"], ["an emoji of a dog"]]
    assert cider(["an emoji of a", "an emoji of a"], references) == pytest.approx([0, 0])


def test_several_references_and_words():
    a, b = cider(["a cat", "x y"], [["a cat", "something else entirely"], ["x y"]])
    assert a == pytest.approx(10 * (2 / 4) / 2)  # two words have no 3- and 4-grams; one of two references
    assert words_of("Flag: Åland Islands, 143 (left-hand)") == ["flag", "åland", "islands", "143", "left", "hand"]
    assert bleu(["a red apple on a table"], [["A red apple on a table", "else"]]) == pytest.approx(100)
    assert bleu(["a red apple on a table", "b c d e"], [["x"], ["b c d e", "f"]]) < 60


def test_captions_without_references_are_refused():
    for captions, references in ((["a"], []), ([], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="at least one reference an image"):
            cider(captions, references)


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_ranks():
    answers = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [3, 2, 1, 0], [1, 1, 1, 0]])
    assert ranks(queries, answers).tolist() == [0, 0, 2, 3]
    assert top_k(queries, answers, 1) == 0.5
    assert top_k(queries, answers, 3) == 0.75
    assert beats_random(queries, answers) == pytest.approx(1 - 5 / 4 / 3)


def test_answers_that_are_all_the_same_are_no_success():
    same = torch.ones(200, 3)
    assert top_k(torch.randn(200, 3), same, 5) == 0
    assert beats_random(torch.randn(200, 3), same) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="of one shape"):
        ranks(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="two rows"):
        beats_random(torch.ones(1, 3), torch.ones(1, 3))


# -- the classifier ---------------------------------------------------------------------------------------------------


def test_rare_classes_count_as_much():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 300 + [1] * 6)
    x = torch.randn(306, 4) + torch.where(labels == 1, 1.5, 0.0)[:, None]
    known = fit_classifier(x, labels, ("many", "few", "none"))
    said = known(x)
    assert float((said[labels == 1] == 1).double().mean()) > 0.8
    assert not bool((said == 2).any())
    with pytest.raises(ValueError, match="two classes at least"):
        fit_classifier(x, torch.zeros(306, dtype=torch.long), ("many", "few"))


def test_it_knows_red_from_blue(picture_folder):
    train = open_images(picture_folder, split="train", size=16)
    assert len(some_of_each(train, 5)) == 10
    held = open_images(picture_folder, split="heldout", size=16)
    right = classifier_of(train)(pooled(held.batch(range(len(held))))) == held.labels
    assert float(right.double().mean()) > 0.8


# -- the bench --------------------------------------------------------------------------------------------------------


def test_bench_seed(tmp_path, picture_folder, monkeypatch, capsys):
    shutil.copytree(picture_folder, tmp_path / "pictures")
    for image in (tmp_path / "pictures").rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square, number {image.stem}")
    monkeypatch.setattr(bench_seed, "PROMPTS", (("a red square", "red"), ("a blue square", "blue")))
    seed = painted(tmp_path).save_pretrained(tmp_path / "seed")
    sizes = {"image_size": 16, "patch": 2, "channels": (8, 16), "layers": 1, "decoder_layers": 1, "features": 8}
    vq = VQ(VQConfig(**sizes, norm_groups=4, attention_levels=(), codes=20, dim=4)).save_pretrained(tmp_path / "vq")
    for name, t, fields in (
        ("lm", seed, {"grid": (6,), "vocab": 40}),
        ("raster", vq, {"grid": (4, 4), "vocab": 20, "order": "raster"}),
    ):
        torch.manual_seed(0)
        model = SeedLlama(SeedLlamaConfig(lm=LM, text_vocab=300, text_length=24, **fields))
        model.extra |= {"tokenizer": str(t), "word_pieces": learn_pieces(["a red square", "a blue square"], 300)}
        model.save_pretrained(tmp_path / name)
    words = [str(tmp_path / "lm"), "--source", str(tmp_path / "pictures"), "--n", "8", "--shown", "3"]
    words += ["--counts", "1", "6", "--seeds", "2", "--each", "8", "--other", str(tmp_path / "raster")]
    monkeypatch.setattr(SeedLlama, "describe", short(SeedLlama.describe))
    assert main(["bench", "seed", "--model", *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "asked 30 %" in said
    assert "over discrete" in said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["captions"]["reference"]["cider"] == pytest.approx(10)
    assert set(result["codes_shown"]) == {"1", "6"}
    assert result["classifier"]["heldout_accuracy"] == 1
    assert len(result["over_other_codes"]) == 1
    for name in ("captions.png", "captions.md", "drawings.png", "reconstructions.png", "drawings-raster.png"):
        assert (tmp_path / "out" / name).is_file(), name
    assert (tmp_path / "out" / "captions.md").read_text().count("\n") == 2 + 3
    assert main(["bench", "seed", "--model", str(tmp_path / "vq")]) == 2
    assert "measures a seed_llama" in capsys.readouterr().err
    assert main(["bench", "seed", "--model", str(tmp_path / "raster")]) == 2
    assert "others go to --other" in capsys.readouterr().err


def short(describe):
    return lambda self, tokens, keep=None, **options: describe(self, tokens, keep, **{**options, "max_new": 5})


def test_images_are_spaced_and_differ_in_caption(tmp_path, picture_folder):
    shutil.copytree(picture_folder, tmp_path / "p")
    for image in (tmp_path / "p").rglob("*.png"):
        image.with_suffix(".txt").write_text(f"{image.parent.name} {int(image.stem) // 2}")
    held = open_images(tmp_path / "p", split="heldout", size=16)
    picks = bench_seed.spaced(held, 5)
    assert len({held.captions[i] for i in picks}) == 5
    assert len(bench_seed.spaced(held, 99)) == 12
    assert dataclasses.is_dataclass(bench_seed.SeedBenchConfig)
