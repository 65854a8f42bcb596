"""`genlab bench resgen`: it trains what is missing, measures every depth and model, and goes on where it stopped."""

import dataclasses
import json

import pytest
import torch

from eval import bench_resgen, references
from genlab.commands import bench_resgen as command
from genlab.config import to_json
from genlab.hub import from_pretrained
from genlab.registry import model_class
from train.presets import PRESETS

CODES = {"vocab": 16, "dim": 16, "depth": 1, "heads": 2}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Tiny presets; training, which has tests of its own, ends before its first step."""
    small, trained = {}, []

    def tiny(name, **sizes):
        base = PRESETS[name]()
        run = dataclasses.replace(base, model=dataclasses.replace(base.model, **sizes))
        small[name] = lambda: run

    def train(run, out, device):
        torch.manual_seed(0)
        model = model_class(run.model.kind)(run.model)
        if hasattr(model, "adopt"):
            model.adopt(from_pretrained(run.tokenizer))
        model.save_pretrained(out / "model")
        (out / "config.json").write_text(to_json(run))
        trained.append(run)

    for stage in ("", "-decoder"):
        tiny(f"rvq-f8{stage}-emoji64", codes=16, dim=6, channels=(32,), features=16, layers=1, decoder_layers=1,
             shortcut=False)  # fmt: skip
    tiny("resgen-emoji64", **CODES, code_dim=6, mixtures=4, rank=2)
    tiny("rq_transformer-emoji64", **CODES, code_dim=6, stack_depth=1)
    monkeypatch.setattr("train.presets.PRESETS", small)
    monkeypatch.setattr("train.loop.train", train)
    c = bench_resgen.ResGenBenchConfig(
        out=tmp_path, grid="f8", depths=(2, 1), rivals=("rq_transformer",), tokenizer_minutes=3, decoder_minutes=2,
        minutes=5, n=6, rebuilt=4,
        trial=4, guidance=(1.0, 2.0), top_p=(1.0, 0.6), steps=3, batch_size=4, rounds=1,
        reference=references.path("emoji-train"),
    )  # fmt: skip
    return c, trained


def test_it_trains_measures_and_goes_on(bench, monkeypatch):
    bench, trained = bench
    tokenizers, generators = command.train_all(bench)
    assert tokenizers == {depth: bench.out / f"rvq-depth{depth}-decoder/model" for depth in (2, 1)}
    assert list(generators) == ["resgen-depth2", "resgen-depth1", "rq_transformer-depth2"]
    assert [run.cpu_minutes for run in trained] == [3, 2, 3, 2, 5, 5, 5]
    powers = [run.model.mask_power * run.model.codes_depth for run in trained if run.model.kind == "resgen"]
    recipe = PRESETS["resgen-emoji64"]().model
    assert powers == pytest.approx([recipe.mask_power * recipe.codes_depth] * 2)  # as many empty positions at both
    result = bench_resgen.measure(bench, tokenizers, generators)
    assert [r["depths"] for r in result["reconstruction"]["2"]["rows"]] == [1, 2]
    rows = result["generators"]
    assert rows["resgen-depth2"]["calls"] == rows["resgen-depth1"]["calls"] == 3  # whatever the depth
    assert rows["rq_transformer-depth2"]["calls"] == 64 * 2
    for row in rows.values():
        best = min(row["tried"], key=lambda tried: tried["distance"])
        assert (row["guidance"], row["top_p"]) == (best["guidance"], best["top_p"])
        assert (row["images"], best["images"]) == (6, 4)
        assert row["seconds"] > 0
        assert row["seconds_alone"] > 0
        assert [(tried["guidance"], tried["top_p"]) for tried in row["tried"]] == [(1, 1), (1, 0.6), (2, 1), (2, 0.6)]
    for picture in ("resgen-depth2-2-0.6.png", "resgen-depth2.png"):
        assert (bench.out / "samples" / picture).stat().st_size > 1000
    assert "depth 2 against depth 1" in bench_resgen.describe(result)
    assert json.loads((bench.out / "result.json").read_text())["generators"].keys() == rows.keys()

    def refuse(*_, **__):
        raise AssertionError("trained or measured twice")

    monkeypatch.setattr(bench_resgen, "draw", refuse)
    monkeypatch.setattr(bench_resgen, "reconstruct", refuse)
    assert command.train_all(bench) == (tokenizers, generators)
    again = bench_resgen.measure(bench, tokenizers, generators)
    assert again["reconstruction"] == result["reconstruction"]
    with pytest.raises(ValueError, match="other settings"):
        command.train_all(dataclasses.replace(bench, minutes=6))
    with pytest.raises(ValueError, match="another steps"):
        bench_resgen.measure(dataclasses.replace(bench, steps=2), tokenizers, generators)
    with pytest.raises(ValueError, match="different and at least 1"):
        command.train_all(dataclasses.replace(bench, depths=(4, 4)))


def test_presets_of_either_grid_fit_together(tmp_path):
    for grid in ("f8", "f16"):
        c, ran = bench_resgen.ResGenBenchConfig(out=tmp_path, grid=grid, depths=(3,)), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.loop.train_once", lambda run, out, ran=ran: (ran.append(run), out / "model")[1])
            command.train_all(c)
        tokenizer, decoder, *generators = ran
        assert decoder.init == str(tmp_path / "rvq-depth3/model")
        assert len(generators) == 3
        for run in generators:
            codes = (run.model.grid, run.model.vocab, run.model.codes_depth, run.model.code_dim)
            side = 64 // tokenizer.model.downsampling
            assert codes == ((side, side), tokenizer.model.codes, 3, tokenizer.model.dim)
            assert run.tokenizer == str(tmp_path / "rvq-depth3/model")


def test_usage_counts_each_depth():
    ids = torch.stack([torch.arange(8) % 4, torch.zeros(8, dtype=torch.long)], -1)[None]
    first, second = bench_resgen.usage(ids, 8)
    assert first["usage"] == 0.5
    assert first["perplexity"] == pytest.approx(4)
    assert second == {"usage": 0.125, "perplexity": pytest.approx(1)}


def test_a_verdict_needs_intervals_that_lie_apart():
    def row(low, high, seconds):
        return {"interval": [low, high], "distance": (low + high) / 2, "seconds": seconds, "seconds_alone": 2 / seconds}

    rows = {"resgen-depth8": row(10, 12, 1.1), "resgen-depth4": row(11, 14, 1.0), "flat-depth8": row(20, 22, 5.5)}
    found = bench_resgen.compare(rows, (8, 4))
    assert found["against_depth"]["4"]["better"] is None
    assert found["against_depth"]["4"]["times_the_seconds"] == pytest.approx(1.1)
    assert found["against_rivals"] == {
        "flat-depth8": {
            "better": True,
            "times_faster": pytest.approx(5),
            "times_faster_alone": pytest.approx(0.2),
            "distance_ratio": pytest.approx(11 / 21),
        }
    }
