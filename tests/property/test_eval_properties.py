"""Properties of the Fréchet distance and of streaming statistics, on drawn inputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.frechet import frechet_distance, frechet_of_features, frechet_with_error
from eval.statistics import RunningStatistics, Statistics, statistics_of

seeds = st.integers(0, 2**32 - 1)


def sample(seed, n, d):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ (rng.standard_normal((d, d)) * rng.uniform(0.01, 3, d)) + rng.normal(size=d)


def scale(a, b):
    return np.trace(a.cov_DD) + np.trace(b.cov_DD)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 30), st.integers(2, 30), st.integers(1, 20))
def test_distance_is_a_distance_whatever_the_rank(seed, n, m, d):
    x, y, z = sample(seed, n, d), sample(seed + 1, m, d), sample(seed + 2, 25, d)
    a, b, c = statistics_of(x), statistics_of(y), statistics_of(z)
    ab, slack = frechet_distance(a, b), 1e-6 * scale(a, b)
    assert ab >= 0
    assert abs(ab - frechet_distance(b, a)) <= slack
    assert frechet_distance(a, a) <= 1e-7 * scale(a, a)
    roots = [np.sqrt(frechet_distance(p, q)) for p, q in ((a, b), (b, c), (a, c))]  # a metric: Wasserstein-2
    assert roots[2] <= roots[0] + roots[1] + 1e-3 * np.sqrt(slack + scale(a, c) * 1e-6)
    for route in (frechet_of_features(x, y), frechet_of_features(x, b)):
        assert abs(route - ab) <= slack
    assert abs(frechet_with_error(a, b, tiles=lambda: [x], reference_tiles=lambda: [y]).value - ab) <= slack


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 40), st.integers(2, 12), st.floats(0.1, 10.0))
def test_rotation_shift_and_scale(seed, n, d, factor):
    rng = np.random.default_rng(seed)
    x, y, shift = sample(seed, n, d), sample(seed + 1, 30, d), rng.standard_normal(d)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    plain = frechet_of_features(x, y)
    slack = 1e-6 * scale(statistics_of(x), statistics_of(y))
    assert abs(frechet_of_features(x @ turn + shift, y @ turn + shift) - plain) <= slack
    assert abs(frechet_of_features(factor * x, factor * y) / factor**2 - plain) <= slack


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.integers(0, 600), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_any_cut_and_any_merge_give_the_same_moments(seed, cuts, offset):
    x = sample(seed, 700, 6) + offset
    parts = np.split(x, sorted(cuts))
    whole = statistics_of(x)
    one, joined = RunningStatistics(), RunningStatistics()
    for part in parts:
        one.update(part)
        joined.merge(RunningStatistics().update(part) if len(part) else RunningStatistics())
    for other in (one.finish(), joined.finish()):
        assert other.n == 700
        np.testing.assert_allclose(other.mean_D, whole.mean_D, rtol=1e-11, atol=1e-11)
        assert np.abs(other.cov_DD - whole.cov_DD).max() <= 1e-9 * np.abs(whole.cov_DD).max()


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 8))
def test_saved_statistics_come_back(seed, d):
    import tempfile
    from pathlib import Path

    from eval.statistics import load_statistics

    stats = statistics_of(sample(seed, 9, d), note="n")
    with tempfile.TemporaryDirectory() as folder:
        back = load_statistics(stats.save(Path(folder) / "s.npz"))
    np.testing.assert_array_equal(back.cov_DD, stats.cov_DD)
    assert (back.n, back.meta) == (9, {"note": "n"})


@given(st.integers(1, 6), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_no_broken_statistics(d, value):
    mean = np.zeros(d)
    mean[-1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        Statistics(mean_D=mean, cov_DD=np.eye(d))
