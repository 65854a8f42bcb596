"""Training state on disk: whole or not at all, hashed file by file, without pickle.

A checkpoint is a folder: `state.json` (the tree: numbers, and names of tensors), the tensors as safetensors, and
`SHA256SUMS` over both (`sha256sum -c SHA256SUMS` checks it by hand). One process, and data-parallel ones, write the
tensors to one file; sharded ones each write their part through torch.distributed.checkpoint, and any number of
processes reads either form.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from genlab.hub import replace_folder, sha256
from genlab.processes import agree, gather, processes

TENSORS = "state.safetensors"
MANIFEST = "state.json"
SUMS = "SHA256SUMS"
FORMAT = 2
"""Of `state.json`; format 1 had the tensors' hash in it and no SHA256SUMS, and is still read."""


def _flatten(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of nested dicts and lists into `tensors`; what is left is JSON."""
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach()
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


def _names(tree: Any) -> Iterator[str]:
    """The tensors that a tree names."""
    if isinstance(tree, dict) and "__tensor__" in tree:
        yield tree["__tensor__"]
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _names(part)


def _is_sharded(tensors: dict[str, torch.Tensor]) -> bool:
    if processes()[1] == 1:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors.values())


def write(folder: Path, images_seen: int, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `folder/{images_seen:09d}` and drop all but the newest `keep`.

    Where the state is sharded, every process calls this, and each writes its part; otherwise only one may. Leftovers
    of a write that was killed are removed, so the caller must hold the run's lock.

    Raises:
        OSError: if it can't be written (the disk is full, say); what was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder / f"{images_seen:09d}"
    tensors: dict[str, torch.Tensor] = {}
    manifest = {"format": FORMAT, "images_seen": images_seen, "state": _flatten(state, "", tensors)}
    sharded = _is_sharded(tensors)
    main = not sharded or processes()[0] == 0
    if main:
        for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old.*")):
            shutil.rmtree(left, ignore_errors=True)
    with replace_folder(target) if main else nullcontext() as temporary:
        if sharded:
            sums = _write_shards(temporary, tensors)
        else:
            assert temporary is not None
            try:
                # save_file refuses tensors that share memory (tied weights): give each its own
                save_file({k: v.cpu().contiguous().clone() for k, v in tensors.items()}, temporary / TENSORS)
            except SafetensorError as error:
                raise OSError(f"{target} could not be written: {error}") from None
            sums = {TENSORS: sha256(temporary / TENSORS)}
        if temporary is not None:
            (temporary / MANIFEST).write_text(json.dumps(manifest))
            sums[MANIFEST] = sha256(temporary / MANIFEST)
            (temporary / SUMS).write_text(_sums_text(sums))
    if main:
        for old in candidates(folder)[keep:]:
            gone = old.rename(folder / f".{old.name}.old.tmp")  # killed here, no half of it bears its name
            shutil.rmtree(gone)
    return target


def _sums_text(sums: dict[str, str]) -> str:
    """What `sha256sum` would print."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _write_shards(temporary: Path | None, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Each process writes its part into the first one's folder; the hashes of all files."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    place = Path(agree(lambda: str(temporary)))
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True))
    except CheckpointException as error:
        raise OSError(f"{place} could not be written: {_reasons(error)}") from None
    mine = {p.name: sha256(p) for p in place.glob(f"shard-{processes()[0] + 1:05d}-*.safetensors")}
    return {name: digest for part in gather(mine) for name, digest in part.items()}


def _reasons(error: Any) -> str:
    """What went wrong, of torch's exception for a group of processes."""
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())


def candidates(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; unfinished ones have other names and are not listed."""
    return sorted((p for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written.

    Raises:
        ValueError: if it is damaged, or of a later format.
    """
    try:
        if (path / SUMS).exists():
            text = (path / SUMS).read_text()
            parts = [line.partition("  ") for line in text.split("\n")[:-1]]
            sums = {name: digest for digest, _, name in parts}
            if text != _sums_text(sums):
                raise ValueError(f"checkpoint {path} is damaged: its {SUMS} is not as it was written")
        else:
            sums = {MANIFEST: sha256(path / MANIFEST), TENSORS: json.loads((path / MANIFEST).read_text())["sha256"]}
        there = {p.name for p in path.iterdir()} - {SUMS}
        if MANIFEST not in sums or there != set(sums):
            odd = ", ".join(sorted(there ^ {MANIFEST, *sums}))
            raise ValueError(f"checkpoint {path} is damaged: it has not the files that were written ({odd})")
        for name, digest in sums.items():
            if sha256(path / name) != digest:
                raise ValueError(
                    f"checkpoint {path} is damaged: the hash of {name} is not the one noted when it was written"
                )
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] not in (1, FORMAT):
            raise ValueError(
                f"checkpoint {path} has format {manifest['format']}, this genlab reads {FORMAT}: "
                "`pip install -U genlab`"
            )
        return manifest
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from None


def read(path: Path, like: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Images seen and state of one checkpoint.

    Args:
        path: its folder.
        like: a state of the same form whose sharded tensors take their part in place (every process calls this);
            what it lacks, and all without it, comes whole.

    Raises:
        ValueError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = agree(lambda: verify(path)) if like is not None else verify(path)
    places: dict[str, torch.Tensor] = {}
    _flatten(like or {}, "", places)
    try:
        if (path / TENSORS).exists() and not _is_sharded(places):
            tensors = load_file(path / TENSORS)
        else:
            tensors = _read_shards(path, set(_names(manifest["state"])), places)
        return manifest["images_seen"], _unflatten(manifest["state"], tensors)
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from None


def _read_shards(path: Path, names: set[str], places: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(path))
    there: Any = reader.read_metadata().state_dict_metadata
    tensors = {
        name: places[name] if name in places else torch.empty(there[name].size, dtype=there[name].properties.dtype)
        for name in sorted(names)
    }
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not _is_sharded(places))
    except CheckpointException as error:
        raise ValueError(f"checkpoint {path} can't be read: {_reasons(error)}") from None
    return tensors


def newest(folder: Path, like: dict[str, Any] | None = None) -> tuple[int, dict[str, Any], list[str]] | None:
    """The newest whole checkpoint, and complaints about newer damaged ones; None if there is none at all.

    Args:
        folder: the run's checkpoints.
        like: as in `read`.

    Raises:
        ValueError: if there are checkpoints and every one is damaged.
    """
    complaints: list[str] = []
    found = candidates(folder)
    for path in found:
        try:
            images_seen, state = read(path, like)
            return images_seen, state, complaints
        except ValueError as error:
            complaints.append(str(error))
    if found:
        raise ValueError("no whole checkpoint is left: " + "; ".join(complaints) + ". Start afresh with --resume never")
    return None
