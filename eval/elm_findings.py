"""Verdicts on ELM's findings (Liu et al., arXiv 2410.16257) out of the study's measurements; table, plot and page.

The abstract states the first five. Of tokenizer, model, vocabulary and sampling it says that they were compared, not
what came out; what is tested there is the choice that the published models made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genlab.hub import write_atomic

Verdict = Literal["confirmed", "not confirmed", "not decidable here"]
Z = 1.96
BEGIN, END = "<!-- figures: written by `genlab bench elm-study --page` -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Difference:
    """A number that is above 0 where the finding holds."""

    what: str
    value: float
    se: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.value - Z * self.se, self.value + Z * self.se


def verdict(differences: Sequence[Difference]) -> Verdict:
    """Confirmed where all are above 0; not, where some are below 0 and none above; else the data don't decide."""
    above = [d.interval[0] > 0 for d in differences]
    below = [d.interval[1] < 0 for d in differences]
    if differences and all(above):
        return "confirmed"
    return "not confirmed" if any(below) and not any(above) else "not decidable here"


class Measured:
    """The study's measurements, with errors that cover images, and trainings where rows were trained repeatedly."""

    def __init__(self, result: dict[str, Any]) -> None:
        """Args: result: what `Study.run` collects."""
        self.result, self.rows = result, result["rows"]
        self.metric = next(iter(result["floors"].values()))["distance"]["metric"]
        self.spread = {kind: self._spread(kind) for kind in ("bits", "distance")}

    def _values(self, row: str, kind: str) -> list[float]:
        parts = self.rows[row]["trainings"]
        return [float(np.mean(t["bits"])) if kind == "bits" else t["distance"]["value"] for t in parts]

    def _spread(self, kind: str) -> float:
        """Relative standard deviation between trainings of a row, pooled over rows; 0 where each was trained once."""
        values = [v for v in (self._values(row, kind) for row in self.rows) if len(v) > 1]
        return math.sqrt(np.mean([np.var(v, ddof=1) / np.mean(v) ** 2 for v in values])) if values else 0.0

    def _training(self, row: str, kind: str) -> float:
        v = self._values(row, kind)
        return self.spread[kind] * float(np.mean(v)) / math.sqrt(len(v))

    def distance(self, row: str) -> tuple[float, float]:
        """Fréchet distance and its error."""
        parts = [t["distance"] for t in self.rows[row]["trainings"]]
        drawn = math.sqrt(sum(p["se"] ** 2 for p in parts)) / len(parts)
        return float(np.mean([p["value"] for p in parts])), math.hypot(drawn, self._training(row, "distance"))

    def bits(self, row: str) -> np.ndarray:
        """Bits a token of each probed image, averaged over trainings."""
        return np.mean([t["bits"] for t in self.rows[row]["trainings"]], 0)

    def bits_mean(self, row: str) -> tuple[float, float]:
        """Bits a token and their error."""
        value, error = mean_error(self.bits(row))
        return value, math.hypot(error, self._training(row, "bits"))

    def closer(self, row: str, other: str) -> Difference:
        """How much closer to the data `row` is than `other`."""
        (a, sa), (b, sb) = self.distance(row), self.distance(other)
        return Difference(f"{self.metric}, {other} less {row}:", b - a, math.hypot(sa, sb))

    def shorter(self, row: str, other: str) -> Difference:
        """How many bits a token `row` saves over `other`, image by image."""
        value, error = mean_error(self.bits(other) - self.bits(row))
        training = math.hypot(self._training(row, "bits"), self._training(other, "bits"))
        return Difference(f"bits a token, {other} less {row}:", value, math.hypot(error, training))

    def gain(self, row: str, which: str) -> np.ndarray:
        """Bits a token that near or far context saves, an image."""
        return np.mean([t["attention"]["gain"][which] for t in self.rows[row]["trainings"]], 0)

    def attention(self, row: str, what: str) -> tuple[float, float]:
        """A figure of the attention, averaged over layers (their errors too: layers share images)."""
        layers = [layer[what] for t in self.rows[row]["trainings"] for layer in t["attention"]["layers"]]
        return float(np.mean([v for v, _ in layers])), float(np.mean([e for _, e in layers]))

    def uniform(self, row: str, what: str) -> float:
        """The same figure for even attention."""
        return self.rows[row]["trainings"][0]["attention"]["layers"][0][f"uniform_{what}"]

    def sizes(self) -> list[str]:
        """The AR rows on the main tokens, by parameters."""
        main = self.rows[self.result["main"]]
        chosen = [n for n, r in self.rows.items() if (r["model"], r["tokens"]) == (main["model"], main["tokens"])]
        return sorted(chosen, key=lambda n: self.rows[n]["trainings"][0]["parameters"])

    def loss_at_equal_images(self) -> dict[str, float]:
        """Training loss of each size, bits a token, where the slowest has ended (the rest of the schedule differs)."""
        curves = {n: np.array(self.rows[n]["trainings"][0]["curve"], float).reshape(-1, 2) for n in self.sizes()}
        if not all(len(c) for c in curves.values()):
            return {}
        end = min(c[-1, 0] for c in curves.values())
        return {n: float(np.interp(end, c[:, 0], c[:, 1])) for n, c in curves.items()}


def mean_error(x: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each finding with its verdict and the differences that decided it."""
    m = Measured(result)
    main, sizes = result["main"], m.sizes()
    cut = m.rows[main]["tokens"]
    small, large = sizes[0], sizes[-1]
    tokens = [row["tokens"] for row in m.rows.values() if row["model"] == "mlm"]
    vocabularies = [t for t in tokens if t != "vq"]
    out: list[dict[str, Any]] = []

    def finding(claim: str, source: str, differences: list[Difference]) -> None:
        figures = [{"what": d.what, "value": d.value, "low": d.interval[0], "high": d.interval[1]} for d in differences]
        out.append({"claim": claim, "source": source, "verdict": verdict(differences), "figures": figures})

    equal = result["randomness"]["equal"]
    finding(
        "Image tokens are more random than text tokens",
        "abstract",
        [
            Difference(f"{title}, {name} less caption words:", a[0] - b[0], math.hypot(a[1], b[1]))
            for name in equal
            if not name.startswith("caption")
            for title, key in (("share of the largest entropy", "evenness"), ("left by context", "unpredictable"))
            for a, b in [(equal[name][key], equal["caption words"][key])]
        ],
    )
    learned = []
    for row, name in ((main, "BAE tokens"), ("ar-vq", "VQ tokens")):
        grams = [np.array(b) for b in result["randomness"]["all_image_tokens"][name]]
        best = min(grams, key=lambda b: b.mean())
        value, error = mean_error(best - m.bits(row))
        learned.append(Difference(f"bits a token, best n-gram less {row}:", value, error))
    finding("AR models learn patterns in them all the same", "abstract", learned)

    def local(row: str) -> list[Difference]:
        near, error = m.attention(row, "near")
        return [
            Difference(f"bits a token that near context saves, {row}:", *mean_error(m.gain(row, "near"))),
            Difference(f"attention on near places beyond even, {row}:", near - m.uniform(row, "near"), error),
        ]

    finding("Models of all sizes use local information", "abstract", [d for row in sizes for d in local(row)])
    if large != small:
        far, far_error = mean_error(m.gain(large, "far") - m.gain(small, "far"))
        (a, sa), (b, sb) = m.attention(large, "distance"), m.attention(small, "distance")
        finding(
            "Larger models use global context better",
            "abstract",
            [
                Difference(f"bits a token that far context saves, {large} less {small}:", far, far_error),
                Difference(f"attention's distance in places, {large} less {small}:", a - b, math.hypot(sa, sb)),
            ],
        )
        finding(
            "Larger models do better (here: at equal CPU time)",
            "abstract",
            [m.shorter(large, small), m.closer(large, small)],
        )
    finding(
        "Binary codes (BAE) serve better than a codebook (VQ)",
        "the published models",
        [m.closer(f"{model}-{cut}", f"{model}-vq") for model in ("ar", "mlm")],
    )
    finding(
        "AR models do better than masked ones",
        "the published models",
        [m.closer(f"ar-{t}", f"mlm-{t}") for t in tokens],
    )
    if vocabularies[0] != cut:
        whole = f"ar-{vocabularies[0]}"
        finding(
            f"Cut codes ({cut}) serve better than whole ones ({vocabularies[0]})",
            "the published models",
            [m.closer(main, whole), m.shorter(main, whole)],
        )
    chosen = []
    for model in ("ar", "mlm"):
        row, plain = f"{model}-{cut}", result["plain"][model]
        value, error = m.distance(row)
        chosen.append(
            Difference(f"{m.metric}, {row}, plain less best:", plain["value"] - value, math.hypot(plain["se"], error))
        )
    finding("Guided or cut-off sampling does better than plain", "the published models", chosen)
    return out


# -- for people -----------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Every table: title, columns, rows."""
    m = Measured(result)

    def pair(value: float, se: float, digits: int = 2) -> str:
        return f"{value:.{digits}f} ± {Z * se:.{digits}f}"

    findings = [
        [f["claim"], f["source"], f["verdict"],
         "; ".join(f"{x['what']} {x['value']:+.3g} [{x['low']:+.3g}, {x['high']:+.3g}]" for x in f["figures"])]
        for f in result["findings"]
    ]  # fmt: skip
    rows = []
    for name, row in m.rows.items():
        first = row["trainings"][0]
        rows.append(
            [name, f"{first['parameters'] / 1e6:.2f}M", f"{first['trained'].get('images', 0):,}",
             pair(*m.bits_mean(name)) + (" (bound)" if row["model"] == "mlm" else ""), pair(*m.distance(name)),
             f"{first['distance']['seconds_an_image']:.3f}"]
        )  # fmt: skip
    floors = [
        [name, pair(f["distance"]["value"], f["distance"]["se"]), f"{f['psnr']:.1f}" if "psnr" in f else "",
         f"{f['usage']['usage']:.0%} of {f['usage']['codes']}" if "usage" in f else ""]
        for name, f in result["floors"].items()
    ]  # fmt: skip
    random = [
        [name, f"{r['tokens']:,}", f"{r['vocab']:,}", f"{r['commonest']:.1%}", *(pair(*e) for e in r["entropies"]),
         pair(*r["kl_uniform"]), pair(*r["evenness"]), pair(*r["unpredictable"])]
        for name, r in result["randomness"]["equal"].items()
    ]  # fmt: skip
    local = [
        [name, *(pair(*m.attention(name, what)) + f" ({m.uniform(name, what):.2f})" for what in ("distance", "near")),
         *(pair(*mean_error(m.gain(name, which))) for which in ("near", "far")),
         f"{loss:.2f}" if (loss := m.loss_at_equal_images().get(name)) is not None else ""]
        for name in m.sizes()
    ]  # fmt: skip
    sweep = [
        [model, ", ".join(f"{k} {v:g}" for k, v in point["settings"].items()), pair(point["value"], point["se"])]
        for model, points in result["sweep"].items()
        for point in points
    ]
    n = result["config"]["n"]
    return [
        ("Findings", ["finding", "from", "verdict", "figures (95 % intervals)"], findings),
        (f"Rows, {n} images each", ["row", "parameters", "images trained on", "bits a token", m.metric, "s an image"],
         rows),
        ("Floors", ["images", m.metric, "PSNR, dB", "codes used"], floors),
        ("Randomness, bits a token on held-out tokens",
         ["tokens", "counted", "vocabulary", "commonest", "no context", "1 neighbour", "2 neighbours",
          "KL to uniform", "share of the largest", "left by context"], random),
        ("AR models by size (in brackets: even attention)",
         ["row", "attention's distance", "attention on near places", "near context saves, bits",
          "far context saves, bits", "training loss at equal images, bits"], local),
        (f"Sampling, {result['config']['sweep_n']} images each", ["model", "settings", m.metric], sweep),
    ]  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """All tables as text."""
    parts = []
    for title, columns, rows in tables(result):
        if title == "Findings":
            lines = [f"{r[2].upper():<19} {r[0]} ({r[1]})\n" + "\n".join(" " * 20 + f for f in r[3].split("; "))
                     for r in rows]  # fmt: skip
        else:
            cells = [columns, *rows]
            widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
            lines = ["  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, covers(result)])


def covers(result: dict[str, Any]) -> str:
    """What the intervals leave out."""
    c = result["config"]
    trained = (
        "each row was trained once, so they leave out how much another training would differ"
        if c["repeats"] == 1
        else f"they cover images and {c['repeats']} trainings a row"
    )
    return (
        f"Intervals are 95 %; {trained}. {c['minutes']:g} CPU-minutes a row: what more training would change is not "
        "seen here. Fréchet distances of few small images are not comparable with published ones."
    )


def fill_page(path: Path, result: dict[str, Any]) -> None:
    """Write the tables between the page's markers.

    Raises:
        FileNotFoundError: if there is no such page.
        ValueError: if it has no markers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no page {path} to fill; --page takes docs/elm-study.md or a page with its markers")
    text = path.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r} to write between")
    before, rest = text.split(BEGIN, 1)
    parts = []
    for title, columns, rows in tables(result):
        lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
        parts += [f"### {title}\n", "\n".join(lines), ""]
    body = "\n".join([*parts, covers(result)])
    write_atomic(path, f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END, 1)[1]}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Randomness, locality, rows and sampling in one picture."""
    from matplotlib.figure import Figure

    m = Measured(result)
    figure = Figure(figsize=(13, 9), layout="constrained")
    random, local, rows, sampling = figure.subplots(2, 2).flat

    equal = result["randomness"]["equal"]
    for i, (name, r) in enumerate(equal.items()):
        width = 0.8 / len(equal)
        x = np.arange(len(r["entropies"])) + (i - (len(equal) - 1) / 2) * width
        value, error = np.array(r["entropies"]).T / math.log2(r["vocab"])
        random.bar(x, value, 0.9 * width, yerr=Z * error, label=name)
    random.set_xticks(range(3), ["no context", "1 neighbour", "2 neighbours"])
    random.set(ylabel="entropy / log2(vocabulary)", title="Randomness on equally many tokens")
    random.set_ylim(0, 1.4)
    random.legend(fontsize=8, ncols=2, loc="upper right")

    for name in m.sizes():
        layers = m.rows[name]["trainings"][0]["attention"]["layers"]
        depth = np.linspace(0, 1, len(layers)) if len(layers) > 1 else np.array([0.5])
        value, error = np.array([layer["distance"] for layer in layers]).T
        local.errorbar(depth, value, Z * error, marker="o", capsize=2, label=name)
    local.axhline(m.uniform(m.sizes()[0], "distance"), color="grey", ls="--", label="even attention")
    local.set(xlabel="depth (first to last layer)", ylabel="distance in places", title="Attention by model size")
    local.legend(fontsize=8)

    names = list(m.rows)
    for i, name in enumerate(names):
        value, error = m.distance(name)
        colour = "tab:blue" if m.rows[name]["model"] == "ar" else "tab:orange"
        rows.errorbar(value, i, xerr=Z * error, fmt="o", color=colour, capsize=3)
    floor = result["floors"]["held-out images"]["distance"]["value"]
    rows.axvline(floor, color="grey", ls="--", label="held-out images")
    rows.set_yticks(range(len(names)), names)
    rows.invert_yaxis()
    rows.set(xlabel=m.metric, title=f"Rows, {result['config']['minutes']:g} CPU-minutes each")
    rows.legend(fontsize=8)

    at, ticks = 0, []
    for model, points in result["sweep"].items():
        plain = points[0]["settings"]
        for point in points:
            changed = {k: v for k, v in point["settings"].items() if v != plain[k]}
            ticks.append(f"{model}: " + (", ".join(f"{k} {v:g}" for k, v in changed.items()) or "plain"))
            colour = "tab:blue" if model == "ar" else "tab:orange"
            sampling.errorbar(point["value"], at, xerr=Z * point["se"], fmt="o", color=colour, capsize=3)
            at += 1
    sampling.set_yticks(range(at), ticks, fontsize=8)
    sampling.invert_yaxis()
    sampling.set(xlabel=m.metric, title=f"Sampling, {result['config']['sweep_n']} images each")
    for axis in (random, local, rows, sampling):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
