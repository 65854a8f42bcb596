"""A result as one self-contained HTML file: no scripts, no links out, every text escaped."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .result import NOT_COMPARABLE, Result

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid #d8dde3;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th.n{text-align:right}
.warn{background:#fff3d6;border-left:4px solid #d99a00;padding:.5rem .8rem}.small{color:#5b6570;font-size:.87rem}
figure{display:inline-block;margin:.3rem;text-align:center}figure img{width:72px;height:72px;image-rendering:auto;
border:1px solid #d8dde3}figcaption{font-size:.75rem;color:#5b6570}svg text{font:11px system-ui,sans-serif;fill:#5b6570}
code{overflow-wrap:anywhere}caption{text-align:left;font-weight:600;padding:.3rem .7rem}
th[scope=row]{font-weight:400}.scroll{overflow-x:auto}.scroll:focus-visible{outline:2px solid #2f6fb5}
.remark{display:inline-block;max-width:8.5rem;white-space:normal;font-size:.75rem;line-height:1.2;color:#7a5200}
figure.pair{margin-right:.9rem}svg{max-width:100%;height:auto}.how{min-width:14rem}
@media(max-width:40rem){th,td{padding:.3rem}th[scope=row]{overflow-wrap:anywhere;min-width:6rem}td.n{white-space:normal}}
"""
_OURS, _THEIRS = "#2f6fb5", "#d98a29"


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
    parts = [f"<h1>{html.escape(title)}</h1>", _figures(result), _protocol(result)]
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
    body = "\n".join(parts)
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _table(caption: str, head: Sequence[str], rows: Sequence[str], numbers: Sequence[int] = ()) -> str:
    """A table that a screen reader can announce and a keyboard can scroll; rows are ready HTML."""
    cells = "".join(
        f'<th scope="col"{" class=n" if i in numbers else ""}>{html.escape(name)}</th>' for i, name in enumerate(head)
    )
    label = html.escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(result: Result) -> str:
    rows = []
    remark = "" if result.comparable else f"<br><span class=remark>{NOT_COMPARABLE}</span>"
    for figure in result.figures:
        interval = "none" if figure.low is None else f"{figure.low:.5g} … {figure.high:.5g}"
        detail = ", ".join(f"{html.escape(k)} {v:.4g}" for k, v in figure.detail.items())
        detail += "<br>" if detail else ""
        rows.append(
            f'<tr><th scope="row"><b>{html.escape(figure.name)}</b><br><span class=small>{html.escape(figure.better)} '
            f"is better</span></th><td class=n><b>{figure.value:.5g}</b>{remark}</td><td class=n>{interval}</td>"
            f'<td class="small how">{html.escape(figure.interval)}<br>{detail}<code>'
            f"{html.escape(figure.extractor)} {html.escape(figure.layer)}</code></td></tr>"
        )
    warning = "" if result.comparable else f"<p class=warn>{result.generated.n or 'Few'} images: {NOT_COMPARABLE}.</p>"
    head = ("metric", "value", f"{result.confidence:.0%} interval", "how")
    return warning + _table("Figures", head, rows, numbers=(1, 2))


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
        f'<tr><th scope="row">{html.escape(name)}</th><td><code>{html.escape(str(value))}</code></td></tr>'
        for name, value in pairs
        if value
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    return f"<h2>How it was measured</h2>{_table('Protocol', ('what', 'value'), [rows])}{notes}"


def _picture(images: Any, index: int, what: str) -> str:
    from PIL import Image

    pixels = images.batch([index])[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if max(picture.size) > 144:
        picture.thumbnail((144, 144))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f'<img alt="{what} image {index}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _strip(images: Any, rows: Sequence[tuple[int, str]]) -> str:
    return "".join(
        f"<figure>{_picture(images, index, 'generated')}<figcaption>{html.escape(text)}</figcaption></figure>"
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
    shapes = []
    for key, colour in (("reference", _THEIRS), ("generated", _OURS)):
        counts = np.array(data[key], dtype=np.float64)
        share = counts / max(counts.sum(), 1.0)
        top = max(np.max(np.array(data[k]) / max(sum(data[k]), 1)) for k in ("reference", "generated"))
        x = 20 + edges / edges[-1] * (width - 40)
        y = base - share / max(top, 1e-12) * (base - 20)
        points = " ".join(f"{a:.1f},{v:.1f} {b:.1f},{v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True))
        shapes.append(
            f'<polyline points="{x[0]:.1f},{base} {points} {x[-1]:.1f},{base}" fill="{colour}" fill-opacity=".22" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )
    labels = (
        f'<text x="20" y="{base + 16}">0</text><text x="{width - 20}" y="{base + 16}" text-anchor="end">'
        f'{edges[-1]:.3g}</text><text x="{width / 2}" y="{base + 16}" text-anchor="middle">distance to the nearest '
        f'reference image</text><text x="{width - 20}" y="14" text-anchor="end" style="fill:{_OURS}">generated</text>'
        f'<text x="{width - 90}" y="14" text-anchor="end" style="fill:{_THEIRS}">within the reference</text>'
    )
    title = (
        f"Histogram of distances to the nearest reference image: generated images (median {data['median']:.4g}) beside "
        f"reference images (median {data.get('median_within_reference', float('nan')):.4g})"
    )
    drawing = f"<title>{title}</title>{''.join(shapes)}{labels}"
    return f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">{drawing}</svg>'


def _precision_recall(rows: Sequence[dict[str, float]]) -> str:
    side, pad = 300, 40
    span = side - 2 * pad

    def at(row: dict[str, float]) -> tuple[float, float]:
        return pad + row["recall"] * span, side - pad - row["precision"] * span

    line = " ".join("{:.1f},{:.1f}".format(*at(row)) for row in rows)
    dots = ""
    for row in rows:
        x, y = at(row)
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_OURS}"/>'
        dots += f'<text x="{x + 6:.1f}" y="{y - 5:.1f}">k={row["k"]:.0f}</text>'
    title = "Precision and recall: " + ", ".join(
        f"k={row['k']:.0f} {row['precision']:.3f} and {row['recall']:.3f}" for row in rows
    )
    axes = (
        f'<rect x="{pad}" y="{pad}" width="{span}" height="{span}" fill="none" stroke="#d8dde3"/>'
        f'<text x="{side / 2}" y="{side - 8}" text-anchor="middle">recall, 0 to 1</text>'
        f'<text x="14" y="{side / 2}" text-anchor="middle" transform="rotate(-90 14 {side / 2})">'
        "precision, 0 to 1</text>"
    )
    return (
        "<h2>Precision and recall</h2><p class=small>For neighbourhoods of k images; published figures use 3.</p>"
        f'<svg viewBox="0 0 {side} {side}" width="{side}" role="img"><title>{title}</title>{axes}'
        f'<polyline points="{line}" fill="none" '
        f'stroke="{_OURS}"/>{dots}</svg>'
    )


def _per_class(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    def name(label: int) -> str:
        return html.escape(str(classes[label]) if label < len(classes) else f"class {label}")

    cells = [
        f'<tr><th scope="row">{name(row["class"])}</th><td class=n>{row["n"]}</td><td class=n>{row["reference_n"]}</td>'
        f"<td class=n>{row['distance']:.5g}</td></tr>"
        for row in sorted(rows, key=lambda row: -row["distance"])
    ]
    return (
        "<h2>Classes</h2><p class=small>Fréchet distance within each class. Fewer images give higher distances, "
        "so compare classes of like size only.</p>"
        + _table("Distance by class", ("class", "generated", "reference", "distance"), cells, numbers=(1, 2, 3))
    )
