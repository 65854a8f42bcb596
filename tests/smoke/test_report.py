"""`genlab report`: the page's structure, read by an HTML parser, and its sliders, driven in a headless browser."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from eval.charts import Line, line_chart, running_mean, ticks
from eval.report import grouped
from eval.result import Figure, Result, Side
from eval.speed_quality import comparisons
from genlab import cli
from genlab.generators.rq_transformer import RQTransformer, RQTransformerConfig
from tests.unit.test_flextok import tokenizer as tiny_flextok
from tests.unit.test_tokenizers_discrete import SIZES
from tokenizers_img.rvq import RVQ, RVQConfig

EVIL = "</script><img src=x onerror=alert(1)>"
VOID = ("meta", "br", "img", "input", "rect", "circle", "polyline", "line", "hr")


def result(source, protocol="genlab", n=40, value=12.5, reference="ab" * 32):
    figure = Figure(
        name="fd_tiny", value=value, low=value - 1, high=value + 1, interval="jackknife", extractor="tiny/1"
    )
    side = Side(source=source, n=n, hash="cd" * 32)
    return Result(figures=(figure,), protocol=protocol, generated=side, sampler=source, versions={"torch": "2"},
                  reference=Side(source="ref", n=50, hash=reference), notes=(f"a note {EVIL}",))  # fmt: skip


def bench(model="tiny"):
    row = {"exact": True, "calls": 16.0, "seconds": 0.5, "fd": 20.0, "fd_low": 19.0, "fd_high": 21.0, "n": 64}
    fast = {**row, "name": f"fast {EVIL}", "exact": False, "seconds": 0.1, "calls": 4.0, "fd": 25.0}
    rows = [{**row, "name": "plain"}, fast, {"name": "odd", "refused": "can't be drawn\nmore"}]
    return {
        "config": {"reference": "emoji:train", "classes": "even", "guidance": None, "batch_size": 1},
        "busy": {"before": 0.0, "after": 0.02},
        "metric": "fd_tiny",
        "models": [{"model": model, "machine": "a CPU", "rows": rows}],
    }


def write_run(folder, lines=6, kind="vq", tokenizer="", grids=3):
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model": {"kind": kind}, "tokenizer": tokenizer, "data": {"source": "emoji"}, "images": 6000})
    )
    row = '{{"images": {}, "step": 1, "loss": {}, "mse": 0.5, "lr": 0.001, "cpu_seconds": 60.0}}\n'
    text = "".join(row.format(1000 * (i + 1), 2.0 / (i + 1)) for i in range(lines))
    (folder / "metrics.jsonl").write_text(text + '{"images": 7000, "lo')  # a line that is being written
    for i in range(grids):
        colour = (255 - 60 * i, 30, 60 * i)
        Image.new("RGB", (64, 32), colour).save(folder / "samples" / f"{1000 * (i + 1):09d}.png")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, picture_folder, tiny_xar):
    """A page of everything: two runs of one kind and a third, figures, a bench, a FlexTok, an RVQ, a plain line."""
    root = tmp_path_factory.mktemp("report")
    data = {"source": str(picture_folder), "classes": ["blue", "red"]}
    flextok = tiny_flextok()
    torch.manual_seed(0)
    rvq = RVQ(RVQConfig(**{**SIZES, "codes": 16, "depth": 3, "dim": 6}))
    spec = rvq.spec
    sizes = {"num_classes": 2, "dim": 32, "heads": 2, "depth": 1, "stack_depth": 1}
    rq = RQTransformer(RQTransformerConfig(grid=spec.grid, vocab=16, codes_depth=3, **sizes))
    flextok.extra["data"] = rvq.extra["data"] = data
    rq.extra |= {"tokenizer": str(root / "rvq"), "data": data}
    first = write_run(root / "a" / "first")
    flextok.save_pretrained(first / "model")
    rvq.save_pretrained(root / "rvq")
    rq.save_pretrained(root / "rq")
    write_run(root / "b" / "first", lines=4, grids=0)
    write_run(root / "other", kind="llamagen", tokenizer=EVIL, lines=100, grids=1)
    (first / "rec.json").write_text(
        json.dumps({"model": EVIL, "images": 9, "source": "s", "tokens": "t", "psnr_all_pixels_pooled": 20.5})
    )
    for name, r in (("one", result("x")), ("two", result(EVIL)), ("three", result("z", protocol="clean"))):
        r.save(root / f"{name}.json")
    (root / "bench").mkdir()
    (root / "bench" / "result.json").write_text(json.dumps(bench(EVIL)))
    (root / "bench" / "points.json").write_text("{}")
    words = [
        "report",
        *(root / x for x in ("a/first", "b/first", "other", "bench", "one.json", "two.json", "three.json")),
    ]
    words += ["--model", root / "rvq", root / "rq", tiny_xar, "--n", 4, "--out", root / "page.html", "--title", EVIL]
    assert cli.main([str(w) for w in words]) == 0
    return root / "page.html"


class Reader(HTMLParser):
    """Elements with their attributes, what is open, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.all, self.open, self.headings, self.tables = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))
        if tag in ("h1", "h2", "h3"):
            self.headings.append([tag, ""])
        if tag == "table":
            self.tables.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1][1] += data
        if "table" in self.open:
            self.tables[-1] += data + "\n"

    def of(self, tag):
        return [a for t, a in self.all if t == tag]


def test_page_holds_everything_and_loads_nothing(page):
    text = page.read_text()
    reader = Reader(text)
    assert reader.open == []
    assert [t for t, _ in reader.headings].count("h1") == 1
    assert [name for t, name in reader.headings if t == "h2"] == [
        "Runs", "Training curves", "Samples over time", "Reconstructions", "More tokens, finer pictures", "Samples",
        "Speed beside quality", "Metrics",
    ]  # fmt: skip
    urls = [
        v for _, a in reader.all for k, v in a.items() if k in ("src", "href", "action", "data", "poster", "srcset")
    ]
    assert urls
    assert all(u.startswith(("data:image/png;base64,", "#")) for u in urls)
    ids = [a["id"] for _, a in reader.all if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(u[1:] in ids for u in urls if u.startswith("#"))
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r'http-equiv="Content|base64,[^"]*', "", text)
    policy = next(a["content"] for a in reader.of("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.split("script-src")[1]


def test_page_escapes_what_it_is_given(page):
    reader = Reader(page.read_text())
    assert len(reader.of("script")) == 1
    assert not any(k.startswith("on") for _, a in reader.all for k in a)
    assert all(a["src"].startswith("data:") for a in reader.of("img"))
    assert EVIL in reader.headings[0][1]
    assert sum(EVIL in t for t in reader.tables) >= 4  # runs, reconstruct's figures, the bench, the evaluations


def test_page_is_for_everyone(page):
    reader = Reader(page.read_text())
    assert reader.all[0] == ("html", {"lang": "en"})
    assert {"main", "nav", "section"} <= {t for t, _ in reader.all}
    levels = [int(t[1]) for t, _ in reader.headings]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(a.get("alt", "").strip() for a in reader.of("img"))
    labels = {a["for"] for a in reader.of("label")}
    inputs = reader.of("input")
    assert len(inputs) == 2 + 3  # two runs with grids; FlexTok, RVQ, and what RQ-Transformer drew
    assert all(a["type"] == "range" and a["id"] in labels and a["aria-valuetext"] for a in inputs)
    assert {a["for"] for a in reader.of("output")} == {a["id"] for a in inputs}
    assert all(a["aria-live"] == "polite" for a in reader.of("output"))
    ids = {a.get("id") for _, a in reader.all}
    assert all(a["aria-describedby"] in ids for a in inputs)
    charts = [a for a in reader.of("svg") if "aria-hidden" not in a]
    assert all(a["role"] == "img" for a in charts)
    assert len(reader.of("title")) == 1 + len(charts)  # the page's, and one a drawing
    assert all(a.get("scope") for a in reader.of("th"))
    assert '<th scope="col"></th>' not in page.read_text()
    assert len(reader.of("caption")) == len(reader.of("table")) == len(reader.tables)
    assert not any(int(a.get("tabindex", 0)) > 0 for _, a in reader.all)  # focus goes as the page reads


def test_runs_have_their_curves_grids_and_sliders(page):
    reader = Reader(page.read_text())
    headings = [name for t, name in reader.headings if t == "h3"]
    assert headings[:2] == ["vq on emoji", f"llamagen on {EVIL}"]  # losses of one kind share a chart, others don't
    frames = [a["data-frame"] for _, a in reader.all if "data-frame" in a]
    assert frames[:3] == ["1,000 images seen", "2,000 images seen", "3,000 images seen"]
    assert [f.split(",")[0] for f in frames if "of 6 tokens" in f] == [f"{k} of 6 tokens" for k in (1, 2, 4, 6)]
    assert [f for f in frames if f.endswith("of 3 depths")] == [f"{k} of 3 depths" for k in (1, 2, 3)]
    assert sum("of 3 depths, PSNR" in f for f in frames) == 3
    names = [name for _, name in reader.headings]
    assert str(page.parent / "a" / "first") in names  # two runs called `first` are told apart
    losses = next(t for t in reader.tables if "loss over images seen" in t)
    assert "0.3333" in losses  # 2 / 6: the last whole line
    assert "7,000" not in losses


def test_numbers_of_different_protocols_never_share_a_table(page):
    tables = [t for t in Reader(page.read_text()).tables if t.startswith("Figures:")]
    assert len(tables) == 2
    assert ["one" in t and "two" in t and "three" not in t for t in tables] == [True, False]
    alike = [("a", result("x")), ("b", result("y", value=3.0))]
    assert len(grouped(alike)) == 1
    for other in (result("z", n=41), result("z", reference="ef" * 32), result("z", protocol="clean")):
        assert [len(g) for g in grouped([*alike, ("c", other)])] == [2, 1]


def test_bad_input_is_told(tmp_path, capsys):
    def told(*words):
        assert cli.main(["report", *map(str, words), "--out", str(tmp_path / "p.html")]) == 2
        assert not (tmp_path / "p.html").exists()
        return capsys.readouterr().err

    assert "genlab report runs/mine" in told()
    assert "genlab train PRESET" in told(tmp_path / "none")
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "nothing to report on" in told(tmp_path / "x.json")
    run = write_run(tmp_path / "foreign")
    for foreign in ('{"a": 1}', "[]"):
        (run / "config.json").write_text(foreign)
        assert "is not a training run's of genlab" in told(run)
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('nonsense\n{"images": 1}\n')
    assert "line 1" in told(run)


def test_a_broken_grid_and_a_missing_tokenizer_leave_the_rest(tmp_path, capsys, tiny_xar):
    run = write_run(tmp_path / "run", kind="xar", tokenizer="gone")
    (run / "samples" / "000002000.png").write_bytes(b"\x89PNG cut short")
    shutil.copytree(tiny_xar, run / "model")
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "tokenizer": "gone"}))
    assert cli.main(["report", str(run), "--out", str(tmp_path / "p.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["notes"]) == 2
    assert "000002000.png" in told["notes"][0]
    assert "gone" in told["notes"][1]
    assert [a["data-frame"] for _, a in Reader((tmp_path / "p.html").read_text()).all if "data-frame" in a] == [
        "1,000 images seen",
        "3,000 images seen",
    ]


def test_frames_are_spread_over_the_run(tmp_path):
    run = write_run(tmp_path / "run", grids=9)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "p.html"), "--frames", "3"]) == 0
    frames = [a["data-frame"] for _, a in Reader((tmp_path / "p.html").read_text()).all if "data-frame" in a]
    assert frames == ["1,000 images seen", "5,000 images seen", "9,000 images seen"]


def test_benches_are_read():
    (one,) = comparisons(bench())
    assert [(w.name, w.exact, w.value) for w in one.ways] == [("plain", True, 20.0), (f"fast {EVIL}", False, 25.0)]
    assert (one.images, one.refused) == (64, ("odd: can't be drawn",))
    assert "otherwise idle" in one.protocol
    rows = {"teacher": {"seconds": 1.0, "calls": 64, "fd": 5.0, "n": 8}, "factorised": {"seconds": None, "calls": 1}}
    (two,) = comparisons({"config": {"model": "dd"}, "teacher": "t", "metric": "fd", "rows": rows})
    assert [(w.exact, w.seconds, w.value) for w in two.ways] == [(True, 1.0, 5.0), (False, None, None)]
    judged = {"metric": "fd", "value": 3.0, "low": 2.0, "high": 4.0, "n": 9}
    (three,) = comparisons({"config": {}, "rows": {"floor": judged, "ours": {**judged, "seconds_an_image": 0.2}}})
    assert [w.seconds for w in three.ways] == [None, 0.2]
    point = {"model": "ecar", "config": {"method": "heun", "steps": 4}, "metric": "fd", "distance": 1.0,
             "interval": [0.5, 1.5], "n": 7, "seconds": 0.1}  # fmt: skip
    (four,) = comparisons({"config": {"ecar": "e", "flow": "f"}, "points": [point]})
    assert (four.title, four.images, four.ways[0].name) == ("e and f", 7, "ecar method heun, steps 4")
    assert comparisons({"config": {}, "reconstruction": {}}) == comparisons([]) == []


def test_charts():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.12, 5.0, log=True)[0] >= 0.12
    assert running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
    chart = line_chart([Line("a", [1, 2], [1.0, 100.0]), Line("b", [1], [5.0])], x_name="x", y_name="y")
    assert "logarithmic" in chart
    heights = [float(y) for y in re.findall(r'<polyline points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', chart)[0]]
    assert heights[0] > heights[1]  # up is more
    flat = line_chart([Line("a", [1, 2], [3.0, 3.0])], x_name="x", y_name="y")
    assert "nan" not in flat
    dashes = set(re.findall(r'stroke-dasharray="([^"]*)"', chart))
    assert len(dashes) == 2  # not by colour alone


# -- in a browser ----------------------------------------------------------------------------------------------------

PATIENCE = 180_000  # milliseconds: other work may hold the machine


def patient(view):
    view.set_default_timeout(PATIENCE)
    return view


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, the machine's or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: `pip install '.[dev]'` brings it")
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    found = os.environ.get("GENLAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=found, args=[*flags, "--disable-gpu"], timeout=PATIENCE
            )
        except api.Error as error:
            if found or "Executable doesn't exist" not in str(error):
                raise
            pytest.skip("no Chromium on this machine: `make browser` installs one")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, page):
    """The page, opened from its file; what it asks of the network and says on the console is kept."""
    view = patient(browser.new_page(viewport={"width": 1000, "height": 800}))
    view.asked, view.said = [], []
    view.on("request", lambda r: view.asked.append(r.url))
    view.on("console", lambda m: view.said.append(m.text))
    view.on("pageerror", lambda e: view.said.append(str(e)))
    view.goto(page.as_uri())
    yield view
    assert view.said == []
    assert [u for u in view.asked if not u.startswith(("file:", "data:"))] == []
    view.close()


def test_sliders_by_keyboard(opened):
    """Every slider, moved by arrows, Home and End: the picture, the output and the spoken value change."""
    sliders = opened.locator("[data-slider]").all()
    assert len(sliders) == 5
    for slider in sliders:
        control, shown = slider.locator("input"), slider.locator("[data-frame]:visible")
        last = int(control.get_attribute("max"))
        if not last:
            assert control.is_disabled()
            continue
        pictures = []
        control.focus()
        opened.keyboard.press("Home")
        for i in range(last + 1):
            assert shown.count() == 1
            said = shown.get_attribute("data-frame")
            assert control.input_value() == str(i)
            assert slider.locator("output").inner_text() == said == control.get_attribute("aria-valuetext")
            pictures.append(shown.locator("img").screenshot())
            opened.keyboard.press("ArrowRight")
        assert len(set(pictures)) == last + 1  # it refines
        opened.keyboard.press("Home")
        assert control.input_value() == "0"
        opened.keyboard.press("End")
        assert control.input_value() == str(last)


def test_tab_reaches_the_sliders_in_order(opened):
    reached = []
    for _ in range(80):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id"))
    ids = [i for i in dict.fromkeys(reached) if i.startswith("slider")]
    assert ids == [s.get_attribute("id") for s in opened.locator("input:enabled").all()]


def test_light_and_dark(browser, page):
    papers = []
    for scheme in ("light", "dark"):
        view = patient(browser.new_page(color_scheme=scheme))
        view.goto(page.as_uri())
        papers.append(view.evaluate("getComputedStyle(document.body).backgroundColor"))
        view.close()
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_without_scripts_every_picture_shows(browser, page):
    context = browser.new_context(java_script_enabled=False)
    view = patient(context.new_page())
    view.goto(page.as_uri())
    frames = view.locator("[data-frame]")
    assert frames.count() == view.locator("[data-frame]:visible").count() > 8
    assert view.locator("input:visible").count() == 0
    context.close()


def test_fits_a_telephone(browser, page):
    view = patient(browser.new_page(viewport={"width": 390, "height": 800}))
    view.goto(page.as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.close()
