"""Measurements kept in a file, so that an interrupted bench goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genlab.config import load_json
from genlab.hub import write_atomic


class Points:
    """Named measurements under one set of settings."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Args: path: the JSON file. settings: what all its points have in common.

        Raises:
            ValueError: if the file holds points of other settings.
        """
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.held: dict[str, dict[str, Any]] = {}
        if path.is_file():
            found = load_json(path)
            if found["settings"] != self.settings:
                differs = sorted(
                    k for k in {*found["settings"], *settings} if found["settings"].get(k) != self.settings.get(k)
                )
                raise ValueError(
                    f"{path} was measured with another {', '.join(differs)}: give another --out, or delete it"
                )
            self.held = found["points"]

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The point from the file, else measured now and written."""
        if key not in self.held:
            self.held[key] = measure()
            write_atomic(self.path, json.dumps({"settings": self.settings, "points": self.held}, indent=1))
        return self.held[key]
