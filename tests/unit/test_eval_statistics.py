"""Streaming statistics: the two-pass answer, whatever the batches; files of other tools; refusals."""

import numpy as np
import pytest

from eval.statistics import RunningStatistics, Statistics, load_statistics, statistics_of


def features(n=1500, d=24, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + offset).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("batch", [1, 7, 64, 1500])
def test_streaming_is_two_pass(offset, batch):
    x = features(offset=offset)
    stats = statistics_of(x[i : i + batch] for i in range(0, len(x), batch))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(stats.mean_D, wide.mean(0), rtol=1e-12, atol=1e-12)
    cov = np.cov(wide, rowvar=False)
    assert np.abs(stats.cov_DD - cov).max() <= 1e-12 * np.abs(cov).max()
    assert stats.n == 1500


@pytest.mark.parametrize("parts", [2, 4])
def test_merged_processes_give_one_pass(parts):
    x = features(offset=50.0)
    cuts = np.array_split(x, [3, 700, 701][: parts - 1])  # uneven shards
    joined = RunningStatistics()
    for cut in cuts:
        other = RunningStatistics()
        for row in np.array_split(cut, 5):
            other.update(row)
        joined.merge(other)
    joined.merge(RunningStatistics())  # a process without images
    whole = statistics_of(x)
    one = joined.finish()
    assert one.n == whole.n
    np.testing.assert_allclose(one.mean_D, whole.mean_D, rtol=1e-12)
    assert np.abs(one.cov_DD - whole.cov_DD).max() <= 1e-12 * np.abs(whole.cov_DD).max()


def test_merge_leaves_the_other_alone():
    a, b = RunningStatistics().update(features(600)), RunningStatistics().update(features(700, seed=1))
    before = b.finish()
    a.merge(b)
    a.update(features(600, seed=2))
    a.finish()
    np.testing.assert_array_equal(b.finish().cov_DD, before.cov_DD)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_features_are_refused_by_image(bad):
    x = features(10)
    x[7, 3] = bad
    running = RunningStatistics().update(features(5))
    with pytest.raises(ValueError, match="image 12"):
        running.update(x)


def test_too_few_and_wrong_shapes():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        statistics_of(features(1))
    with pytest.raises(ValueError, match="24 dimensions, expected 8"):
        RunningStatistics(8).update(features(3))
    with pytest.raises(ValueError, match="float array"):
        RunningStatistics().update(np.zeros((3, 4), dtype=np.uint8))


def test_saved_is_loaded(tmp_path):
    stats = statistics_of(features(), extractor="x", source="ünïcode")
    path = stats.save(tmp_path / "sub" / "ref.npz")
    back = load_statistics(path)
    np.testing.assert_array_equal(back.mean_D, stats.mean_D)
    np.testing.assert_array_equal(back.cov_DD, stats.cov_DD)
    assert (back.n, back.meta) == (stats.n, stats.meta)
    assert [p.name for p in path.parent.iterdir()] == ["ref.npz"]  # no temporary left


def test_compact_file_keeps_the_distance(tmp_path):
    from eval.frechet import frechet_distance

    a, b = statistics_of(features()), statistics_of(features(seed=1))
    path = a.save(tmp_path / "a.npz", compact=True)
    scale = np.trace(a.cov_DD) + np.trace(b.cov_DD)
    assert abs(frechet_distance(load_statistics(path), b) - frechet_distance(a, b)) < 1e-6 * scale
    assert path.stat().st_size < a.save(tmp_path / "b.npz").stat().st_size / 2


def test_files_of_other_tools(tmp_path):
    x, s = statistics_of(features()), statistics_of(features(d=6))
    np.savez(tmp_path / "pytorch-fid.npz", mu=x.mean_D, sigma=x.cov_DD)
    np.savez(tmp_path / "adm.npz", mu=x.mean_D, sigma=x.cov_DD, mu_s=s.mean_D, sigma_s=s.cov_DD)
    for name in ("pytorch-fid", "adm"):
        back = load_statistics(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(back.cov_DD, x.cov_DD)
        assert back.n is None
    assert load_statistics(tmp_path / "adm.npz", layer="spatial").dim == 6
    with pytest.raises(ValueError, match="mu_s"):
        load_statistics(tmp_path / "pytorch-fid.npz", layer="spatial")


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="genlab stats"):
        load_statistics(tmp_path / "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match="not a readable npz"):
        load_statistics(tmp_path / "torn.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        load_statistics(tmp_path / "nan.npz")
    np.savez(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.array([[1.0, 5.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        load_statistics(tmp_path / "skew.npz")
    np.savez(tmp_path / "negative.npz", mu=np.zeros(2), sigma=-np.eye(2))
    with pytest.raises(ValueError, match="negative variances"):
        load_statistics(tmp_path / "negative.npz")
    for name, arrays in (
        ("pickle", {"mu": np.array([object()]), "sigma": np.eye(1)}),
        ("two", {"mu": np.zeros(2), "sigma": np.eye(2), "n": np.array([3, 4])}),
        ("short", {"mu": np.zeros(9), "sigma_upper": np.zeros(3)}),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=rf"{name}\.npz is not a readable npz of statistics"):
            load_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match=r"\(D, D\)"):
        Statistics(mean_D=np.zeros(3), cov_DD=np.eye(2))
