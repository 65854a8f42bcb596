"""Training state on disk: whole or not at all, hashed, without pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from genlab.hub import replace_folder, sha256

TENSORS = "state.safetensors"
MANIFEST = "state.json"


def _flatten(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of nested dicts and lists into `tensors`; what is left is JSON."""
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach().cpu().contiguous()
        return {"__tensor__": prefix}
    if isinstance(tree, dict):
        return {str(k): _flatten(v, f"{prefix}/{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_flatten(v, f"{prefix}/{i}", tensors) for i, v in enumerate(tree)]
    return tree


def _unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict):
        if "__tensor__" in tree:
            return tensors[tree["__tensor__"]]
        return {k: _unflatten(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_unflatten(v, tensors) for v in tree]
    return tree


def write(folder: Path, images_seen: int, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `folder/{images_seen:09d}` and drop all but the newest `keep`."""
    from safetensors.torch import save_file

    target = folder / f"{images_seen:09d}"
    tensors: dict[str, torch.Tensor] = {}
    rest = _flatten(state, "", tensors)
    with replace_folder(target) as temporary:
        # save_file refuses tensors that share memory (tied weights): give each its own
        save_file({k: v.clone() for k, v in tensors.items()}, temporary / TENSORS)
        manifest = {
            "format": 1,
            "images_seen": images_seen,
            "sha256": sha256(temporary / TENSORS),
            "state": rest,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest))
    for old in candidates(folder)[keep:]:
        shutil.rmtree(old)
    return target


def candidates(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; unfinished ones have other names and are not listed."""
    return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True)


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """Images seen and state of one checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != 1:
            raise ValueError(f"checkpoint {path} has format {manifest['format']}, this genlab reads 1")
        if sha256(path / TENSORS) != manifest["sha256"]:
            raise ValueError(f"checkpoint {path} is damaged: its hash is not the one noted when it was written")
        return manifest["images_seen"], _unflatten(manifest["state"], load_file(path / TENSORS))
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from None


def newest(folder: Path) -> tuple[int, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint, and complaints about newer damaged ones; None if there is none at all.

    Raises:
        ValueError: if there are checkpoints and every one is damaged.
    """
    complaints: list[str] = []
    found = candidates(folder)
    for path in found:
        try:
            images_seen, state = read(path)
            return images_seen, state, complaints
        except ValueError as error:
            complaints.append(str(error))
    if found:
        raise ValueError("no whole checkpoint is left: " + "; ".join(complaints) + ". Start afresh with --resume never")
    return None
