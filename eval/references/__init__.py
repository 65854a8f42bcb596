"""Reference statistics that come with the package.

`emoji-train.npz`: genlab stats emoji:train --out eval/references/emoji-train.npz --compact
"""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> str:
    """File of a packaged reference.

    Raises:
        ValueError: for a name there is not.
    """
    file = Path(__file__).parent / f"{name}.npz"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.npz")))
        raise ValueError(f"no packaged reference {name!r}. Known: {known}")
    return str(file)
