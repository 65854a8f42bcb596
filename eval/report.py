"""Runs, pictures, comparisons and figures as one self-contained HTML page: what `genlab report` writes.

Every slider is a native range input with a label and a live output. Without scripts all pictures stand below one
another. The page's content policy lets it load nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from PIL import Image

from .charts import Line, Point, line_chart, number, scatter
from .markup import document, esc, picture, row, table
from .result import NOT_COMPARABLE, Result
from .speed_quality import Comparison

STYLE = """
.frames img{image-rendering:pixelated;max-width:100%;height:auto;border:1px solid var(--line);display:block}
figure{margin:.6rem 0}.control{display:grid;grid-template-columns:auto 1fr;gap:.2rem 1rem;align-items:center;
margin:.4rem 0;max-width:40rem}.control output{grid-column:1/-1;font-variant-numeric:tabular-nums}
input[type=range]{width:100%;min-height:2rem;accent-color:var(--s0)}[hidden]{display:none!important}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:0 1.5rem}
summary{cursor:pointer}
nav ul{columns:2;padding-left:1.2rem}.frames figcaption{margin:.2rem 0 .8rem}
"""
SCRIPT = """
for (const slider of document.querySelectorAll("[data-slider]")) {
  const input = slider.querySelector("input"), output = slider.querySelector("output");
  const frames = [...slider.querySelectorAll("[data-frame]")];
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== input.valueAsNumber; });
    const said = frames[input.valueAsNumber].dataset.frame;
    output.textContent = said;
    input.setAttribute("aria-valuetext", said);
  };
  slider.querySelector("[data-control]").hidden = false;
  for (const caption of slider.querySelectorAll("[data-frame] figcaption")) caption.hidden = true;
  input.addEventListener("input", show);
  show();
}
"""
OF_THE_RUN = ("lr", "grad_norm", "images_per_second", "mfu")
NO_TERM = ("images", "step", "cpu_seconds", *OF_THE_RUN)


@dataclass(frozen=True)
class Frame:
    """One position of a slider."""

    image: Image.Image
    text: str
    """What this position is: `4 of 32 tokens, PSNR 21.3 dB`."""


@dataclass(frozen=True)
class Slider:
    """Pictures that a slider goes through."""

    title: str
    label: str
    """Of the control: `Tokens kept`."""
    about: str
    """A sentence on what is shown."""
    alt: str
    """What the pictures show; the position is added."""
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Still:
    """A single picture."""

    title: str
    about: str
    alt: str
    image: Image.Image


@dataclass(frozen=True)
class Run:
    """A training run."""

    name: str
    kind: str
    """What its losses can be compared within: model kind, and tokenizer or data."""
    facts: tuple[tuple[str, str], ...]
    """What is said of it in the table of runs: model, tokens, ..."""
    lines: tuple[dict[str, float], ...]
    """metrics.jsonl."""
    samples: Slider | None = None


@dataclass
class Report:
    """All that a page shows."""

    title: str
    runs: list[Run] = field(default_factory=list)
    reconstructions: list[Still] = field(default_factory=list)
    sliders: list[Slider] = field(default_factory=list)
    """By number of tokens or depths."""
    drawn: list[Still] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """What `genlab reconstruct --json` printed."""
    comparisons: list[Comparison] = field(default_factory=list)
    results: list[tuple[str, Result]] = field(default_factory=list)
    """Evaluations, by name."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    made_by: str = ""

    def html(self) -> str:
        """The page."""
        ids = count()
        every = [
            ("Runs", [_runs(self.runs)] if self.runs else []),
            ("Training curves", _curves(self.runs)),
            ("Samples over time", [_slider(r.samples, next(ids)) for r in self.runs if r.samples]),
            ("Reconstructions", [*map(_still, self.reconstructions), *map(_reconstruction, self.figures)]),
            ("More tokens, finer pictures", [_slider(s, next(ids)) for s in self.sliders]),
            ("Samples", list(map(_still, self.drawn))),
            ("Speed beside quality", list(map(_comparison, self.comparisons))),
            ("Metrics", [_results(group) for group in grouped(self.results)]),
        ]
        shown = [(name, parts) for name, parts in every if parts]
        links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name, _ in shown)
        parts = [f"<h1>{esc(self.title)}</h1>", f'<nav aria-label="Contents"><ul>{links}</ul></nav>']
        if self.notes:
            parts.append(f'<ul class="warn">{"".join(f"<li>{esc(note)}</li>" for note in self.notes)}</ul>')
        for name, content in shown:
            parts.append(f'<section aria-labelledby="{_anchor(name)}"><h2 id="{_anchor(name)}">{name}</h2>')
            parts += [*content, "</section>"]
        parts.append(f'<p class="small">{esc(self.made_by)}</p>')
        return document(self.title, parts, style=STYLE, script=SCRIPT)


def grouped(results: Sequence[tuple[str, Result]]) -> list[list[tuple[str, Result]]]:
    """Results that may stand in one table: the same protocol, reference, classes, number of images, extractors."""
    groups: dict[Any, list[tuple[str, Result]]] = {}
    for name, r in results:
        extractors = tuple(sorted({(f.name, f.extractor, f.layer) for f in r.figures}))
        reference = r.reference.hash if r.reference else ""
        key = (r.protocol, reference, r.generated.n, r.class_protocol, r.confidence, extractors)
        groups.setdefault(key, []).append((name, r))
    return list(groups.values())


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-").replace(",", "")


def _runs(runs: Sequence[Run]) -> str:
    heads = list(dict.fromkeys(name for run in runs for name, _ in run.facts))
    rows = [row([run.name, *(dict(run.facts).get(h, "") for h in heads)]) for run in runs]
    return table("Runs", ("run", *heads), rows)


def _curves(runs: Sequence[Run]) -> list[str]:
    """One heading a kind of run, since losses of different kinds have no common scale; one chart a term."""
    parts = []
    for kind in dict.fromkeys(run.kind for run in runs if run.lines):
        some = [run for run in runs if run.kind == kind and run.lines]
        names = dict.fromkeys(k for run in some for line in run.lines for k in line)
        terms = [k for k in names if k not in NO_TERM]
        charts = {k: _chart(some, k) for k in (*terms, *(k for k in OF_THE_RUN if k in names))}
        parts.append(f"<h3>{esc(kind)}</h3>")
        parts += [charts[k] for k in terms if k == "loss"]
        parts.append(f'<div class="pair">{"".join(charts[k] for k in terms if k != "loss")}</div>')
        others = "".join(charts[k] for k in OF_THE_RUN if k in charts)
        if others:
            parts.append(
                f'<details><summary>Rate, gradients and speed</summary><div class="pair">{others}</div></details>'
            )
    return parts


def _chart(runs: Sequence[Run], term: str) -> str:
    lines = []
    for run in runs:
        points = [(line["images"], line[term]) for line in run.lines if term in line]
        if points:
            lines.append(Line(run.name, *zip(*points, strict=True)))
    size = {} if term == "loss" else {"width": 420, "height": 220}
    return line_chart(lines, x_name="images seen", y_name=term.replace("_", " "), **size)


def _slider(s: Slider, i: int) -> str:
    last = len(s.frames) - 1
    frames = "".join(
        f'<figure data-frame="{esc(f.text)}">{picture(f.image, f"{s.alt}: {f.text}")}<figcaption>{esc(f.text)}'
        "</figcaption></figure>"
        for f in s.frames
    )
    control = (
        f'<div class="control" data-control hidden><label for="slider{i}">{esc(s.label)}</label>'
        f'<input type="range" id="slider{i}" min="0" max="{last}" step="1" value="{last}" autocomplete="off" '
        f'aria-valuetext="{esc(s.frames[last].text)}" aria-describedby="about{i}"{" disabled" if not last else ""}>'
        f'<output for="slider{i}" aria-live="polite">{esc(s.frames[last].text)}</output></div>'
    )
    return (
        f'<div data-slider><h3>{esc(s.title)}</h3><p class="small" id="about{i}">{esc(s.about)}</p>{control}'
        f'<div class="frames">{frames}</div></div>'
    )


def _still(s: Still) -> str:
    caption = f"<figcaption>{esc(s.about)}</figcaption>"
    return f'<h3>{esc(s.title)}</h3><figure class="frames">{picture(s.image, s.alt)}{caption}</figure>'


def _reconstruction(figures: dict[str, Any]) -> str:
    """What `genlab reconstruct --json` printed, its protocol in the caption."""
    about = ("model", "images", "clips", "source", "tokens")
    rows = [
        row([k.replace("_", " "), number(float(v)) if isinstance(v, (int, float)) else v], numbers=(1,))
        for k, v in figures.items()
        if k not in about and isinstance(v, (int, float, str))
    ]
    what = "clips" if "clips" in figures else "images"
    caption = f"{figures['model']}: {figures[what]} {what} of {figures['source']}, {figures['tokens']}"
    return table(caption, ("figure", "value"), rows, numbers=(1,))


def _comparison(c: Comparison) -> str:
    timed = [(str(i), w) for i, w in enumerate(c.ways, 1) if w.seconds and w.value is not None]
    points = [Point(i, w.seconds, w.value, w.low, w.high, w.exact is False) for i, w in timed]  # type: ignore[arg-type]
    rows = []
    for i, w in enumerate(c.ways, 1):
        interval = "" if w.low is None or w.high is None else f"{w.low:.2f} … {w.high:.2f}"
        value, seconds = ("" if v is None else f"{v:{form}}" for v, form in ((w.value, ".2f"), (w.seconds, ".4g")))
        exact = {True: "exact", False: "approximate", None: ""}[w.exact]
        calls = "" if w.calls is None else f"{w.calls:.1f}"
        rows.append(row([f"{i}. {w.name}", exact, seconds, calls, value, interval], numbers=(2, 3, 4, 5)))
    n = f"{c.images} images a figure; " if c.images else ""
    refused = "".join(f"<li>{esc(text)}</li>" for text in c.refused)
    refused = f"<details><summary>Refused: {len(c.refused)}</summary><ul>{refused}</ul></details>" if refused else ""
    hollow = " Hollow: approximate." if any(p.hollow for p in points) else ""
    told = f'<p class="small">{esc(n + c.protocol)}. Left is faster, lower is better.{hollow}</p>'
    head = ("way", "law", "s an image", "calls", c.metric, "interval")
    chart = scatter(points, x_name="seconds an image", y_name=c.metric) if points else ""
    return f"<h3>{esc(c.title)}</h3>{told}{chart}{table(c.title, head, rows, numbers=(2, 3, 4, 5))}{refused}"


def _results(group: Sequence[tuple[str, Result]]) -> str:
    """One table of one protocol."""
    first = group[0][1]
    rows = []
    for name, r in group:
        for i, f in enumerate(r.figures):
            interval = "none" if f.low is None else f"{f.low:.5g} … {f.high:.5g}"
            drawn = (
                "; ".join(filter(None, (r.sampler, r.guidance and f"guidance {r.guidance}", r.seeds))) if not i else ""
            )
            cells = [name if not i else "", drawn, f.name, f"{f.value:.5g}", interval, f.better]
            rows.append(row(cells, numbers=(3, 4)))
    head = ("set", "sampler, guidance, seeds", "metric", "value", f"{first.confidence:.0%} interval", "better")
    reference = f"{first.reference.source}, {first.reference.hash[:12]}" if first.reference else "none"
    pairs = [
        ("protocol", first.protocol), ("images", first.generated.n), ("classes", first.class_protocol),
        ("reference", reference), ("versions", ", ".join(f"{k} {v}" for k, v in first.versions.items())),
    ]  # fmt: skip
    notes = dict.fromkeys(note for _, r in group for note in r.notes)
    told = "".join(f"<li>{esc(note)}</li>" for note in notes)
    warning = "" if first.comparable else f'<p class="warn">{first.generated.n or "Few"} images: {NOT_COMPARABLE}.</p>'
    title = f"{first.generated.n or 'unknown number of'} images, {first.protocol}"
    how = table(f"Protocol of {title}", ("what", "value"), [row(p) for p in pairs if p[1]])
    return (
        f"<h3>{esc(title)}</h3>{warning}{table(f'Figures: {title}', head, rows, numbers=(3, 4))}"
        f"<details><summary>Protocol</summary>{how}<ul>{told}</ul></details>"
    )
