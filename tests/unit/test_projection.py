"""Counted calls, priced at published sizes."""

import pytest

from eval import projection
from genlab.nn.diffusion_head import DiffusionHead


def rows():
    plain = {"name": "chain", "head_calls": 1600, "settings": {}}
    other = {"name": "continuous-speculative", "head_calls": 640, "settings": {"window": 4}}
    return [plain, other, {"name": "x", "refused": "no", "settings": {"window": 4}}]


def test_calls_are_priced_by_their_points(monkeypatch):
    monkeypatch.setattr(projection, "head_seconds", lambda head, points, rows: 1 + points * rows / 8)
    found = rows()
    projection.project(found, 2, {"small": (8, 16, 1)})
    assert found[1]["projected"] == {"small": pytest.approx(1600 * 1.25 / (640 * 2.25))}
    assert all("projected" not in row for row in (found[0], found[2]))
    alone = rows()[:1]
    projection.project(alone, 2, {"small": (8, 16, 1)})
    assert alone == rows()[:1]


def test_more_points_take_longer():
    head = DiffusionHead(4, 8, 256, 2)
    assert 0 < projection.head_seconds(head, 1, 2) < projection.head_seconds(head, 4096, 2)
