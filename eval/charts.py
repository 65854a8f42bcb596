"""Charts as inline SVG: lines over a common axis, and points with intervals, in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import COLOURS, esc, row, table

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 42


@dataclass(frozen=True)
class Line:
    """A named line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A numbered point, with the interval of its y."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def number(value: float) -> str:
    """A number for people: 12,000, 0.034, 3e-06."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line_chart(lines: Sequence[Line], *, x_name: str, y_name: str, width: int = 640, height: int = 260) -> str:
    """Lines with a legend and a table of their values; y is logarithmic where it spans more than a factor of 20.

    Noisy lines (more than 60 points) are drawn faint, with their running mean over a thirtieth of them on top.
    """
    xs, ys = [v for one in lines for v in one.x], [v for one in lines for v in one.y]
    log = min(ys) > 0 and max(ys) > 20 * min(ys)
    x, x_ticks = _axis(min(xs), max(xs), LEFT, width - RIGHT)
    y, y_ticks = _axis(min(ys), max(ys), height - BOTTOM, TOP, log)
    shapes, legend = [], []
    for i, one in enumerate(lines):
        kind, dash = f"s{i % COLOURS}", DASHES[i % len(DASHES)]
        smooth = running_mean(one.y, len(one.y) // 30) if len(one.y) > 60 else None
        if smooth is not None:
            shapes.append(_polyline(one.x, one.y, x, y, f'class="{kind} stroke" stroke-width="1" opacity=".3"'))
        attributes = f'class="{kind} stroke" stroke-width="1.8" stroke-dasharray="{dash}"'
        shapes.append(_polyline(one.x, smooth or one.y, x, y, attributes))
        if len(one.x) == 1:
            shapes.append(f'<circle cx="{x(one.x[0]):.1f}" cy="{y(one.y[0]):.1f}" r="3" class="{kind} fill"/>')
        legend.append(legend_entry(attributes, one.name))
    said = "; ".join(f"{one.name} from {number(one.y[0])} to {number(one.y[-1])}" for one in lines)
    title = f"{y_name} over {x_name}: {said}"
    axes = _axes(x_ticks, y_ticks, x, y, x_name, y_name + (", logarithmic" if log else ""), width, height)
    return (
        f'<div class="chart"><svg viewBox="0 0 {width} {height}" width="{width}" role="img"><title>{esc(title)}</title>'
        f'{axes}{"".join(shapes)}</svg><ul class="legend">{"".join(legend)}</ul>'
        f"<details><summary>{esc(y_name)} as a table</summary>{_values(lines, x_name, y_name)}</details></div>"
    )


def legend_entry(attributes: str, name: str) -> str:
    """A legend's entry: a piece of line as it is drawn, and its name."""
    line = f'<line x1="1" y1="5" x2="33" y2="5" {attributes}/>'
    return f'<li><svg width="34" height="10" viewBox="0 0 34 10" aria-hidden="true">{line}</svg> {esc(name)}</li>'


def scatter(points: Sequence[Point], *, x_name: str, y_name: str, width: int = 640, height: int = 340) -> str:
    """Points over a logarithmic x axis, each with its number in a table beside; hollow where `hollow`."""
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    x, x_ticks = _axis(min(p.x for p in points), max(p.x for p in points), LEFT + 14, width - RIGHT - 24, log=True)
    y, y_ticks = _axis(min(ys), max(ys), height - BOTTOM - 10, TOP + 10)
    shapes = []
    for p in points:
        a, b = x(p.x), y(p.y)
        if p.low is not None and p.high is not None:
            shapes.append(
                f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}" class="s0 stroke"/>'
            )
        kind = "hollow" if p.hollow else "fill"
        shapes.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" stroke-width="1.6" class="s0 {kind}"/>')
        shapes.append(f'<text x="{a + 8:.1f}" y="{b - 4:.1f}">{esc(p.label)}</text>')
    title = f"{y_name} against {x_name}, {len(points)} points; the table below has the same figures"
    axes = _axes(x_ticks, y_ticks, x, y, x_name + ", logarithmic", y_name, width, height)
    return (
        f'<div class="chart"><svg viewBox="0 0 {width} {height}" width="{width}" role="img"><title>{esc(title)}</title>'
        f"{axes}{''.join(shapes)}</svg></div>"
    )


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place (of fewer at the beginning)."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers from about `low` to about `high`, all inside."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
            if len(found) >= 3:
                return found
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5)
    return [round(step * k, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(
    low: float, high: float, start: float, end: float, log: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Where on the page a value lies, between `start` and `end`, and the axis's round numbers."""
    if log:
        low, high = (low, high) if high > 1.2 * low else (low / 1.2, high * 1.2)
    else:
        pad = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    f = math.log if log else float
    scale = (end - start) / (f(high) - f(low))
    return lambda v: start + (f(v) - f(low)) * scale, ticks(low, high, log)


def _polyline(xs: Sequence[float], ys: Sequence[float], x: Callable, y: Callable, attributes: str) -> str:
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    return f'<polyline points="{points}" {attributes}/>'


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    x: Callable,
    y: Callable,
    x_name: str,
    y_name: str,
    width: int,
    height: int,
) -> str:
    floor, middle = height - BOTTOM, (height - BOTTOM + TOP) / 2
    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" height="{floor - TOP}" class="frame"/>',
        f'<text x="{(LEFT + width - RIGHT) / 2}" y="{height - 8}" text-anchor="middle">{esc(x_name)}</text>',
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{esc(y_name)}</text>',
    ]
    for v in x_ticks:
        parts.append(f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{TOP}" y2="{floor}" class="grid"/>')
        parts.append(f'<text x="{x(v):.1f}" y="{floor + 15}" text-anchor="middle">{number(v)}</text>')
    for v in y_ticks:
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{number(v)}</text>')
    return "".join(parts)


def _values(lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """Up to nine values a line, the first and the last among them."""
    rows = []
    for one in lines:
        n = len(one.x)
        picks = sorted({round(i * (n - 1) / 8) for i in range(9)})
        rows += [row([one.name, number(one.x[i]), number(one.y[i])], numbers=(1, 2)) for i in picks]
    return table(f"{y_name} over {x_name}", ("run", x_name, y_name), rows, numbers=(1, 2))
