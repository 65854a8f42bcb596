"""The published checkpoints that genlab converts: the table `published.json`, and fetching one by its name."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from genlab.config import config, from_dict

TABLE = Path(__file__).with_name("published.json")


@config
class Published:
    """One checkpoint."""

    name: str
    """What `genlab convert SYSTEM NAME DEST` calls it."""
    system: str
    """Whose layout it has: the converter."""
    source: str
    """`hf:owner/repository/file`, without a file all of them; or words that say where it lies."""
    licence: str
    """Of the weights, as far as it is stated."""
    paper: str
    """Where its figures come from."""
    millions: float
    """Parameters."""
    figures: str = ""
    """What its authors report, on ImageNet at 256x256 where nothing else is said."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the converter, where no shape tells."""
    text_encoder: str = ""
    """By text: who read the captions."""
    vae: str = ""
    """The checkpoint whose codebook it reads."""


def published() -> dict[str, Published]:
    """Every checkpoint by name, in the table's order."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [
        row | {"licence": table["licences"][row["system"]], "paper": table["papers"][row["system"]]}
        for row in table["checkpoints"]
    ]
    return {row["name"]: from_dict(Published, row, where=f"{TABLE.name}, {row['name']}") for row in rows}


def licence_of(system: str) -> str:
    """What is known of the licence of a system's published weights."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["licences"].get(system, "that of the original")


def fetch(entry: Published) -> Path:
    """The checkpoint's file, or the folder of its files, from the Hub's cache or the Hub.

    Raises:
        FileNotFoundError: if it doesn't lie on the Hub, or the Hub doesn't give it.
    """
    if not entry.source.startswith("hf:"):
        raise FileNotFoundError(f"{entry.name} is {entry.source}: fetch it by hand, and name the file instead")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    owner, repository, file = entry.source.removeprefix("hf:").split("/", 2)
    try:
        if not file:
            return Path(snapshot_download(f"{owner}/{repository}"))
        if entry.system.startswith("flex"):  # what no shape tells stands in its config, where there is one
            with suppress(EntryNotFoundError):
                hf_hub_download(f"{owner}/{repository}", f"config.{'yaml' if entry.system == 'flexar' else 'json'}")
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # no connection, no such file, terms to accept: each has its own type
        raise FileNotFoundError(
            f"the Hub gave no {entry.source} ({type(error).__name__}): fetch {file or 'all of it'} by other means and "
            "name the file, or accept the model's terms on the Hub and log in with `hf auth login`"
        ) from error
