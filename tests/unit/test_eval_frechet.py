"""The Fréchet term against closed forms, scipy and torch-fidelity; its interval against simulation."""

import numpy as np
import pytest
import scipy.linalg

from eval.frechet import (
    frechet_distance,
    frechet_of_features,
    frechet_with_error,
    trace_root,
    trace_root_features,
    trace_root_gram,
)
from eval.infinity import frechet_infinity
from eval.statistics import Statistics, statistics_of


def gaussian(d, seed, n, decay=1.0, mean=0.3):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((d, d)) * np.arange(1, d + 1) ** (-decay / 2)
    return rng.standard_normal((n, d)) @ factor.T + mean * rng.standard_normal(d)


def scale(a, b):
    return np.trace(a.cov_DD) + np.trace(b.cov_DD)


def scipy_distance(a, b):
    root = scipy.linalg.sqrtm(a.cov_DD @ b.cov_DD)
    delta = a.mean_D - b.mean_D
    return delta @ delta + np.trace(a.cov_DD) + np.trace(b.cov_DD) - 2 * np.trace(root).real


def torch_fidelity_distance(a, b):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, two = ({"mu": s.mean_D, "sigma": s.cov_DD} for s in (a, b))
    return fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]


def test_closed_forms():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    p, q = rng.random(12) + 0.1, rng.random(12)
    mu = rng.standard_normal(12)
    a = Statistics(mean_D=np.zeros(12), cov_DD=basis @ np.diag(p) @ basis.T)
    b = Statistics(mean_D=mu, cov_DD=basis @ np.diag(q) @ basis.T)
    assert frechet_distance(a, a) <= 1e-8 * scale(a, a)
    commuting = mu @ mu + np.square(np.sqrt(p) - np.sqrt(q)).sum()
    assert frechet_distance(a, b) == pytest.approx(commuting, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(commuting, rel=1e-10)
    scaled = Statistics(mean_D=np.zeros(12), cov_DD=9 * a.cov_DD)
    assert frechet_distance(a, scaled) == pytest.approx(4 * p.sum(), rel=1e-10)
    shifted = Statistics(mean_D=mu, cov_DD=a.cov_DD)
    assert frechet_distance(a, shifted) == pytest.approx(mu @ mu, rel=1e-9)


def test_two_by_two_closed_form():
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    m = a @ b
    assert trace_root(a, b) == pytest.approx(np.sqrt(np.trace(m) + 2 * np.sqrt(np.linalg.det(m))), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(400, 500), (40, 500), (400, 30), (40, 30)])
def test_agrees_with_scipy_and_torch_fidelity(n, m):
    a, b = statistics_of(gaussian(64, 0, n)), statistics_of(gaussian(64, 1, m))
    ours = frechet_distance(a, b)
    assert abs(ours - scipy_distance(a, b)) <= 1e-6 * scale(a, b)
    assert abs(ours - torch_fidelity_distance(a, b)) <= 1e-6 * scale(a, b)


@pytest.mark.parametrize(("n", "m"), [(100, 100), (100, 77), (60, 900), (300, 50), (500, 400)])
def test_low_rank_routes_are_exact(n, m):
    x, y = gaussian(256, 0, n), gaussian(256, 1, m)
    a, b = statistics_of(x), statistics_of(y)
    plain = frechet_distance(a, b)
    tolerance = 1e-6 * scale(a, b)
    assert abs(trace_root_features(x, y) - trace_root(a.cov_DD, b.cov_DD)) <= tolerance
    assert abs(trace_root_gram(x, b.cov_DD) - trace_root(a.cov_DD, b.cov_DD)) <= tolerance
    assert abs(frechet_of_features(x, y) - plain) <= tolerance
    assert abs(frechet_of_features(x, b) - plain) <= tolerance
    result = frechet_with_error(a, b, tiles=lambda: [x], reference_tiles=lambda: [y])
    assert abs(result.value - plain) <= tolerance


def test_zero_covariance_and_other_dimension():
    still = statistics_of(np.ones((5, 8)))
    moving = statistics_of(gaussian(8, 0, 50))
    delta = still.mean_D - moving.mean_D
    assert frechet_distance(still, moving) == pytest.approx(delta @ delta + np.trace(moving.cov_DD))
    with pytest.raises(ValueError, match="8 and 9 dimensions"):
        frechet_distance(still, statistics_of(gaussian(9, 0, 50)))


def test_influence_is_the_derivative():
    x, y = gaussian(6, 0, 80), gaussian(6, 1, 90)
    a, b = statistics_of(x), statistics_of(y)
    result = frechet_with_error(a, b, tiles=lambda: [x[:50], x[50:]])

    def weighted(i, extra):
        """Distance when image i weighs 1 + extra, covariances normalised as above."""
        w = np.ones(len(x))
        w[i] += extra
        w /= w.sum()
        mean = w @ x
        cov = (x - mean).T @ ((x - mean) * w[:, None]) * len(x) / (len(x) - 1)
        return frechet_distance(Statistics(mean_D=mean, cov_DD=cov), b)

    for i in (0, 17, 79):
        step = 1e-4
        slope = (weighted(i, step) - weighted(i, -step)) / (2 * step) * len(x)
        assert result.influence_N[i] == pytest.approx(slope, rel=0.05, abs=0.02 * abs(result.influence_N).max())


@pytest.mark.parametrize(("d", "n", "m"), [(12, 500, 400), (40, 30, 35)], ids=["more images than dimensions", "fewer"])
def test_interval_covers_at_its_level(d, n, m):
    """The interval is for the distance expected at this N. Of 120 intervals at 95 %, the number that
    miss is Binomial(120, 0.05): more than 14 have probability 0.001, which is this test's false-alarm rate.
    Conservative intervals pass; the width is held from above by the simulated deviation.
    """
    rng = np.random.default_rng(3)
    scales = np.arange(1, d + 1) ** -0.5
    other = scales * np.exp(0.5 * rng.standard_normal(d))
    values, errors = [], []
    for _ in range(120):
        x = rng.standard_normal((n, d)) * scales
        y = rng.standard_normal((m, d)) * other + 0.4 * scales
        result = frechet_with_error(
            statistics_of(x), statistics_of(y), tiles=lambda x=x: [x], reference_tiles=lambda y=y: [y]
        )
        values.append(result.value)
        errors.append(result.standard_error)
    values, errors = np.array(values), np.array(errors)
    missed = np.abs(values - values.mean()) > 1.96 * errors
    assert missed.sum() <= 14
    assert errors.mean() < 1.5 * values.std(ddof=1)


def test_interval_without_the_reference_is_narrower():
    x, y = gaussian(8, 0, 200), gaussian(8, 1, 100)
    a, b = statistics_of(x), statistics_of(y)
    alone = frechet_with_error(a, b, tiles=lambda: [x])
    both = frechet_with_error(a, b, tiles=lambda: [x], reference_tiles=lambda: [y])
    assert alone.standard_error_reference is None
    assert both.standard_error == pytest.approx(np.hypot(alone.standard_error, both.standard_error_reference))
    assert frechet_with_error(a, b).standard_error is None


def test_infinity_removes_the_bias():
    """Distances of samples of known Gaussians are affine in 1/N, and the extrapolation covers the truth:
    of 60 intervals at 95 %, 10 or more misses have probability 0.001."""
    rng = np.random.default_rng(0)
    d, n = 16, 600
    scales = np.arange(1, d + 1) ** -0.5
    other = scales * np.linspace(0.8, 1.2, d)
    reference = Statistics(mean_D=0.3 * scales, cov_DD=np.diag(other**2))
    truth = frechet_distance(Statistics(mean_D=np.zeros(d), cov_DD=np.diag(scales**2)), reference)
    plain, extrapolated, missed = [], [], 0
    for seed in range(60):
        out = frechet_infinity(rng.standard_normal((n, d)) * scales, reference, seed=seed)
        plain.append(out.full.value)
        extrapolated.append(out.value)
        missed += abs(out.value - truth) > 1.96 * out.standard_error
    assert missed <= 9
    assert np.mean(plain) - truth > 4 * abs(np.mean(extrapolated) - truth)
    assert out.sizes == (600, 300, 150)
    with pytest.raises(ValueError, match="at least 8"):
        frechet_infinity(rng.standard_normal((7, d)), reference)
