"""`genlab plan`: what a dry run on the meta device counts is what a real step takes."""

import dataclasses
import gc
import json
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from genlab.cli import main
from genlab.nn.flops import flop_counter
from genlab.registry import model_class
from train import dry, plan
from train.presets import PRESETS
from train.scale import recompute_blocks

PUBLISHED = [name for name in PRESETS if not name.endswith("emoji64")]
if "GENLAB_PLANS" not in os.environ:  # GENLAB_PLANS=all takes minutes: here the first of each system
    PUBLISHED = list({name.partition("-")[0]: name for name in reversed(PUBLISHED)}.values())
TINY = {
    "llamagen-emoji64": {"dim": 64, "depth": 4, "heads": 2},
    "xar-cell-emoji64": {"dim": 64, "encoder_depth": 2, "decoder_depth": 2, "heads": 2},
    "vq-f4-emoji64": {},
}


def tiny(name):
    run = PRESETS[name]()
    loss = dataclasses.replace(run.loss, perceptual=0.0)
    model = dataclasses.replace(run.model, dropout=0.0) if hasattr(run.model, "dropout") else run.model
    return dataclasses.replace(run, model=dataclasses.replace(model, **TINY[name]), loss=loss, precision="fp32")


class Real(torch.nn.Module):
    """The same networks, with weights."""

    def __init__(self, run):
        super().__init__()
        meta = dry.Network(run)
        self.model, self.criterion = model_class(run.model.kind)(run.model), meta.criterion
        if meta.criterion is not None:
            self.criterion = meta.criterion.to_empty(device="cpu")


def peak_bytes(work):
    """The most that a piece of work holds at a time beyond what was there before, by the profiler."""
    gc.collect()  # what other tests left would be counted where it happens to be freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", TINY)
def test_arithmetic_is_what_a_real_step_counts(name):
    run = tiny(name)
    cost = dry.count(run, dry.Network(run), 2)
    network = Real(run)
    with flop_counter() as counter:
        loss = dry.step(run, network, 2)
        forward = counter.get_total_flops()
        loss.backward()
    assert cost.forward == forward
    assert cost.forward + cost.backward == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_activations_are_what_a_real_step_allocates(name, recompute):
    run, n = tiny(name), 8
    cost, network = dry.count(run, dry.Network(run), n), Real(run)
    if recompute:
        recompute_blocks(network.model)
    held = peak_bytes(lambda: dry.step(run, network, n).backward())
    gradients = 4 * sum(p.numel() for p in network.parameters())
    estimate = cost.kept_recomputing if recompute else cost.kept
    assert 0.7 * held - gradients <= estimate <= 1.1 * held


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_preset_has_a_plan(name):
    run = PRESETS[name]()
    f = plan.footprint(run)
    assert f.trained <= f.parameters
    assert f.kept_recomputing <= f.kept
    assert f.flops > 2 * f.trained  # each trained weight multiplies at least once
    for gpus in (1, 8, 64):
        chosen = plan.choose(run, f, gpus, 80 * 2**30)
        if gpus > 1:
            assert chosen is not None
            assert chosen.images * chosen.accumulate * gpus == run.batch_size


def test_ways_that_take_less_memory_are_told_apart():
    run = PRESETS["llamagen-3b-in256"]()
    f = plan.footprint(run)
    ddp, fsdp, _, least = plan.ways(run, f, 8)
    assert ddp.weights == pytest.approx(8 * fsdp.weights)
    assert ddp.total > fsdp.total > least.total
    assert plan.choose(run, f, 8, 2 * ddp.total) == ddp
    assert plan.choose(run, f, 8, least.total * 1.01).recompute
    assert plan.choose(run, f, 8, 1e9) is None
    assert plan.command(run, 64, fsdp).startswith("srun torchrun --nnodes 8 --nproc-per-node 8")


def test_the_command(capsys):
    assert main(["plan", "llamagen-emoji64", "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"].startswith("torchrun --nproc-per-node 2 -m genlab.cli train llamagen-emoji64")
    assert main(["plan", "llamagen-emoji64", "--gpus", "2"]) == 0
    assert "images a second" in capsys.readouterr().out
    assert main(["plan", "llamagen-emoji64", "--gpus", "1", "--memory", "0.01"]) == 1
    assert "Nothing fits" in capsys.readouterr().out
    assert main(["plan", "llamagen-emoji64", "--gpus", "3"]) == 2
    assert "does not split over 3 GPUs" in capsys.readouterr().err
