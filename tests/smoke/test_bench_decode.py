"""`genlab bench decode`, end to end on random weights."""

import json

import pytest

from genlab import cli

TINY = ["--dim", "32", "--depth", "1", "--heads", "2", "--batches", "1", "--repeats", "1"]


def run(capsys, *words):
    code = cli.main(["bench", "decode", *words])
    return code, *capsys.readouterr()


def test_cached_against_naive(capsys):
    code, out, _ = run(capsys, "--kinds", "elm", "var", *TINY, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["model"] for row in rows] == ["elm", "var"]
    for row in rows:
        assert row["equal_tokens"] > 0.95  # rounding may turn one, and those behind it
        assert row["speedup"] == pytest.approx(row["naive_s"] / row["cached_s"])
        where = row["where"]
        assert where["seconds"]["head"] > 0
        assert where["seconds"]["sampling"] > 0
        assert where["seconds"]["backbone"] > where["seconds"]["head"]
        assert sum(where["seconds"].values()) == pytest.approx(where["total"])
    assert [row["calls"] for row in rows] == [256, 10]


def test_a_preset_with_its_tokenizer(capsys):
    words = ["--preset", "llamagen-draft-emoji64", "--random-weights", "--no-naive", "--batches", "2", "--repeats", "1"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "llamagen-draft-emoji64" in out
    assert "decode" in out.splitlines()[1]  # the tokenizer's share


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "elm-2-6-emoji64"], "with --random-weights"),
        (["--random-weights"], "with --random-weights"),
        (["--preset", "vq-f4-emoji64", "--random-weights"], "trains a tokenizer"),
        (["--preset", "nothing", "--random-weights"], "nothing"),
        (["--repeats", "0"], "at least 1"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_refusals(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err


def test_models_are_left_as_they_were():
    from eval.bench_decode import BenchDecodeConfig, attribute, conditions, random_generator, sampler_of

    generator = random_generator("elm", BenchDecodeConfig(dim=32, depth=1, heads=2))
    before = {name: set(vars(module)) for name, module in generator.named_modules()}
    sampler = sampler_of(generator, 2.0, False)
    condition = conditions(generator, 1)
    import torch

    where = attribute(generator, sampler, lambda: sampler.sample(generator, condition, torch.arange(1)), lambda x: x)
    assert {name: set(vars(module)) for name, module in generator.named_modules()} == before
    assert 0 < where["attributed"] <= 1
