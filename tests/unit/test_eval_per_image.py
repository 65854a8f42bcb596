"""Figures of pairs and of captioned images through `evaluate`, and published references."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval as E
from eval.frechet import frechet_with_error
from eval.harness import METRICS, Metric
from eval.per_image import PER_IMAGE
from eval.protocols import PROTOCOLS, protocol, published_reference
from eval.reconstruction import psnr, ssim
from eval.statistics import statistics_of


def pair(n=12, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (n, 3, 4, 4)).astype(np.float32))
    x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255).byte()
    noise = torch.from_numpy(rng.integers(-9, 10, x.shape))
    return x, (x.int() + noise).clamp(0, 255).byte()


def save(folder, images, captions=False):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
        if captions:
            (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    return folder


def test_reconstruction_figures_through_evaluate(tmp_path):
    x, y = pair()
    one, two = save(tmp_path / "decoded", y), save(tmp_path / "originals", x)
    result = E.evaluate(one, two, metrics=("psnr", "ssim", "fd_efficientnet_lite0"), batch_size=5)
    values = psnr(x, y)
    figure = result["psnr"]
    assert figure.value == pytest.approx(values.mean())
    assert figure.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(12))
    assert figure.low < figure.value < figure.high
    assert result["ssim"].value == pytest.approx(ssim(x, y).mean())
    assert [f.name for f in result.figures] == ["psnr", "ssim", "fd_efficientnet_lite0"]
    alone = E.evaluate(one, two, metrics=("psnr",))
    assert alone["psnr"] == figure
    assert (alone.generated.n, alone.reference.n) == (12, 12)
    assert alone.generated.hash == result.generated.hash
    with pytest.raises(ValueError, match="12 reconstructions, but 7 originals"):
        E.evaluate(y, x[:7], metrics=("psnr",))
    with pytest.raises(ValueError, match="psnr needs a reference"):
        E.evaluate(y, metrics=("psnr",))
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"holds statistics .* the images themselves"):
        E.evaluate(y, tmp_path / "s.npz", metrics=("psnr",))
    with pytest.raises(ValueError, match=r"weights for inception; expected .*inception-2015"):
        E.evaluate(y, x, metrics=("psnr",), weights={"inception": "w.pth"})
    with pytest.raises(ValueError, match="not a stream"):
        E.evaluate(iter([y]), x, metrics=("psnr",))


def test_rfid_is_fid_of_pairs(monkeypatch):
    monkeypatch.setitem(METRICS, "rfd", Metric("paired_frechet", "efficientnet-lite0"))
    x, y = pair()
    out = E.evaluate(y, x, metrics=("rfd", "fd_efficientnet_lite0"))
    assert out["rfd"].value == out["fd_efficientnet_lite0"].value
    assert METRICS["rfid"] == Metric("paired_frechet", "inception-2015")
    with pytest.raises(ValueError, match=r"equally many, got 12 and 9"):
        E.evaluate(y, x[:9], metrics=("rfd",))


def test_paired_interval_covers():
    """Reconstructions vary with their originals. Of 120 intervals at 95 %, more than 14 miss with probability 0.001;
    taking the two sets for independent would make them too wide by the share asserted last."""
    rng = np.random.default_rng(0)
    values, errors, apart = [], [], []
    for _ in range(120):
        x = rng.standard_normal((300, 8)) * np.arange(1, 9) ** -0.5
        y = 0.8 * x + 0.1 * rng.standard_normal(x.shape) + 0.2
        a, b = statistics_of(y), statistics_of(x)
        one, two = (
            frechet_with_error(a, b, tiles=lambda y=y: [y], reference_tiles=lambda x=x: [x], paired=paired)
            for paired in (True, False)
        )
        values.append(one.value)
        errors.append(one.standard_error)
        apart.append(two.standard_error)
    values, errors = np.array(values), np.array(errors)
    assert (np.abs(values - values.mean()) > 1.96 * errors).sum() <= 14
    assert errors.mean() < 1.3 * values.std(ddof=1)
    assert np.mean(apart) > 1.5 * errors.mean()


def test_clip_score_through_evaluate(tmp_path, monkeypatch):
    """Captions come with the images; the score itself is tested in test_eval_clip.py."""
    import eval.text

    x, _ = pair(5)
    seen = []

    def scores(pairs, *, model, device):
        batches = list(pairs)
        seen.extend(caption for _, captions in batches for caption in captions)
        return np.concatenate([np.full(len(images), 20.0) + len(c) for images, c in batches])

    monkeypatch.setattr(eval.text, "clip_scores", scores)
    path = save(tmp_path / "a", x, captions=True)
    figure = E.evaluate(path, metrics=("clip_score",), batch_size=2, weights={"clip_score": "some/clip"})["clip_score"]
    assert seen == [f"picture {i}" for i in range(5)]
    assert figure.value == pytest.approx(21.8)
    assert figure.extractor == "some/clip"
    assert figure.better == "higher"
    seen.clear()
    E.evaluate(path, metrics=("clip_score",), n=3)
    assert seen == [f"picture {i}" for i in range(3)]
    (path / "002.txt").unlink()
    with pytest.raises(ValueError, match="caption for every image, 1 of 5 have none"):
        E.evaluate(path, metrics=("clip_score",))
    with pytest.raises(ValueError, match="5 of 5 have none"):
        E.evaluate(x, metrics=("clip_score",))


def test_no_name_means_two_things():
    assert not set(METRICS) & set(PER_IMAGE)


def test_published_references_belong_to_a_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rules = protocol("adm")
    url = PROTOCOLS["adm"].references["imagenet256"]
    with pytest.raises(FileNotFoundError, match=rf"curl -L --create-dirs -o {tmp_path}/references/VIRTUAL.* {url}"):
        published_reference(rules, "imagenet256", tmp_path)
    with pytest.raises(ValueError, match=r"protocol torch-fidelity has no published reference 'imagenet256'.*adm: "):
        E.evaluate(pair()[0], "published:imagenet256", metrics=("fd_efficientnet_lite0",))
    file = tmp_path / "references" / url.rsplit("/", 1)[-1]
    file.write_bytes(b"x")
    assert published_reference(rules, "imagenet256", tmp_path) == file

    def dropped(url, path):
        path.write_bytes(b"half")
        raise OSError("connection lost")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("urllib.request.urlretrieve", dropped)
    with pytest.raises(FileNotFoundError, match="connection lost"):
        published_reference(rules, "imagenet512", tmp_path)
    assert [p.name for p in (tmp_path / "references").iterdir()] == [file.name]  # no half-written file
