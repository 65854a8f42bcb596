"""Extractors against the packages they stand for; resizes against those packages' own functions."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features import EfficientNetLite0, Inception2015, padded
from eval.protocols import PROTOCOLS, protocol
from eval.resize import resize_images


def images(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).byte()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random Inception weights whose activations stay of order one, saved as torch-fidelity reads them."""
    from unittest import mock

    import torch_fidelity.feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with (
        mock.patch.object(torch.nn.Module, "load_state_dict"),
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
    ):
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2.0 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.3)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


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
    np.testing.assert_array_equal(out["pool"], pool.numpy())
    np.testing.assert_array_equal(out["logits"], logits.numpy())
    spatial = seen["mixed_6"][:, :7].numpy().transpose(0, 2, 3, 1).reshape(2, -1)  # ADM's NHWC order
    np.testing.assert_array_equal(out["spatial"], spatial)
    assert out["spatial"].shape == (2, 2023)
    np.testing.assert_array_equal(ours(x, ("spatial",))["spatial"], spatial)
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

    from eval.features import _packaged_lite0

    ours = EfficientNetLite0()
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(_packaged_lite0(), weights_only=True)
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
    for c in range(3):  # clean-fid's function: float32 channel, mode F, bicubic
        channel = Image.fromarray(x[1, c].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(clean[c], np.asarray(channel))
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
def test_every_inception_figure_is_torch_fidelitys(inception_weights, tmp_path):
    """FID, KID, IS, precision and recall on real images in folders of PNGs, one run of each harness."""
    import torch_fidelity

    import eval as E
    from genlab.data import open_images

    real = open_images("emoji", split="heldout").batch(range(0, 1200, 50))
    for k in range(2):
        (tmp_path / f"{k}").mkdir()
        for i, image in enumerate(real[k::2]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}" / f"{i:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "0"), input2=str(tmp_path / "1"), fid=True, kid=True, isc=True, prc=True,
        kid_subset_size=12, feature_extractor="inception-v3-compat", save_cpu_ram=True, batch_size=12,
        feature_extractor_weights_path=str(inception_weights), cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    ours = E.evaluate(
        tmp_path / "0", tmp_path / "1", metrics=("fid", "kid", "is", "precision", "recall"), batch_size=12,
        weights=inception_weights, cache=tmp_path / "cache",
    )  # fmt: skip
    with E.harness.open_features(
        tmp_path / "1", Inception2015(inception_weights), ("pool",), cache=tmp_path / "cache"
    ) as features:
        scale = float(np.trace(features.statistics("pool").cov_DD))
    assert abs(ours["fid"].value - theirs["frechet_inception_distance"]) <= 1e-5 * scale
    assert ours["kid"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert ours["is"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-5)
    assert ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-5)
    assert ours.protocol == "torch-fidelity"
    assert not ours["fid"].extractor.startswith("efficientnet")
