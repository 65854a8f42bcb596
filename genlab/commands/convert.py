"""`genlab convert SYSTEM SOURCE DEST`."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config

from . import shared

WEIGHTS = ("model_ema", "ema", "model", "module", "state_dict")
"""Where the weights may lie in a file, the averaged ones first."""


@config
class ConvertConfig:
    """Read a published checkpoint and write it in genlab's format; every key is accounted for.

    `genlab list --published` names those there are, with their licences.
    """

    system: Annotated[str, tyro.conf.Positional]
    """Which system's layout: see the list in an error, or docs."""
    source: Annotated[Path, tyro.conf.Positional]
    """The file: .safetensors, .pt, .pth, .ckpt, .bin (read as plain weights, no code is run), or a folder of its
    shards; or a Hub id, owner/name, whose model.safetensors is fetched; or a name from `genlab list --published`."""
    dest: Annotated[Path, tyro.conf.Positional]
    """The checkpoint folder to write."""
    heads: int | None = None
    """Attention heads, where no published model has this width."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the token map, where no shape tells (LlamaGen: 24 24 for c2i_*_384)."""
    image_size: int | None = None
    """For a tokenizer: side of its images."""
    sub_tokens: int | None = None
    """For ELM's autoencoder: into how many sub-tokens its bits are cut."""
    deterministic: bool | None = None
    """For ELM's autoencoder: bits by threshold, not drawn."""
    scales: tuple[int, ...] | None = None
    """For VAR and its tokenizer: sides of the maps, where they aren't the published ones."""
    scaling_factor: float | None = None
    """For a FlexTok or its autoencoder: what latents are multiplied by, where no config beside the file says it."""
    vae: Path | None = None
    """For VAR: its tokenizer's file (or published name), for the codebook; with --tokenizer it isn't needed."""
    base: str = ""
    """For SEED-LLaMA's LoRA: the LM it was trained on, a folder or Hub id of transformers."""
    pieces: str = ""
    """For SEED-LLaMA and Divot's LM: its tokenizer, a folder or Hub id of transformers, if not beside the weights."""
    agent: Path | None = None
    """For Divot's LM: the file of its agent, which reads and draws clips (agent/pytorch_model.bin)."""
    detokenizer: Path | None = None
    """For a Divot: the file of its de-tokenizer (Divot_detokenizer_stage2.bin); without it, it only encodes."""
    text_encoder: str = ""
    """For a generator by text: the encoder it was trained with, noted in the checkpoint."""
    tokenizer: str = ""
    """For a generator: the MODEL that makes its tokens, noted in the checkpoint; VAR takes its codebook from it."""


def main(argv: list[str]) -> int:
    """Convert."""
    c = shared.parse(ConvertConfig, argv, prog="genlab convert")
    from genlab.convert import CONVERTERS
    from genlab.convert.keys import read_state
    from genlab.convert.published import licence_of
    from genlab.hub import from_pretrained, save_pretrained
    from genlab.tokens import require_fit

    convert = CONVERTERS[c.system]
    licence = f"Licence of the weights: {licence_of(c.system)}."
    print(licence, file=sys.stderr)  # before anything is fetched
    accepted = inspect.signature(convert).parameters
    names = ["heads", "grid", "image_size", "sub_tokens", "deterministic", "scales", "scaling_factor", "vae"]
    names += ["base", "pieces", "agent", "detokenizer"]
    options = {name: value for name in names if (value := getattr(c, name)) not in (None, "")}
    for name in options:
        if name not in accepted:
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {c.system}: its shapes tell all it needs")
    source, entry = find(c.source, c.system)
    if entry is not None:
        options = entry.options | options
        if entry.vae and not c.tokenizer:
            options.setdefault("vae", Path(entry.vae))
    if "vae" in options:
        options["vae"] = read_state(find(options["vae"], "msvq")[0], *WEIGHTS)
    for part in ("agent", "detokenizer"):
        if part in options:
            options[part] = read_state(options[part], *WEIGHTS)
    if "source" in accepted:
        options["source"] = source
    model = convert(read_state(source, *WEIGHTS), **options)
    if text_encoder := c.text_encoder or (entry.text_encoder if entry else ""):
        if not getattr(model, "by_text", False):
            raise ValueError(f"--text-encoder has no effect: this {model.kind} doesn't draw by text")
        model.extra["text_encoder"] = text_encoder
    if c.tokenizer:
        tokenizer = from_pretrained(c.tokenizer)
        require_fit(c.tokenizer, tokenizer.spec, c.system, model.spec)
        if hasattr(model, "adopt"):
            model.adopt(tokenizer)
        model.extra["tokenizer"] = c.tokenizer
    card = f"# {c.dest.name}\n\nConverted by genlab from `{c.source.name}` ({c.system}). {licence}\n"
    save_pretrained(model, c.dest, card=card)
    print(f"wrote {c.dest}: {model.kind}, {model.n_params / 1e6:.1f}M parameters, {model.spec.describe()}")
    return 0


def find(source: Path, system: str) -> tuple[Path, Any]:
    """The file that SOURCE means, and its row of the table where it is a published name.

    Raises:
        ValueError: for a published name of another system.
        FileNotFoundError: if it can't be fetched.
    """
    from genlab.convert.keys import find_source
    from genlab.convert.published import fetch, published

    entry = None if source.exists() else published().get(str(source))
    if entry is None:
        return find_source(source), None
    if entry.system != system:
        raise ValueError(
            f"{source} is a published {entry.system}, not {system}: genlab convert {entry.system} {source}"
        )
    return fetch(entry), entry
