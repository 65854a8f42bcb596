"""What the benches measured of speed beside quality, in one form: `genlab report` draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .machine import describe_load


@dataclass(frozen=True)
class Way:
    """One way of drawing: a sampler, a model, a setting."""

    name: str
    seconds: float | None
    """Of an image; None where nothing was timed."""
    value: float | None
    """The metric; None where nothing was measured."""
    low: float | None = None
    high: float | None = None
    calls: float | None = None
    """Model calls a batch."""
    exact: bool | None = None
    """Whether it draws from the generator's own distribution; None where that is no question."""


@dataclass(frozen=True)
class Comparison:
    """Ways of drawing that one run on one machine set side by side, under one protocol."""

    title: str
    metric: str
    images: int | None
    """Images a figure."""
    protocol: str
    """Classes, reference, guidance, machine."""
    ways: tuple[Way, ...]
    refused: tuple[str, ...] = ()
    """Rows that could not be drawn, and why."""


def comparisons(result: Any) -> list[Comparison]:
    """The comparisons in a bench's result.json; none where it holds no speed beside quality."""
    if not isinstance(result, dict) or not isinstance(result.get("config"), dict):
        return []
    if isinstance(result.get("models"), list):
        return list(_samplers(result))
    rows = result.get("rows")
    if isinstance(rows, dict) and "teacher" in result:
        return [_distilled(result)]
    if isinstance(rows, dict) and all(isinstance(r, dict) and "value" in r and "metric" in r for r in rows.values()):
        return [_baseline(result)]
    points = rows if isinstance(rows, list) else result.get("points")
    if isinstance(points, list) and points and all(isinstance(p, dict) and "distance" in p for p in points):
        return [_swept(result, points)]
    return []


def _samplers(result: dict[str, Any]) -> Iterator[Comparison]:
    for m in result["models"]:
        done = [r for r in m["rows"] if "refused" not in r]
        yield Comparison(
            title=f"{m['model']}: samplers",
            metric=result["metric"],
            images=next((r["n"] for r in done if "n" in r), None),
            protocol=f"{_asked(result)}; {m['machine']}",
            ways=tuple(
                Way(r["name"], r["seconds"], r.get("fd"), r.get("fd_low"), r.get("fd_high"), r["calls"], r["exact"])
                for r in done
            ),
            refused=tuple(f"{r['name']}: {r['refused'].splitlines()[0]}" for r in m["rows"] if "refused" in r),
        )


def _distilled(result: dict[str, Any]) -> Comparison:
    rows = result["rows"]
    ways = tuple(
        Way(name, r["seconds"], r.get("fd"), r.get("fd_low"), r.get("fd_high"), r["calls"], name == "teacher")
        for name, r in rows.items()
    )
    title = f"{result['config']['model']}, a student of {result['teacher']}"
    images = next((r["n"] for r in rows.values() if "n" in r), None)
    return Comparison(title, result["metric"], images, _asked(result), ways)


def _baseline(result: dict[str, Any]) -> Comparison:
    rows = result["rows"]
    ways = tuple(
        Way(name, r.get("seconds_an_image"), r["value"], r["low"], r["high"], r.get("model_calls"))
        for name, r in rows.items()
    )
    first = next(iter(rows.values()))
    return Comparison("Beside a DDPM of equal training time", first["metric"], first["n"], _asked(result), ways)


def _swept(result: dict[str, Any], points: list[dict[str, Any]]) -> Comparison:
    ways = []
    for p in points:
        name = " ".join(str(p[k]) for k in ("model", "entity", "context", "seed") if k in p)
        if isinstance(p.get("config"), dict):
            name += " " + ", ".join(f"{k} {v}" for k, v in p["config"].items() if k in ("method", "steps"))
        low, high = p["interval"]
        ways.append(Way(name.strip(), p.get("seconds"), p["distance"], low, high, p.get("calls")))
    title = " and ".join(str(v) for k, v in result["config"].items() if k in ("model", "ecar", "flow", "preset") and v)
    return Comparison(
        title or "A sweep", points[0]["metric"], points[0].get("n", result.get("n")), _asked(result), tuple(ways)
    )


def _asked(result: dict[str, Any]) -> str:
    """The settings that figures depend on, and how busy the machine was."""
    names = ("reference", "classes", "guidance", "batch_size", "draw_batch", "steps", "minutes", "dtype", "device")
    told = [f"{k.replace('_', ' ')} {v}" for k, v in result["config"].items() if k in names and v is not None]
    if isinstance(result.get("busy"), dict):
        told.append(describe_load(**result["busy"]))
    return "; ".join(told)
