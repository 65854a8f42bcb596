"""`genlab convert SYSTEM SOURCE DEST`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import tyro

from genlab.config import config

from . import shared


@config
class ConvertConfig:
    """Read a published checkpoint and write it in genlab's format; every key is accounted for."""

    system: Annotated[str, tyro.conf.Positional]
    """Which system's layout: see the list in an error, or docs."""
    source: Annotated[Path, tyro.conf.Positional]
    """The file: .safetensors, .pt, .pth, .ckpt, .bin (read as plain weights, no code is run)."""
    dest: Annotated[Path, tyro.conf.Positional]
    """The checkpoint folder to write."""
    heads: int | None = None
    """Attention heads, where no published model has this width."""
    tokenizer: str = ""
    """For a generator: the MODEL that makes its tokens, noted in the checkpoint."""


def main(argv: list[str]) -> int:
    """Convert."""
    c = shared.parse(ConvertConfig, argv, prog="genlab convert")
    from genlab.convert import CONVERTERS
    from genlab.convert.keys import read_state
    from genlab.hub import save_pretrained

    convert = CONVERTERS[c.system]
    accepted = inspect.signature(convert).parameters
    options = {}
    if c.heads is not None:
        if "heads" not in accepted:
            raise ValueError(f"--heads has no effect on {c.system}: its shapes tell the number")
        options["heads"] = c.heads
    model = convert(read_state(c.source, "model_ema", "ema", "model", "module", "state_dict"), **options)
    if c.tokenizer:
        model.extra["tokenizer"] = c.tokenizer
    card = (
        f"# {c.dest.name}\n\nConverted by genlab from `{c.source.name}` ({c.system}). The original's licence applies.\n"
    )
    save_pretrained(model, c.dest, card=card)
    print(f"wrote {c.dest}: {model.kind}, {model.n_params / 1e6:.1f}M parameters, {model.spec.describe()}")
    return 0
