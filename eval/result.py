"""What an evaluation gives: figures with intervals, and everything needed to know what they mean."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlab.config import config, from_dict, to_dict

PUBLISHED_IMAGES = 50_000
NOT_COMPARABLE = "not comparable with published figures"


@config
class Figure:
    """One number with its interval and the measurement it came from."""

    name: str
    """Metric, as in `eval.harness.METRICS`."""
    value: float
    """The figure."""
    low: float | None = None
    """Lower end of the interval."""
    high: float | None = None
    """Upper end of the interval."""
    standard_error: float | None = None
    """Standard error behind the interval."""
    interval: str = "none"
    """How the interval was made, and what it covers."""
    better: str = "lower"
    """"lower" or "higher"."""
    extractor: str = ""
    """Extractor, first 16 digits of its weights' sha256, resize and input size."""
    layer: str = ""
    """Layer of the extractor."""
    detail: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers of this metric."""


@config
class Side:
    """One set of images, as it was used."""

    source: str
    """Where it came from."""
    n: int | None
    """Number of images used; None where a statistics file does not say."""
    hash: str
    """Content hash of the images, or of the statistics file."""
    skipped: int = 0
    """Images that could not be read and were left out."""


@config
class Result:
    """Figures and the protocol they were measured under."""

    figures: tuple[Figure, ...]
    """The figures, in the order asked for."""
    protocol: str
    """Name of the protocol (resize, antialiasing, quantisation, extractor)."""
    generated: Side
    """The set that was judged."""
    reference: Side | None = None
    """The set it was judged against."""
    class_protocol: str = ""
    """How classes were drawn, e.g. "1000 classes, 50 each"."""
    seeds: str = ""
    """Image seeds."""
    sampler: str = ""
    """Sampler and its settings."""
    guidance: str = ""
    """Guidance."""
    confidence: float = 0.95
    """Level of the intervals."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages that took part."""
    notes: tuple[str, ...] = ()
    """What a reader has to know beside the figures."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Material of the report: neighbours, per-class distances, curves."""

    def __getitem__(self, name: str) -> Figure:
        """The figure of a metric."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"no figure {name!r}; there are {', '.join(f.name for f in self.figures)}")

    @property
    def comparable(self) -> bool:
        """Whether there are enough images for published figures to be a yardstick."""
        return (self.generated.n or 0) >= PUBLISHED_IMAGES

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data."""
        return {**to_dict(self), "comparable": self.comparable}

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        data.pop("comparable", None)
        return from_dict(cls, data, where="result")

    def save(self, path: str | Path) -> Path:
        """Write the JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json())
        os.replace(temporary, path)
        return path

    def table(self) -> str:
        """The figures as text."""
        return tabulate([self])


def tabulate(results: Sequence[Result], labels: Sequence[str] = ()) -> str:
    """Several results in one table, a row a figure.

    Raises:
        ValueError: they were measured under different protocols, or under one name with different
            extractors, or against different references, or their intervals are of different confidence: such
            numbers do not belong in one table.
    """
    if not results:
        raise ValueError("no results to tabulate")
    for what, values in (
        ("protocols", {r.protocol for r in results}),
        ("references", {r.reference.hash for r in results if r.reference}),
        ("confidence levels", {f"{r.confidence:.0%}" for r in results}),
        *(
            (f"extractors of {name}", {f.extractor for r in results for f in r.figures if f.name == name})
            for name in dict.fromkeys(f.name for r in results for f in r.figures)
        ),
    ):
        if len(values) > 1:
            raise ValueError(
                f"these results have different {what} ({', '.join(sorted(values))}); "
                "their numbers cannot stand in one table. Print them apart, or evaluate again alike"
            )
    labels = list(labels) or [r.generated.source for r in results]
    header = ("set", "images", "metric", "value", f"{results[0].confidence:.0%} interval", "remark")
    rows = []
    for label, result in zip(labels, results, strict=True):
        for i, figure in enumerate(result.figures):
            interval = "-" if figure.low is None else f"{figure.low:.5g} .. {figure.high:.5g}"
            rows.append(
                (
                    label if i == 0 else "",
                    str(result.generated.n) if i == 0 else "",
                    figure.name,
                    f"{figure.value:.5g}",
                    interval,
                    "" if result.comparable else NOT_COMPARABLE,
                )
            )
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * w for w in widths))
    first = results[0]
    lines.append("")
    lines.append(f"protocol {first.protocol}; reference " + (_side(first.reference) if first.reference else "none"))
    for result, label in zip(results, labels, strict=True):
        if result.generated.skipped:
            lines.append(f"{label}: {result.generated.skipped} images skipped")
    lines.extend(f"note: {note}" for note in dict.fromkeys(n for r in results for n in r.notes))
    return "\n".join(lines) + "\n"


def _side(side: Side) -> str:
    skipped = f", {side.skipped} skipped" if side.skipped else ""
    return f"{side.source} ({side.n or 'unknown number of'} images{skipped}, {side.hash[:12]})"
