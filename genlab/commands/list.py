"""`genlab list`: what there is."""

from __future__ import annotations

import json
from typing import Any

from genlab.config import config, to_dict

from . import shared


@config
class ListConfig:
    """Show shipped models, presets, tokenizers, generators and samplers; or what others have published."""

    published: bool = False
    """The published checkpoints that `genlab convert` reads: licence, parameters, source, reported figures."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Print the tables."""
    options = shared.parse(ListConfig, argv, prog="genlab list")
    if options.published:
        from genlab.convert.published import published

        rows = list(published().values())
        print(json.dumps([to_dict(row) for row in rows], indent=2) if options.json else describe_published(rows))
        return 0
    table = collect()
    print(json.dumps(table, indent=2) if options.json else describe(table))
    return 0


def collect() -> dict[str, Any]:
    """Everything, as plain data; no weights are loaded."""
    from genlab.config import from_dict
    from genlab.hub import WEIGHTS, read_description, shipped
    from genlab.registry import GENERATORS, SAMPLERS, TOKENIZERS, model_class

    models = []
    for name, folder in shipped().items():
        description = read_description(folder)
        cls = model_class(description["kind"])
        models.append(
            {
                "name": name,
                "kind": description["kind"],
                "tokens": spec_of(cls, from_dict(cls.Config, description["config"])),
                "tokenizer": description.get("tokenizer", ""),
                "megabytes": round((folder / WEIGHTS).stat().st_size / 1e6, 1),
            }
        )
    presets = shared.load("train.presets").PRESETS
    return {
        "shipped": models,
        "presets": [{"name": p, "what": summary(presets[p].__doc__)} for p in presets],
        "tokenizers": list(TOKENIZERS),
        "generators": list(GENERATORS),
        "samplers": [{"name": s, "exact": SAMPLERS[s].exact, "what": summary(SAMPLERS[s].__doc__)} for s in SAMPLERS],
    }


def spec_of(cls: Any, model_config: Any) -> str:
    """The tokens of a model, without its weights."""
    import torch

    with torch.device("meta"):
        return cls(model_config).spec.describe()


def summary(doc: str | None) -> str:
    """A docstring's first line."""
    return (doc or "").strip().split("\n")[0]


def describe(table: dict[str, Any]) -> str:
    """The tables for people."""
    rows = lambda items: [f"  {m}" for m in items] or ["  (none)"]  # noqa: E731
    shipped = [
        f"{m['name']:<28} {m['kind']:<10} {m['megabytes']:>5.1f} MB  {m['tokens']}"
        + (f"  <- {m['tokenizer']}" if m["tokenizer"] else "")
        for m in table["shipped"]
    ]
    return "\n".join(
        [
            "shipped models (a MODEL is one of these, a folder, or a Hub id)",
            *rows(shipped),
            "\npresets (genlab train PRESET)",
            *rows(f"{p['name']:<28} {p['what']}" for p in table["presets"]),
            "\ntokenizers\n  " + ", ".join(table["tokenizers"]),
            "\ngenerators\n  " + ", ".join(table["generators"]),
            "\nsamplers",
            *rows(
                f"{s['name']:<28} {'exact' if s['exact'] else 'approximate':<12} {s['what']}" for s in table["samplers"]
            ),
        ]
    )


def describe_published(rows: list[Any]) -> str:
    """The published checkpoints for people, a block a system."""
    lines = ["published checkpoints (genlab convert SYSTEM NAME DEST); figures are their authors', ImageNet 256x256"]
    for system in dict.fromkeys(row.system for row in rows):
        block = [row for row in rows if row.system == system]
        lines += [f"\n{system}  ({block[0].paper})", f"  licence: {block[0].licence}"]
        lines += [f"  {r.name:<24} {r.millions:>6g} M  {r.figures:<42} {r.source}" for r in block]
    return "\n".join(lines)
