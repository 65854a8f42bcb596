"""The benches of the continuous line: entities, ECAR against one flow, xAR's drawing against the naive loop."""

import dataclasses
import json

import pytest
import torch

from eval import bench_ecar, bench_entities, bench_flow, references
from eval.points import Points
from genlab.generators.ecar import ECAR, ECARConfig
from genlab.generators.xar import XAR, XARConfig
from genlab.noise import Noise
from samplers.flow import FlowConfig, FlowSampler
from samplers.timing import flops

ENTITIES = {
    "patch": {"entity": "patch"},
    "cell": {"entity": "cell", "size": 2},
    "subsample": {"entity": "subsample", "size": 2},
    "scale": {"entity": "scale", "scales": (1, 2, 4)},
    "image": {"entity": "image"},
}
TINY = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "dropout": 0.0, "num_classes": 10}


def xar(entity="cell", grid=4, channels=3, **more):
    torch.manual_seed(0)
    return XAR(XARConfig(grid=(grid, grid), channels=channels, **{**TINY, **ENTITIES[entity], **more})).eval()


# -- the error by group -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entity", ENTITIES)
def test_exposure_to_clean_context_is_the_training_loss(entity):
    """Weighted by the groups' sizes, it is the loss of a model that trains with clean context."""
    model = xar(entity, context="clean", label_drop=0.0)
    tokens, labels, noise = torch.randn(5, 16, 3), torch.arange(5), Noise(torch.arange(5) + 3)
    got = bench_entities.exposure(model, tokens, labels, noise, level=0.5, repeats=1)
    sizes = torch.tensor(model.sizes, dtype=torch.float64)
    mean = float((torch.tensor(got["clean"], dtype=torch.float64) * sizes).sum() / sizes.sum())
    assert mean == pytest.approx(float(model.loss(tokens, labels, noise)["loss"].detach()), rel=1e-5)
    assert got["drawn"][0] == pytest.approx(got["clean"][0], rel=1e-5)  # nothing stands before the first group
    if model.n_groups > 1:
        assert got["drawn"][-1] != pytest.approx(got["clean"][-1], rel=1e-6)
        assert got["noisy"][-1] != pytest.approx(got["clean"][-1], rel=1e-6)


@torch.no_grad()
def test_redraw_keeps_more_of_the_data_the_lower_its_level():
    model, labels, noise = xar(), torch.arange(4), Noise(torch.arange(4))
    x = torch.randn(4, model.N, 3)
    drawn = [bench_entities.redraw(model, x, labels, noise, level) for level in (0.0, 0.2, 0.8)]
    assert torch.equal(drawn[0], x)
    away = [float((d - x).square().mean()) for d in drawn]
    assert 0 < away[1] < away[2]
    with pytest.raises(ValueError, match="level"):
        bench_entities.redraw(model, x, labels, noise, 1.5)


# -- the five entities --------------------------------------------------------------------------------------


def row(context, seed, distance, bias=0.1, entity="cell"):
    exposed = {"clean": [0.5, 0.4], "noisy": [0.5, 0.45], "drawn": [0.5, 0.4 + bias]}
    return {"entity": entity, "context": context, "seed": seed, "distance": distance, "exposure": exposed,
            "interval": [distance - 1, distance + 1], "trained": {"images": 100}, "calls": 64.0, "seconds": 0.1,
            "cpu_seconds": 0.2, "metric": "fd", "groups": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("noisy", "clean", "verdict"),
    [((10, 11), (14, 15), "noisy context is better"), ((14, 15), (10, 11), "clean context is better"),
     ((10, 14), (13, 15), "no clear difference")],
)  # fmt: skip
def test_a_verdict_needs_every_seed(noisy, clean, verdict):
    rows = [row("noisy", i, d, 0.1) for i, d in enumerate(noisy)] + [
        row("clean", i, d, 0.3) for i, d in enumerate(clean)
    ]
    (found,) = bench_entities.compare(rows)
    assert found["verdict"] == verdict
    assert found["distance"] == {"noisy": sum(noisy) / 2, "clean": sum(clean) / 2}
    assert found["exposure_bias"] == pytest.approx({"noisy": 0.1, "clean": 0.3})


def test_entities_are_trained_once_with_their_configs(tmp_path, monkeypatch):
    from genlab.commands import bench_entities as command
    from genlab.config import load_json, to_dict
    from genlab.hub import write_atomic
    from train import loop

    trained = []

    def train(config, out, device):
        trained.append(config)
        write_atomic(out / "config.json", json.dumps(to_dict(config)))
        (out / "model").mkdir()

    monkeypatch.setattr(loop, "train", train)
    c = bench_entities.EntitiesConfig(out=tmp_path, minutes=3)
    models = command.train_all(c)
    assert len(models) == len(trained) == 4 * 2 * 2 + 2  # the image entity has no context
    assert {r.cpu_minutes for r in trained} == {3}
    scale = next(r for r in trained if r.name == "scale-clean-seed1")
    assert (scale.seed, scale.model.scales, scale.model.context) == (1, (1, 2, 4, 8), "clean")
    assert len({load_json(f.parent / "config.json")["model"]["dim"] for f in models.values()}) == 1
    assert command.train_all(c) == models
    assert len(trained) == 18
    with pytest.raises(ValueError, match="other settings"):
        command.train_all(dataclasses.replace(c, minutes=4))
    with pytest.raises(ValueError, match="not an xar"):
        command.train_all(dataclasses.replace(c, preset="ecar-emoji64"))


@pytest.fixture(scope="module")
def pixel_models(tmp_path_factory):
    """Random models over raw pixels of 64x64: an xAR of two entities, and ECAR with one flow of its size."""
    folder, sizes = tmp_path_factory.mktemp("pixels"), {"grid": 8, "channels": 192}
    wide = {"dim": 128, "num_classes": 10, "dropout": 0.0, "heads": 2}
    torch.manual_seed(0)
    made = {
        "cell-noisy-seed0": xar("cell", **sizes, size=4),
        "cell-clean-seed0": xar("cell", **sizes, size=4, context="clean"),
        "image-noisy-seed0": xar("image", **sizes),
        "flow": XAR(XARConfig(grid=(8, 8), channels=192, entity="image", encoder_depth=2, decoder_depth=2, **wide)),
        "ecar": ECAR(ECARConfig(grid=(8, 8), channels=192, sides=(2, 4, 8), context_depth=2, flow_depth=2, **wide)),
    }
    for name, model in made.items():
        model.extra |= {"tokenizer": "pixels-p8-emoji64", "trained": {"images": 7}}
        model.save_pretrained(folder / name)
    return folder


def test_entities_are_measured_and_kept(tmp_path, pixel_models, monkeypatch):
    names = ["cell-noisy-seed0", "cell-clean-seed0", "image-noisy-seed0"]
    models = {name: pixel_models / name for name in names}
    c = bench_entities.EntitiesConfig(out=tmp_path, n=4, steps=1, batch_size=2, exposure_images=3, dtype="float32",
                                      reference=references.path("emoji-train"))  # fmt: skip
    result = bench_entities.measure(c, models)
    first, _, last = result["rows"]
    assert (first["groups"], first["calls"], last["groups"], last["exposure"]) == (4, 4, 1, None)
    assert all(r["interval"][0] <= r["distance"] and r["distance"] > 0 for r in result["rows"])
    assert len(first["exposure"]["drawn"]) == 4
    text = bench_entities.describe(result)
    assert "| cell | noisy | 0 | 7 |" in text
    for name in ("distances.png", "exposure.png", "result.json", "table.md", "grids/image-noisy-seed0.png"):
        assert (tmp_path / name).stat().st_size > 100
    monkeypatch.setattr(bench_entities, "draw", None)  # nothing is drawn again
    assert bench_entities.measure(c, models)["rows"] == result["rows"]
    with pytest.raises(ValueError, match="another steps"):
        bench_entities.measure(dataclasses.replace(c, steps=2), models)


# -- ECAR against one flow ----------------------------------------------------------------------------------


def test_ecar_bench_compares_fronts(tmp_path, pixel_models):
    c = bench_ecar.BenchConfig(
        ecar=str(pixel_models / "ecar"), flow=str(pixel_models / "flow"), out=tmp_path, n=4, batch_size=4, rounds=1,
        guidance=(2.0,), flow_euler=(4, 2), flow_heun=(), ecar_euler=((1, 1, 1),), ecar_heun=((1, 1, 1),), slack=1e9,
        dtype="float32", reference=references.path("emoji-train"),
    )  # fmt: skip
    result = bench_ecar.run(c)
    flow = [p for p in result["points"] if p["model"] == "flow"]
    assert flow[0]["gflops"] == pytest.approx(2 * flow[1]["gflops"], rel=1e-3)  # nothing is done once a draw
    ecar = [p for p in result["points"] if p["model"] == "ecar"]
    assert result["ecar"] == min(ecar, key=lambda p: p["gflops"])
    assert ecar[0]["gflops"] < ecar[1]["gflops"]
    assert ecar[0]["gflops"] < flow[1]["gflops"]
    assert result["fewer_flops"] == result["baseline"]["gflops"] / ecar[0]["gflops"]
    assert (tmp_path / "fronts.png").stat().st_size > 1000
    assert "fewer FLOPs" in bench_ecar.describe(result)
    held = json.loads((tmp_path / "points.json").read_text())["points"]
    assert len(held) == 4


def test_cheapest_and_front():
    points = [{"gflops": g, "distance": d} for g, d in ((1, 9), (2, 5), (3, 6), (4, 4.9), (5, 5))]
    assert bench_ecar.cheapest(points, 5)["gflops"] == 2
    assert bench_ecar.cheapest(points, 4) is None
    assert [p["gflops"] for p in bench_ecar.front(points, "gflops")] == [1, 2, 4]


def test_ecar_spends_little_at_full_resolution():
    """The shipped presets' sizes: with its own steps and guidance, a fifth of the single flow's nine evaluations (which
    come within 2 % of its best distance).
    """
    from genlab.generators.base import Guidance
    from train.presets import PRESETS

    with torch.device("cpu"):
        flow, ecar = XAR(PRESETS["flow-emoji64"]().model).eval(), ECAR(PRESETS["ecar-emoji64"]().model).eval()
    assert flow.n_params == pytest.approx(ecar.n_params, rel=0.02)
    guidance, labels = Guidance(scale=2.0, schedule="constant"), torch.arange(32) % 10
    ours = flops(FlowSampler(), ecar, labels)
    step = flops(FlowSampler(FlowConfig(method="euler", steps=1, guidance=guidance)), flow, labels)
    assert 5 * ours <= 9 * step


def test_points_refuse_other_settings(tmp_path):
    points = Points(tmp_path / "points.json", {"n": 3, "tuple": (1, 2)})
    assert points.get("a", lambda: {"x": 1}) == {"x": 1}
    again = Points(tmp_path / "points.json", {"n": 3, "tuple": (1, 2)})
    assert again.get("a", lambda: pytest.fail("measured twice")) == {"x": 1}
    with pytest.raises(ValueError, match="another n: give another --out"):
        Points(tmp_path / "points.json", {"n": 4, "tuple": (1, 2)})


# -- xAR against the naive loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("entity", ["cell", "scale", "image"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_naive_loop_draws_the_same_images(entity, schedule):
    c = bench_flow.BenchFlowConfig(entities=(entity,), grid=4, dim=32, depth=2, heads=2, batches=(1, 3), steps=2,
                                   repeats=1, schedule=schedule)  # fmt: skip
    result = bench_flow.run(c)
    assert [r["batch"] for r in result["rows"]] == [1, 3]
    assert all(r["difference"] < 1e-5 and r["naive_s"] > 0 and r["calls"] == 2 * r["groups"] for r in result["rows"])
    assert entity in bench_flow.describe(result)


def test_the_bench_of_drawing_refuses_others():
    with pytest.raises(ValueError, match="xar that draws by class"):
        bench_flow.measure(xar("cell", condition="text", text_dim=4), bench_flow.BenchFlowConfig())
