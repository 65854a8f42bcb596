"""A result as one self-contained HTML file: no scripts, no links out, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .charts import legend_entry
from .markup import document, esc, picture, table, write_page
from .markup import row as plain_row
from .result import NOT_COMPARABLE, Result

_STYLE = """
figure{display:inline-block;margin:.3rem;text-align:center}figure img{width:72px;height:72px;image-rendering:auto;
border:1px solid var(--line)}figcaption{font-size:.75rem}figure.pair{margin-right:.9rem}.how{min-width:14rem}
"""


def write_html(
    result: Result,
    path: str | Path,
    *,
    generated: Any = None,
    reference: Any = None,
    classes: Sequence[str] = (),
    title: str = "Evaluation",
) -> Path:
    """Write the report; whole or not at all.

    Args:
        result: from `evaluate(..., details=True)`; without details the page holds the figures only.
        path: the file.
        generated: the generated images (`len`, `batch(indices)`), for the pictures; None leaves them out.
        reference: the reference images, likewise.
        classes: class names for the per-class table.
        title: heading.
    """
    parts = [f"<h1>{esc(title)}</h1>", _figures(result), _protocol(result)]
    extra = result.extra
    if "nearest" in extra:
        parts.append(_nearest(extra["nearest"], generated, reference))
    for key, heading, text in (
        ("worst", "Images that raise the distance most", "Influence on the Fréchet distance, largest first."),
        ("best", "Images that lower it most", "Influence on the Fréchet distance, smallest first."),
    ):
        if extra.get(key) and generated is not None:
            parts.append(f"<h2>{heading}</h2><p class=small>{text}</p>")
            parts.append(
                _strip(generated, [(row["image"], f"#{row['image']}: {row['influence']:.3g}") for row in extra[key]])
            )
    if "precision_recall" in extra:
        parts.append(_precision_recall(extra["precision_recall"]))
    if extra.get("per_class"):
        parts.append(_per_class(extra["per_class"], classes))
    return write_page(path, document(title, parts, style=_STYLE))


def _figures(result: Result) -> str:
    rows = []
    remark = "" if result.comparable else f"<br><span class=remark>{NOT_COMPARABLE}</span>"
    for figure in result.figures:
        interval = "none" if figure.low is None else f"{figure.low:.5g} … {figure.high:.5g}"
        detail = ", ".join(f"{esc(k)} {v:.4g}" for k, v in figure.detail.items())
        detail += "<br>" if detail else ""
        rows.append(
            f'<tr><th scope="row"><b>{esc(figure.name)}</b><br><span class=small>{esc(figure.better)} '
            f"is better</span></th><td class=n><b>{figure.value:.5g}</b>{remark}</td><td class=n>{interval}</td>"
            f'<td class="small how">{esc(figure.interval)}<br>{detail}<code>'
            f"{esc(figure.extractor)} {esc(figure.layer)}</code></td></tr>"
        )
    warning = "" if result.comparable else f"<p class=warn>{result.generated.n or 'Few'} images: {NOT_COMPARABLE}.</p>"
    head = ("metric", "value", f"{result.confidence:.0%} interval", "how")
    return warning + table("Figures", head, rows, numbers=(1, 2))


def _protocol(result: Result) -> str:
    pairs: list[tuple[str, object]] = [("protocol", result.protocol)]
    for name, side in (("generated", result.generated), ("reference", result.reference)):
        if side is not None:
            pairs.append((name, f"{side.source}: {side.n or 'unknown number of'} images, {side.skipped} skipped"))
            pairs.append((f"{name} hash", side.hash))
    pairs += [
        ("classes", result.class_protocol), ("seeds", result.seeds), ("sampler", result.sampler),
        ("guidance", result.guidance), ("versions", ", ".join(f"{k} {v}" for k, v in result.versions.items())),
    ]  # fmt: skip
    rows = "".join(
        f'<tr><th scope="row">{esc(name)}</th><td><code>{esc(str(value))}</code></td></tr>'
        for name, value in pairs
        if value
    )
    notes = "".join(f"<li>{esc(note)}</li>" for note in result.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    return f"<h2>How it was measured</h2>{table('Protocol', ('what', 'value'), [rows])}{notes}"


def _picture(images: Any, index: int, what: str) -> str:
    from PIL import Image

    pixels = images.batch([index])[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > 144:
        image.thumbnail((144, 144))
    return picture(image, f"{what} image {index}")


def _strip(images: Any, rows: Sequence[tuple[int, str]]) -> str:
    return "".join(
        f"<figure>{_picture(images, index, 'generated')}<figcaption>{esc(text)}</figcaption></figure>"
        for index, text in rows
    )


def _nearest(data: dict[str, Any], generated: Any, reference: Any) -> str:
    parts = ["<h2>Nearest reference images</h2>"]
    sentence = (
        f"Median distance of {data['queries']} generated images to the nearest reference image: {data['median']:.4g}."
    )
    if "median_within_reference" in data:
        sentence += (
            f" Of reference images to their nearest neighbour: {data['median_within_reference']:.4g}. "
            f"{data['share_below_reference_1_percent']:.1%} of the generated images are nearer than the nearest 1 % "
            "among the reference; much more than 1 % speaks of copying."
        )
    parts.append(f"<p>{sentence}</p>{_histogram(data)}")
    if generated is not None and reference is not None:
        pairs = []
        for row in data["closest"]:
            pairs.append(
                f"<figure class=pair>{_picture(generated, row['image'], 'generated')}"
                f"{_picture(reference, row['neighbour'], 'reference')}"
                f"<figcaption>#{row['image']} and its nearest, {row['distance']:.3g}</figcaption></figure>"
            )
        parts.append(f"<p class=small>The closest pairs, generated on the left.</p>{''.join(pairs)}")
    return "".join(parts)


def _histogram(data: dict[str, Any]) -> str:
    width, height, base = 640, 180, 150
    edges = np.array(data["edges"])
    looks = {"reference": ("s1", "5 3", "within the reference"), "generated": ("s0", "", "generated")}
    shares = {key: np.array(data[key]) / max(sum(data[key]), 1) for key in looks}
    top = max(max(share.max() for share in shares.values()), 1e-12)
    x = 20 + edges / edges[-1] * (width - 40)
    shapes, legend = "", ""
    for key, (kind, dash, name) in looks.items():
        y = base - shares[key] / top * (base - 20)
        points = " ".join(f"{a:.1f},{v:.1f} {b:.1f},{v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True))
        points = f"{x[0]:.1f},{base} {points} {x[-1]:.1f},{base}"
        shapes += f'<polyline points="{points}" class="{kind} fill" fill-opacity=".2" stroke="none"/>'
        look = f'class="{kind} stroke" stroke-width="1.5" stroke-dasharray="{dash}"'
        shapes += f'<polyline points="{points}" {look}/>'
        legend += legend_entry(look, name)
    labels = (
        f'<text x="20" y="{base + 16}">0</text><text x="{width - 20}" y="{base + 16}" text-anchor="end">'
        f'{edges[-1]:.3g}</text><text x="{width / 2}" y="{base + 16}" text-anchor="middle">distance to the nearest '
        f"reference image</text>"
    )
    title = f"Histogram of distances to the nearest reference image: generated images (median {data['median']:.4g})"
    if "median_within_reference" in data:
        title += f" beside reference images (median {data['median_within_reference']:.4g})"
    drawing = f"<title>{title}</title>{shapes}{labels}"
    svg = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{drawing}</svg>'
    return f'{svg}<ul class="legend">{legend}</ul>'


def _precision_recall(rows: Sequence[dict[str, float]]) -> str:
    side, pad = 320, 48
    span = side - 2 * pad

    def at(row: dict[str, float]) -> tuple[float, float]:
        return pad + row["recall"] * span, side - pad - row["precision"] * span

    line = " ".join("{:.1f},{:.1f}".format(*at(row)) for row in rows)
    shapes = f'<polyline points="{line}" class="s0 stroke"/>'
    for i, row in enumerate(rows):
        x, y = at(row)
        shapes += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="s0 fill"/>'
        if i in (0, len(rows) - 1):  # those between would lie on one another
            end = x > side / 2
            shapes += (
                f'<text x="{x - 8 if end else x + 8:.1f}" y="{y + 4:.1f}" text-anchor="{"end" if end else "start"}">'
                f"k={row['k']:.0f}</text>"
            )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at({"recall": share, "precision": share})
        shapes += f'<line x1="{x}" x2="{x}" y1="{pad}" y2="{side - pad}" class="grid"/>'
        shapes += f'<line y1="{y}" y2="{y}" x1="{pad}" x2="{side - pad}" class="grid"/>'
        shapes += f'<text x="{x}" y="{side - pad + 15}" text-anchor="middle">{share:g}</text>'
        shapes += f'<text x="{pad - 6}" y="{y + 4}" text-anchor="end">{share:g}</text>'
    axes = (
        f'<rect x="{pad}" y="{pad}" width="{span}" height="{span}" class="frame"/>'
        f'<text x="{side / 2}" y="{side - 10}" text-anchor="middle">recall</text>'
        f'<text x="14" y="{side / 2}" text-anchor="middle" transform="rotate(-90 14 {side / 2})">precision</text>'
    )
    cells = [plain_row([f"{r['k']:.0f}", f"{r['precision']:.3f}", f"{r['recall']:.3f}"], (1, 2)) for r in rows]
    return (
        "<h2>Precision and recall</h2><p class=small>For neighbourhoods of k images; published figures use 3.</p>"
        f'<svg viewBox="0 0 {side} {side}" width="{side}" role="img"><title>Precision against recall, a point a '
        f"neighbourhood size; the table below has the figures</title>{axes}{shapes}</svg>"
        + table("Precision and recall by neighbourhood", ("k", "precision", "recall"), cells, numbers=(1, 2))
    )


def _per_class(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    def name(label: int) -> str:
        return esc(str(classes[label]) if label < len(classes) else f"class {label}")

    top = max(max(row["distance"] for row in rows), 1e-12)
    cells = []
    for row in sorted(rows, key=lambda row: -row["distance"]):
        width = 120 * max(0.0, row["distance"]) / top
        bar = f'<rect width="{width:.1f}" height="10" class="s0 fill"/>'
        bar = f'<svg width="120" height="10" aria-hidden="true">{bar}</svg>'
        cells.append(
            f'<tr><th scope="row">{name(row["class"])}</th><td class=n>{row["n"]}</td><td class=n>{row["reference_n"]}'
            f"</td><td class=n>{row['distance']:.5g}</td><td>{bar}</td></tr>"
        )
    return (
        "<h2>Classes</h2><p class=small>Fréchet distance within each class. Fewer images give higher distances, "
        "so compare classes of like size only.</p>"
        + table(
            "Distance by class", ("class", "generated", "reference", "distance", "to scale"), cells, numbers=(1, 2, 3)
        )
    )
