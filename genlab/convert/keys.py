"""Helpers for reading foreign state dicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch


def read_state(path: Path, *keys: str) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or a torch file, without running any code in it.

    Args:
        path: `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin`, `.th`; or a folder of such, the shards of one model.
        keys: where the weights may lie inside (`model_ema`, `model`, …); the first that is there is taken.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a state dict, or would need code to be run.
    """
    if path.is_dir():
        return read_shards(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}). Fetch it again") from None
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} can't be read as plain weights ({type(error).__name__}); it holds other objects, or is damaged. "
            "genlab runs no code out of a checkpoint"
        ) from error
    for key in keys:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
            break
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ValueError(f"{path} holds no state dict (looked under {', '.join(keys) or 'the top'})")
    return data


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder, as transformers and peft write them; safetensors where both are there.

    Raises:
        FileNotFoundError: if it holds none.
    """
    for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin"):
        if shards := sorted(folder.glob(pattern)):
            state: dict[str, torch.Tensor] = {}
            for shard in shards:
                state |= read_state(shard)
            return state
    raise FileNotFoundError(f"no weights in {folder}: expected *.safetensors, pytorch_model*.bin or adapter_model.bin")


def find_source(source: Path) -> Path:
    """The file itself, or the model.safetensors (and its config beside it) of a Hub id `owner/name`.

    Raises:
        FileNotFoundError: if the Hub doesn't give one.
    """
    if source.exists() or source.suffix or source.is_absolute() or len(source.parts) != 2 or source.parts[0] == "..":
        return source
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(source.as_posix(), allow_patterns=["model.safetensors", "config.json", "config.yaml"])
        )
    except Exception as error:
        raise FileNotFoundError(
            f"no file {source}, and the Hub gave none by that name ({type(error).__name__}): name a local file, or "
            "accept the model's terms on the Hub and log in with `hf auth login`"
        ) from error
    return folder / "model.safetensors"


def count(state: dict[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches at the start of a key: how many blocks."""
    found = [int(m[1]) for k in state if (m := re.match(pattern, k))]
    return 1 + max(found, default=-1)


def need(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor by name.

    Raises:
        ValueError: if it is missing.
    """
    if name not in state:
        raise ValueError(f"the checkpoint has no {name!r}: another system's? It holds {', '.join(list(state)[:5])}, …")
    return state[name]
