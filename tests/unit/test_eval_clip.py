"""CLIP and DINOv2 extractors and the CLIP score, on tiny random models in the real file forms."""

import json
import shutil

import numpy as np
import pytest
import torch

from eval.features import CLIPImage, DINOv2
from eval.kernels import discrepancy, gaussian
from eval.text import clip_scores

transformers = pytest.importorskip("transformers")


def images(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPConfig(
        text_config=shape | {"vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1},
        vision_config=shape | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine(clip):
    x, words = images(3), ["a cat", "a dog", "fish"]
    scores = clip_scores([(x[:2], words[:2]), (x[2:], words[2:])], model=clip)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    for i in range(3):
        with torch.no_grad():
            out = model(**processor(text=[words[i]], images=[x[i]], return_tensors="pt"))
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert scores[i] == pytest.approx(100 * max(cosine, 0.0), abs=1e-3)
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        clip_scores([(x[:2], words[:1])], model=clip)


def test_clip_embeddings_are_transformers_own(clip):
    extractor = CLIPImage(clip)
    x = images(2)
    ours = extractor(x)["pool"]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    pictures = [image.permute(1, 2, 0).numpy() for image in x]
    with torch.no_grad():
        theirs = model(**processor(text=["a"], images=pictures, return_tensors="pt")).image_embeds
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert discrepancy(ours, ours, gaussian).biased == pytest.approx(0.0, abs=1e-12)


def test_cmmd_and_clip_score_through_evaluate(clip, tmp_path):
    """Both by name, from a folder with captions, with the weights that `--weights NAME FOLDER` gives."""
    from PIL import Image

    import eval as E

    x, y = images(9), images(7, seed=1)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    weights = {"clip-vit-l14-336": clip, "clip_score": clip}
    result = E.evaluate(tmp_path, y, metrics=("cmmd", "clip_score"), weights=weights, batch_size=4)
    extractor = CLIPImage(clip)
    expected = discrepancy(extractor(x)["pool"], extractor(y)["pool"], gaussian)
    assert result["cmmd"].value == pytest.approx(1000 * expected.biased, rel=1e-3)
    assert result["cmmd"].standard_error == pytest.approx(1000 * expected.standard_error, rel=1e-3)
    scores = clip_scores([(x, [f"number {i}" for i in range(9)])], model=clip)
    assert result["clip_score"].value == pytest.approx(scores.mean(), abs=1e-3)
    assert result["clip_score"].extractor.startswith(f"{clip.name}/")
    assert result.protocol == "genlab"


def test_a_clip_with_missing_weights_is_refused(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip, tmp_path / "half")
    state = load_file(tmp_path / "half" / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights missing, first visual_projection"):
        CLIPImage(tmp_path / "half")


def test_missing_clip_says_how_to_fetch(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        CLIPImage(tmp_path / "nothing")


def test_dinov2_takes_the_class_token(tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(DINOv2, "model", "vit_small_patch14_dinov2.lvd142m")
    torch.manual_seed(0)
    network = timm.create_model(DINOv2.model, pretrained=False, num_classes=0, img_size=224)
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    extractor = DINOv2(tmp_path / "dino.pth")
    x = images(1)
    out = extractor(x)["pool"]
    assert out.shape == (1, 384)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = network.eval().forward_features((extractor.prepare(x).clamp(0, 255) / 255 - mean) / std)
    np.testing.assert_allclose(out, tokens[:, 0].numpy(), atol=1e-5)
    import eval as E

    options = {"weights": tmp_path / "dino.pth", "batch_size": 3, "reference_is_sample": False}
    result = E.evaluate(images(3), images(3, seed=1), metrics=("fd_dinov2",), **options)
    assert result["fd_dinov2"].value > 0
    assert result["fd_dinov2"].extractor.startswith("dinov2-vit-l14/")
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights"):
        DINOv2(tmp_path / "none.pth")
