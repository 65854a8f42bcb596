"""`--sampler auto`, the clock behind it, and the bench of samplers, on small random networks."""

import json

import pytest

from eval import bench_samplers
from genlab.cli import main as genlab
from genlab.generators.elm import ELMMasked, ELMMaskedConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from samplers import auto
from samplers.auto import AutoConfig, AutoSampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler
from samplers.timing import Clock, call_costs
from tests.unit.test_generators_discrete import randomise
from tests.unit.test_speculative import GUIDED, LABELS, SEEDS, SIZES, mar, models  # noqa: F401
from tokenizers_img.vq import VQ, VQConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_auto_measures_once_and_says_why(models, capsys, monkeypatch):  # noqa: F811
    model, few = models["llamagen"], [auto.CANDIDATES["ids"][i] for i in (0, 2, 5)]
    monkeypatch.setitem(auto.CANDIDATES, "ids", few)
    sampler = AutoSampler(AutoConfig(guidance=GUIDED, images=1))
    out = sampler.sample(model, LABELS, SEEDS)
    said = capsys.readouterr().err
    assert "c(W), ms: 1 tokens" in said
    assert all(name in said for name, _, _ in few)
    assert "measured now" in said
    # what it draws is what the chosen sampler draws
    again = type(sampler.choice)(sampler.choice.config).sample(model, LABELS, SEEDS)
    assert bool((out.tokens.values == again.tokens.values).all())
    second = AutoSampler(AutoConfig(guidance=GUIDED, images=1))
    second.sample(model, LABELS, SEEDS)
    assert "measured now" not in capsys.readouterr().err
    assert (second.choice.name, second.choice.config) == (sampler.choice.name, sampler.choice.config)


def test_auto_follows_the_measured_costs(models, monkeypatch):  # noqa: F811
    """Where long calls cost nothing more, it speculates; where they cost what they read, it doesn't."""
    names = {}
    for name, slope in (("flat", 0.0), ("steep", 1.0)):
        costs = lambda *a, slope=slope: tuple((w, 100.0 + 1e4 * slope * (w - 1)) for w in a[3])  # noqa: E731
        monkeypatch.setattr(auto, "call_costs", costs)
        sampler, _ = AutoSampler(AutoConfig(guidance=GUIDED, images=1, again=True)).choose(models["llamagen"], LABELS)
        names[name] = sampler.name
    assert names["steep"] == "ancestral"
    assert names["flat"] != "ancestral"


def test_auto_falls_back_and_says_so(capsys):
    masked = randomise(ELMMasked(ELMMaskedConfig(sub_tokens=2, bits=3, **SIZES)))
    sampler = AutoSampler()
    sampler.sample(masked, LABELS, SEEDS)
    assert sampler.choice.name == "masked"
    assert not sampler.exact
    assert "approximate by design" in capsys.readouterr().err
    chain = AutoSampler(AutoConfig(images=1))
    chain.sample(mar("raster"), LABELS, SEEDS)
    said = capsys.readouterr().err
    assert all(name in said for name, _, _ in auto.CANDIDATES["chain"])
    assert chain.choice.name in {name for name, _, _ in auto.CANDIDATES["chain"]}
    with pytest.raises(ValueError, match="has no top_k"):
        AutoSampler(AutoConfig(top_k=3, images=1)).sample(mar("raster"), LABELS, SEEDS)


def test_the_clock_counts_each_second_once(models):  # noqa: F811
    model, clock = models["llamagen"], Clock()
    sampler = SpeculativeJacobiSampler(SpeculativeJacobiConfig(guidance=GUIDED, window=4, coupling="maximal"))
    with clock.watch(model, sampler):
        out = sampler.sample(model, LABELS, SEEDS)
    assert set(clock.seconds) >= {"network", "state", "noise", "distribution", "verify"}
    assert 0.5 * out.stats.seconds < sum(clock.seconds.values()) <= out.stats.seconds
    before = dict(clock.seconds)
    sampler.sample(model, LABELS, SEEDS)  # nothing is watched any more
    assert clock.seconds == before


def test_calls_of_many_tokens(models):  # noqa: F811
    costs = call_costs(models["elm"], LABELS, GUIDED, (1, 2, 4, 64), repeats=2)
    assert [w for w, _ in costs] == [1, 2, 4]  # 64 don't fit behind half of 12
    assert all(s > 0 for _, s in costs)


def test_bench_end_to_end(tmp_path, capsys):
    vq = VQ(VQConfig(image_size=16, patch=4, channels=(8,), features=8, norm_groups=4, codes=16, attention_levels=()))
    vq.save_pretrained(tmp_path / "vq")
    model = randomise(LlamaGen(LlamaGenConfig(vocab=vq.spec.vocab, **{**SIZES, "grid": vq.spec.grid})))
    model.extra["tokenizer"] = str(tmp_path / "vq")
    model.save_pretrained(tmp_path / "model")
    words = ["bench", "samplers", str(tmp_path / "model"), "--n", "0", "--rounds", "1", "--classes", "even",
             "--rows", "model, gumbel", "tree", "--window", "3", "--out", str(tmp_path / "out"),
             "--add", "speculative-jacobi:window=0"]  # fmt: skip
    assert genlab(words) == 0
    said = capsys.readouterr().out
    assert "refused: the window must hold at least one draft" in said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {r["name"]: r for r in result["models"][0]["rows"]}
    assert next(iter(rows)) == "ancestral"
    assert set(rows) >= {"jacobi model, gumbel", "jacobi model, gumbel, adaptive", "multi-draft tree, ngram"}
    for row in rows.values():
        if "refused" not in row:
            assert min(row["seconds"], row["gflops"]) > 0
            assert sum(row["attributed"].values()) == pytest.approx(1, abs=0.01)
    assert rows["ancestral"]["tokens_a_call"] == 1
    assert 0 < rows["multi-draft tree, ngram"]["upper_bound"] <= 1
    assert (tmp_path / "out" / "speed_quality.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no sampler of"):
        bench_samplers.rows_of(model, bench_samplers.SamplersBenchConfig(models=("x",), add=("flow",)), ())


def test_auto_chooses_again_for_another_model(models, capsys):  # noqa: F811
    sampler = AutoSampler(AutoConfig(images=1))
    sampler.sample(randomise(ELMMasked(ELMMaskedConfig(sub_tokens=2, bits=3, **SIZES))), LABELS, SEEDS)
    sampler.sample(models["llamagen"], LABELS, SEEDS)
    assert sampler.choice.supports(models["llamagen"])
    assert sampler.choice.name != "masked"
