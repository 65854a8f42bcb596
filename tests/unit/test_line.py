"""Drawing that is kept: an interrupted one goes on, and gives what an uninterrupted one gives."""

import dataclasses

import pytest
import torch

from genlab.commands.models import load_line
from samplers.flow import FlowSampler


def test_kept_tokens_are_drawn_once(tmp_path, monkeypatch):
    line = load_line("xar-cell-emoji64")
    sampler = FlowSampler(FlowSampler.Config(steps=2))
    labels, seeds = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    plain, cost = line.draw(sampler, labels, seeds, 2)
    kept, kept_cost = line.draw(sampler, labels, seeds, 2, keep=tmp_path)
    assert torch.equal(kept, plain)
    assert kept_cost.model_calls == cost.model_calls
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:100])  # cut short: drawn again
    drawn = []
    draw = sampler.sample
    monkeypatch.setattr(sampler, "sample", lambda *a, **k: drawn.append(len(a[1])) or draw(*a, **k))
    again, again_cost = line.draw(sampler, labels, seeds, 2, keep=tmp_path)
    assert torch.equal(again, plain)
    assert len(drawn) == 1
    assert again_cost.model_calls == cost.model_calls
    other = FlowSampler(dataclasses.replace(sampler.config, steps=1))
    assert not torch.equal(line.draw(other, labels, seeds, 2, keep=tmp_path)[0], plain)  # another setting: other tokens


def test_kept_seeds_are_told_apart(tmp_path):
    line = load_line("xar-cell-emoji64")
    sampler = FlowSampler(FlowSampler.Config(steps=1))
    a, _ = line.draw(sampler, torch.tensor([0]), torch.tensor([5]), keep=tmp_path)
    b, _ = line.draw(sampler, torch.tensor([0]), torch.tensor([6]), keep=tmp_path)
    assert not torch.equal(a, b)


def test_classes_go_by_name():
    line = dataclasses.replace(load_line("xar-cell-emoji64"), classes=("cat", "dog", "emu"))
    assert line.n_classes == 3  # the table has ten rows, seven of them untrained
    assert line.class_ids("all") == [0, 1, 2]
    with pytest.raises(ValueError, match="no class '5'; xar-cell-emoji64 knows 0 cat, 1 dog, 2 emu"):
        line.class_ids("5")
    labels = torch.tensor([0, 1, 1, -1])
    assert line.class_of(("emu", "cat"), labels).tolist() == [2, 0, 0, -1]
    with pytest.raises(ValueError, match="no class 'fox'"):
        line.class_of(("cat", "fox"), labels)
    numbered = dataclasses.replace(line, classes=("0", "1", "10", "2"))
    assert numbered.class_ids("2") == [3]
    assert numbered.class_ids("1-2,10") == [1, 3, 2]
    nameless = dataclasses.replace(line, classes=())
    assert nameless.n_classes == 10
    assert nameless.class_of(("emu", "cat"), labels).tolist() == labels.tolist()
