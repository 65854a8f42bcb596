"""The report page, the configs behind the command line, and the self-test."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import tyro

import eval as E
from eval import harness
from eval.details import collect, near_copies, per_class
from eval.features import EXTRACTORS, Extractor
from eval.result import Side
from eval.selftest import Check, describe, self_test
from genlab.config import from_dict, to_json


class Mean(Extractor):
    """Colour means of the four quarters: enough of a network for a report."""

    name, resize, size, weights_hash = "quarters", "torch-bilinear", 8, "1" * 64
    layers = {"pool": 12}

    def __init__(self, weights=None, device="cpu"):
        pass

    def forward(self, x, layers):
        return {"pool": torch.nn.functional.avg_pool2d(x, 4).flatten(1) / 255.0}


EXTRACTORS["quarters"] = Mean
harness.METRICS["fd_quarters"] = harness.Metric("frechet", "quarters")


class Labelled:
    def __init__(self, n, seed, name):
        rng = np.random.default_rng(seed)
        self.images = torch.from_numpy(rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8))
        self.labels = torch.arange(n) % 3
        self.classes = ("cat", "<i>dog</i>", "fish")
        self.fingerprint, self.name = f"{name}{seed}", name

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[list(indices)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))


class Reader(HTMLParser):
    """Collects tags and checks that they close."""

    def __init__(self):
        super().__init__()
        self.tags, self.urls, self.text, self.attributes, self.open = [], [], "", [], []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):  # <circle .../>
        self.handle_starttag(tag, attributes)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "rect", "circle", "polyline", "line"):  # have no end
            self.open.append(tag)
        self.urls += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_escaped_and_self_contained(tmp_path):
    ours, theirs = Labelled(60, 0, "<script>alert(1)</script>"), Labelled(50, 1, "ref")
    theirs.images[7] = ours.images[4]  # a copy of a training image
    config = E.EvalConfig(
        generated="x", reference="y", metrics=("fd_quarters",), html=tmp_path / "r.html", json=tmp_path / "r.json",
        sampler="<b>bold</b>",
    )  # fmt: skip
    result = E.run_eval(config, generated=ours, reference=theirs)
    text = (tmp_path / "r.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert "b" not in reader.tags[reader.tags.index("h2") :]
    assert reader.text.count("not comparable with published figures") >= 2  # on top, and beside the number
    assert "<script>alert(1)</script>" in reader.text
    assert "<i>dog</i>" in reader.text
    assert all(url.startswith("data:image/png;base64,") for url in reader.urls)
    assert len(reader.urls) == 12 + 12 + 2 * 12  # worst, best, closest pairs
    assert "not comparable with published figures" in reader.text
    closest = result.extra["nearest"]["closest"][0]
    assert (closest["image"], closest["neighbour"], closest["distance"]) == (4, 7, 0.0)
    assert [row["class"] for row in result.extra["per_class"]] == [0, 1, 2]
    assert E.Result.from_json((tmp_path / "r.json").read_text()) == result
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "r.json", "cache"}


def test_page_is_for_everyone(tmp_path):
    """Language, landmarks, headings in order, named tables and drawings, described pictures, keyboard scrolling."""
    ours, theirs = Labelled(60, 0, "ours"), Labelled(50, 1, "ref")
    config = E.EvalConfig(generated="x", reference="y", metrics=("fd_quarters",), html=tmp_path / "r.html")
    E.run_eval(config, generated=ours, reference=theirs)
    reader = Reader()
    reader.feed((tmp_path / "r.html").read_text())
    assert reader.open == []  # every element is closed, in order
    assert ("html", {"lang": "en"}) in reader.attributes
    assert {"main", "title", "caption", "thead"} <= set(reader.tags)
    assert [tag for tag in reader.tags if tag in ("h1", "h2", "h3")][:2] == ["h1", "h2"]
    assert reader.tags.count("h1") == 1
    assert all(
        a.get("alt", "").split()[0] in ("generated", "reference") for tag, a in reader.attributes if tag == "img"
    )
    assert all(a.get("scope") for tag, a in reader.attributes if tag == "th")
    drawings = [
        a for tag, a in reader.attributes if tag == "svg" and "aria-hidden" not in a
    ]  # bars and keys are hidden
    assert [a.get("role") for a in drawings] == ["img", "img"]
    assert reader.tags.count("title") == 1 + 2  # the page's, and one for each drawing
    regions = [a for _, a in reader.attributes if a.get("role") == "region"]
    assert len(regions) == reader.tags.count("table") == 4
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_copying_shows():
    rng = np.random.default_rng(0)
    train, fresh = rng.standard_normal((300, 16)), rng.standard_normal((200, 16))
    copied = train[:200] + 0.01 * rng.standard_normal((200, 16))
    assert near_copies(copied, train)["share_below_reference_1_percent"] > 0.95
    assert near_copies(fresh, train)["share_below_reference_1_percent"] < 0.1
    data = near_copies(fresh, train)
    assert sum(data["generated"]) == 200
    assert sum(data["reference"]) == 300


def test_per_class_finds_the_bad_class():
    rng = np.random.default_rng(0)
    x, y, labels = rng.standard_normal((150, 4)), rng.standard_normal((150, 4)), np.arange(150) % 3
    x[labels == 1] += 3.0
    rows = per_class(x, labels, y, labels)
    assert max(rows, key=lambda row: row["distance"])["class"] == 1
    assert [row["n"] for row in rows] == [50, 50, 50]
    assert per_class(x, np.full(150, -1), y, labels) == []


def test_statistics_files_have_no_details(tmp_path):
    path = E.make_statistics(Labelled(30, 0, "a"), extractor="quarters").save(tmp_path / "s.npz")
    config = E.EvalConfig(generated="x", reference=str(path), metrics=("fd_quarters",), html=tmp_path / "r.html")
    result = E.run_eval(config, generated=Labelled(20, 1, "b"))
    assert result.extra == {}
    assert "fd_quarters" in (tmp_path / "r.html").read_text()


def test_configs_come_from_the_command_line_and_go_to_json(tmp_path):
    line = "--generated a --reference b --metrics fid kid --n 5 --weights inception-2015 w.pth --on-error skip"
    config = tyro.cli(E.EvalConfig, args=line.split())
    assert config.metrics == ("fid", "kid")
    assert from_dict(E.EvalConfig, json.loads(to_json(config))) == config
    with pytest.raises(ValueError, match="--generated"):
        E.run_eval(dataclasses.replace(config, generated=""))
    stats = tyro.cli(E.StatsConfig, args=f"--images a --out {tmp_path / 'o.npz'} --compact".split())
    stats = dataclasses.replace(stats, extractor="quarters")
    assert E.run_stats(stats, images=Labelled(30, 0, "a")).n == 30
    assert E.load_statistics(stats.out).meta["extractor"].startswith("quarters/")


def test_self_test_passes_and_can_fail():
    checks = self_test(images=0)
    assert len(checks) >= 14
    assert all(check.passed for check in checks), describe(checks)
    bad = describe([*checks, Check(name="x", passed=False, measured=2.0, limit="<= 1")])
    assert "FAIL  x" in bad
    assert "1 failed" in bad


def test_details_need_features():
    empty = harness.FeatureSet(store=None, path=None, record=Side(source="s", n=None, hash="h"))
    assert collect(empty, empty, "pool") == {}


def test_classes_go_by_their_names():
    """Another set numbers its classes in its own way, and may have others."""
    ours, theirs = Labelled(60, 0, "ours"), Labelled(60, 0, "same")
    theirs.classes, theirs.labels = ("ape", "cat", "fish", "<i>dog</i>"), torch.tensor([1, 3, 2])[theirs.labels]
    theirs.images, theirs.labels[0] = theirs.images.clone(), 0
    theirs.labels[1] = -1
    rows = E.evaluate(ours, theirs, metrics=("fd_quarters",), details=True).extra["per_class"]
    assert [(row["class"], row["n"], row["reference_n"]) for row in rows] == [(0, 20, 19), (1, 20, 19), (2, 20, 20)]
    assert rows[2]["distance"] == pytest.approx(0, abs=1e-6)
