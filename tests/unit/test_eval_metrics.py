"""Kernels, manifolds, Inception score, neighbours and reconstruction figures against brute force."""

import numpy as np
import pytest
import torch

from eval.inception_score import inception_score
from eval.kernels import cubic, discrepancy, gaussian, kernel_distance
from eval.manifold import in_single_precision, manifolds
from eval.neighbours import nearest, nearest_pixels, nearest_quantiles
from eval.reconstruction import decibels, psnr, reconstruction_figures, ssim


def cloud(n, d=8, seed=0, mean=0.0):
    return (np.random.default_rng(seed).standard_normal((n, d)) + mean).astype(np.float32)


@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_discrepancy_is_the_double_sum(kernel, monkeypatch):
    monkeypatch.setattr("eval.kernels.BLOCK", 16)
    x, y = cloud(50).astype(np.float64), cloud(37, seed=1, mean=0.3).astype(np.float64)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    unbiased = (xx.sum() - np.trace(xx)) / (50 * 49) + (yy.sum() - np.trace(yy)) / (37 * 36) - 2 * xy.mean()
    out = discrepancy(x, y, kernel)
    assert out.unbiased == pytest.approx(unbiased, rel=1e-9)
    assert out.biased == pytest.approx(xx.mean() + yy.mean() - 2 * xy.mean(), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_covers():
    """Equal distributions: the mean of 80 estimates lies within 4 of its own standard errors of 0 (false-alarm
    rate 6e-5). Different ones: of 80 intervals at 95 %, 12 or more misses have probability 0.001."""
    equal = np.array([discrepancy(cloud(60, seed=i), cloud(50, seed=1000 + i)).unbiased for i in range(80)])
    assert abs(equal.mean()) < 4 * equal.std() / np.sqrt(80)
    apart = [discrepancy(cloud(60, seed=i), cloud(50, seed=1000 + i, mean=0.5)) for i in range(80)]
    values = np.array([out.unbiased for out in apart])
    errors = np.array([out.standard_error for out in apart])
    assert (np.abs(values - values.mean()) > 1.96 * errors).sum() < 12
    assert errors.mean() < 1.5 * values.std()


def test_kernel_distance_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = cloud(400), cloud(300, seed=1, mean=0.2)
    theirs = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=300, verbose=False)
    ours = kernel_distance(x, y)
    assert ours.subset_size == 300
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert abs(ours.mean - ours.all_pairs.unbiased) < 3 * ours.standard_error


def test_manifolds_by_brute_force(monkeypatch):
    monkeypatch.setattr("eval.manifold.BLOCK", 16)
    monkeypatch.setattr("eval.manifold.WIDE", 24)
    x, y = cloud(60), cloud(45, seed=1, mean=0.4)
    out = manifolds(x, y)

    def distances(a, b):
        return np.sqrt(np.square(a[:, None].astype(np.float64) - b[None]).sum(-1))

    xy, xx, yy = distances(x, y), np.sort(distances(x, x)), np.sort(distances(y, y))
    assert out.precision == (xy <= yy[:, 3]).any(1).mean()
    assert out.recall == (xx[:, 3] >= xy.T).any(1).mean()
    assert out.density == pytest.approx((xy < yy[:, 5]).sum(1).mean() / 5)
    assert out.coverage == (xy.min(0) < yy[:, 5]).mean()
    np.testing.assert_array_equal(out.nearest_N, xy.argmin(1))


NAMES = ("precision", "recall", "density", "coverage")


def test_jackknife_leaves_groups_out(monkeypatch):
    """The standard errors are those of computing the figures anew without each group of either set."""
    monkeypatch.setattr("eval.manifold.BLOCK", 24)
    x, y = cloud(70), cloud(53, seed=1, mean=0.3)
    out = manifolds(x, y)
    variance = dict.fromkeys(NAMES, 0.0)
    for side in range(2):
        left = []
        for g in range(16):
            sets = [x, y]
            sets[side] = np.delete(sets[side], slice(g, None, 16), axis=0)
            left.append(manifolds(*sets))
        for name in NAMES:
            values = np.array([getattr(one, name) for one in left])
            variance[name] += 15 / 16 * np.square(values - values.mean()).sum()
    for name in NAMES:
        assert out.standard_errors[name] == pytest.approx(np.sqrt(variance[name]), rel=1e-9), name


def test_manifold_intervals_cover():
    """Of 60 intervals at 95 %, 10 or more misses have probability 0.001; the errors are at most twice too cautious."""
    outs = [manifolds(cloud(120, 16, seed=i), cloud(120, 16, seed=1000 + i, mean=0.2)) for i in range(60)]
    for name in NAMES:
        values = np.array([getattr(out, name) for out in outs])
        errors = np.array([out.standard_errors[name] for out in outs])
        assert (np.abs(values - values.mean()) > 1.96 * errors).sum() < 10, name
        assert errors.mean() < 2.0 * values.std(ddof=1), name


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = cloud(500, 16), cloud(400, 16, seed=1, mean=0.3)
    theirs = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    ours = manifolds(x, y)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-5)


def test_precision_in_torch_fidelitys_own_rounding():
    """Features that are large beside their distances: float32 decides some images otherwise, and is followed."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = cloud(500, 16) + np.float32(300), cloud(400, 16, seed=1, mean=0.3) + np.float32(300)
    theirs = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    assert in_single_precision(x, y) == (theirs["precision"], theirs["recall"])
    exact = manifolds(x, y)
    assert (exact.precision, exact.recall) != pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-5)


def test_manifolds_constructed():
    far = manifolds(cloud(30), cloud(30, seed=1, mean=50.0))
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    same = manifolds(cloud(30), cloud(30))
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    one_mode = manifolds(cloud(40, mean=10.0), np.concatenate([cloud(40, seed=1), cloud(40, seed=2, mean=10.0)]))
    assert one_mode.precision > 0.6
    assert one_mode.recall < 0.6
    with pytest.raises(ValueError, match="too few"):
        manifolds(cloud(3), cloud(30))


def test_inception_score_closed_forms():
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert inception_score(np.zeros((100, 7), np.float32))[0] == pytest.approx(1.0)
    one_hot = np.tile(np.eye(5, dtype=np.float32) * 200, (40, 1))
    assert inception_score(one_hot, splits=4, shuffle=False)[0] == pytest.approx(5.0)
    assert inception_score(np.sort(one_hot, axis=0), splits=1)[0] == pytest.approx(1.0)  # one class only
    logits = cloud(203, 30) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    mean, deviation, scores = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    assert len(scores) == 10
    halves = [inception_score(part, splits=1, shuffle=False)[0] for part in (logits[:150], logits[150:])]
    assert inception_score(logits, per_split=150, shuffle=False)[2] == pytest.approx(halves)  # ADM's: a short last one
    with pytest.raises(ValueError, match="3 images cannot be cut into 10"):
        inception_score(logits[:3])


@pytest.mark.parametrize("chunk", [7, 1000])
def test_nearest_by_brute_force(chunk):
    x, y = cloud(40) + 100, cloud(90, seed=1) + 100  # an offset, where the product alone loses digits
    y[33] = x[5]
    distance, index = nearest(x, y, k=3, chunk=chunk)
    brute = np.sqrt(np.square(x[:, None].astype(np.float64) - y[None]).sum(-1))
    np.testing.assert_array_equal(index, np.argsort(brute, axis=1)[:, :3])
    np.testing.assert_allclose(distance, np.sort(brute, axis=1)[:, :3])
    assert (distance[5, 0], index[5, 0]) == (0.0, 33)
    tiled = nearest(x, [y[:11], y[11:50], y[50:]], k=3, chunk=chunk)
    np.testing.assert_array_equal(tiled[1], index)
    own, own_index = nearest(y, y, chunk=chunk, exclude_self=True)
    assert (own > 0).all()
    assert (own_index[:, 0] != np.arange(90)).all()
    with pytest.raises(ValueError, match="too few"):
        nearest(x, y[:2], k=3)


def test_nearest_pixels_finds_a_copy():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8))
    distance, index = nearest_pixels(images[7:9], images)
    assert distance[:, 0].tolist() == [0.0, 0.0]
    assert index[:, 0].tolist() == [7, 8]
    pale = np.full((400, 3000), 250, np.uint8)  # all alike but for two pixels
    pale[np.arange(400), np.arange(400)] = pale[np.arange(400), np.arange(400) + 1000] = 252
    pale = pale.reshape(400, 3, 10, 100)
    assert nearest_pixels(pale[:50], pale)[1][:, 0].tolist() == list(range(50))
    brighter = (images[:1].int() + 1).clamp(max=255).byte()
    assert nearest_pixels(brighter, images)[0][0, 0] == pytest.approx(1.0, abs=0.01)
    assert nearest_quantiles(torch.cat([brighter, images[1:3]]), images, (0, 0.5, 1)) == pytest.approx(
        [0, 0, 1], abs=0.01
    )


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    original = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    original[:2, :, 8:16, 8:16] = torch.from_numpy(rng.integers(0, 200, (2, 3, 8, 8), dtype=np.uint8))
    other = original.clone()
    other[:2, :, 8:16, 8:16] += 10
    inside = 10 * np.log10(255**2 / 100)
    np.testing.assert_allclose(psnr(original, other), [inside + 10 * np.log10(16)] * 2 + [100.0], rtol=1e-6)
    foreground = psnr(original, other, foreground=True)
    np.testing.assert_allclose(foreground[:2], inside, rtol=1e-6)
    assert np.isnan(foreground[2])  # nothing but background
    assert ssim(original, original).min() == pytest.approx(1.0)
    assert ssim(original, other)[0] < 1.0
    figures = reconstruction_figures([(original[:1], other[:1]), (original[1:], other[1:])])
    assert figures["psnr_foreground"].value == pytest.approx(inside)
    assert len(figures["psnr"].values_N) == 3
    with pytest.raises(ValueError, match="one shape"):
        psnr(original, other[:2])
    with pytest.raises(ValueError, match="unknown metric"):
        reconstruction_figures([], metrics=("nope",))
    small = original[:, :, :10]
    with pytest.raises(ValueError, match=r"ssim needs images of at least 11 pixels a side, got \(10, 32\)"):
        reconstruction_figures([(small, small)], metrics=("psnr", "ssim"))


def test_perceptual_distances(monkeypatch, tmp_path):
    from torchvision.models import _api

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (2, 3, 8, 8)).astype(np.float32))
    original = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 255).byte()
    noise = torch.from_numpy(rng.standard_normal((2, 3, 64, 64)))
    near, far = ((original + s * noise).round().clamp(0, 255).byte() for s in (5, 50))
    values = [
        reconstruction_figures([(original, x)], metrics=("stlpips",))["stlpips"].value for x in (original, near, far)
    ]
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert values[0] < values[1] < values[2]

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)curl -L --create-dirs -o .*alexnet.*stlpips"):
        reconstruction_figures([(original, near)], metrics=("lpips",))


def test_few_subsets_are_less_sure():
    few, many = (kernel_distance(cloud(120), cloud(120, seed=1), subsets=n, subset_size=40) for n in (4, 100))
    for found, n in ((few, 4), (many, 100)):
        choice = found.standard_error**2 - found.all_pairs.standard_error**2
        assert choice == pytest.approx(found.subset_deviation**2 / n)


def test_no_error_at_all_is_capped():
    assert decibels(torch.tensor([0.0, 255.0**2])).tolist() == [100.0, 0.0]
