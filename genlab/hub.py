"""Checkpoints: a folder with `model.safetensors`, `config.json` and a model card, local or on the Hub.

`config.json` holds `format`, `kind` (looked up in our registry, never a class path), the model's config, what
it goes with (a generator's tokenizer, its classes) and the weights' SHA-256. Nothing is ever unpickled.
A part that another checkpoint holds already (the frozen autoencoder under a tokenizer) may be `borrowed` from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

import genlab
from genlab.config import from_dict, load_json, to_dict
from genlab.registry import model_class

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SCALE = ".int8_scale"
M = TypeVar("M", bound="Model")


class Model(nn.Module):
    """A network with a config, saved and loaded as a checkpoint folder."""

    kind: ClassVar[str]
    Config: ClassVar[type]
    config: Any
    extra: dict[str, Any]
    """What the checkpoint says beside the config: `tokenizer`, `classes`, `trained`."""

    def __init__(self, config: Any) -> None:
        """Args: config: an instance of this class's `Config`."""
        super().__init__()
        self.config = config
        self.extra = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: str = "",
        dtype: torch.dtype | None = None,
        borrow: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a checkpoint folder, whole or not at all.

        Args:
            folder: where; an existing checkpoint there is replaced.
            card: the model card, Markdown.
            dtype: store floating-point weights in this type: bf16 halves the file; int8 quarters it (kernels and
                matrices rounded a output channel, the rest in bf16), and loading gives floats again.
            borrow: parts that are not written, by the first part of their weights' names, each with the MODEL that
                loading takes it from: one that will be at hand, e.g. a shipped one.

        Raises:
            ValueError: if `folder` is there and holds anything but a checkpoint of ours, which would be lost; or if a
                part isn't what the MODEL holds.
        """
        return save_pretrained(self, folder, card=card, dtype=dtype, borrow=borrow)

    @classmethod
    def from_pretrained(cls: type[M], name: str | Path, **options: Any) -> M:
        """`genlab.hub.from_pretrained`, refusing a checkpoint of another kind."""
        model = from_pretrained(name, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{name} holds a {model.kind!r} ({type(model).__name__}), expected {cls.__name__}")
        return model


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without an error."""
    folder = folder.resolve()  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        sync(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
            folder.rename(old)
            try:
                temporary.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk: a power cut after this loses nothing of it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_to_replace(folder: Path) -> None:
    """Raise ValueError where writing a checkpoint to `folder` would delete something else."""
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder} is a file; expected the name of a folder to write a checkpoint to")
        return
    names = {p.name for p in folder.iterdir()}
    others = names - {WEIGHTS, CONFIG, CARD}
    if names and not others:
        try:
            read_description(folder)
        except (ValueError, FileNotFoundError):
            others = names
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(others)[:5])}, which are no part of a genlab checkpoint and would be "
            "deleted: choose another folder, or move them away"
        )


def _lent(weights: dict[str, torch.Tensor], lender: str, part: str, kind: str) -> dict[str, torch.Tensor]:
    """What another checkpoint lends to one of a kind: its part of this name if it is of that kind, else all of it."""
    if read_description(locate(lender))["kind"] == kind:
        return {k: v for k, v in weights.items() if k.startswith(f"{part}.")}
    return {f"{part}.{k}": v for k, v in weights.items()}


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A weights file as floats. Raises: ValueError: if it isn't whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dequantise(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Fetch it again") from None


def save_pretrained(
    model: Model,
    folder: str | Path,
    *,
    card: str = "",
    dtype: torch.dtype | None = None,
    borrow: Mapping[str, str] | None = None,
) -> Path:
    """See `Model.save_pretrained`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    _refuse_to_replace(folder)
    state: dict[str, torch.Tensor] = {}
    own, borrowed = model.state_dict(), {}
    for part, source in (borrow or {}).items():
        theirs = _lent(_read_weights(locate(source) / WEIGHTS), source, part, model.kind)
        there = {name: own.pop(name) for name in list(own) if name.startswith(f"{part}.")}
        if there.keys() != theirs.keys() or not all(torch.equal(v.cpu(), theirs[k].to(v)) for k, v in there.items()):
            raise ValueError(
                f"`{part}` of this {model.kind} is not what {source} holds: it can't be borrowed from there"
            )
        borrowed[part] = {"from": source, "sha256": sha256(locate(source) / WEIGHTS)}
    for name, value in own.items():
        value = value.detach().cpu()
        if dtype == torch.int8 and value.is_floating_point() and value.ndim >= 2:
            scale = value.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
            state[name + SCALE] = scale.float()
            value = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8)
        elif dtype is not None and value.is_floating_point():
            value = value.to(torch.bfloat16 if dtype == torch.int8 else dtype)
        state[name] = value.contiguous()
    with replace_folder(folder) as temporary:
        try:
            save_file(state, temporary / WEIGHTS, metadata={"format": "pt", "kind": model.kind})
        except SafetensorError as error:  # its word for a full disk
            raise OSError(f"{folder} could not be written: {error}") from None
        description = {
            "format": FORMAT,
            "kind": model.kind,
            "genlab": genlab.__version__,
            "config": to_dict(model.config),
            **model.extra,
            **({"borrowed": borrowed} if borrowed else {}),
            "sha256": sha256(temporary / WEIGHTS),
        }
        (temporary / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        (temporary / CARD).write_text(card or f"# {folder.name}\n\nA genlab `{model.kind}` checkpoint.\n")
    return folder


def shipped() -> dict[str, Path]:
    """The checkpoints that ship: name -> folder. Inside the package, and in `genlab_zoo`: a wheel of its own, or the
    zoo/ of a checkout.
    """
    import importlib.util

    package = Path(genlab.__file__).parent
    roots = [package / "weights", package.parent / "zoo" / "genlab_zoo"]
    if (zoo := importlib.util.find_spec("genlab_zoo")) is not None:
        roots += [Path(p) for p in zoo.submodule_search_locations or ()]
    return {p.parent.name: p.parent for root in reversed(roots) for p in sorted(root.glob(f"*/{CONFIG}"))}


def locate(name: str | Path) -> Path:
    """Find a checkpoint folder: a shipped name, a local folder, or a Hub id (`owner/name`).

    Raises:
        FileNotFoundError: saying what was looked for and where.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if folder.is_dir():
        runs = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds {', '.join(runs)}" if runs else ""
        raise FileNotFoundError(f"{folder} is a folder without {CONFIG}: not a genlab checkpoint{hint}. "
                                "Convert a published one with `genlab convert`")  # fmt: skip
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file; expected a checkpoint's folder. A published one becomes such a "
                                "folder by `genlab convert SYSTEM SOURCE DEST`")  # fmt: skip
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG, CARD]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"no local checkpoint {str(name)!r}, and the Hub did not give one ({type(error).__name__}). "
                f"Shipped: {', '.join(known) or 'none'}. See `genlab list`"
            ) from error
    raise FileNotFoundError(f"no checkpoint {str(name)!r}. Shipped: {', '.join(known) or 'none'}. See `genlab list`")


def read_description(folder: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`, its format checked.

    Raises:
        ValueError: if it isn't one of ours, or of a later format.
    """
    description = load_json(folder / CONFIG)
    borrowed = description.get("borrowed", {}) if isinstance(description, dict) else None
    if not (
        isinstance(description, dict)
        and isinstance(description.get("kind"), str)
        and "config" in description
        and isinstance(description.get("sha256", ""), str)
        and isinstance(borrowed, dict)
        and all(isinstance(b, dict) and {"from", "sha256"} <= b.keys() for b in borrowed.values())
    ):
        raise ValueError(
            f"{folder / CONFIG} is not a genlab config (`kind`, `config`, …): a foreign checkpoint? "
            "`genlab convert SYSTEM SOURCE DEST` reads published ones"
        )
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {description.get('format')!r}, this genlab "
            f"({genlab.__version__}) reads {FORMAT}: `pip install -U genlab`"
        )
    return description


def from_pretrained(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Any:
    """Load a checkpoint.

    Args:
        name: a shipped name, a folder or a Hub id.
        device: where the model goes.
        dtype: floating-point type of its weights in memory.
        verify: check the weights' SHA-256.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or it lacks its weights.
        ValueError: if it is damaged, foreign, of a later format, or doesn't fit its config.
    """
    folder = locate(name)
    description = read_description(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: an unfinished copy? Fetch or train it again")
    if verify and (expected := description.get("sha256")) and (found := sha256(weights)) != expected:
        raise ValueError(f"{weights} is damaged: SHA-256 {found[:12]}…, {CONFIG} says {expected[:12]}…. Fetch it again")
    cls = model_class(description["kind"])
    model = cls(from_dict(cls.Config, description["config"], where=str(folder / CONFIG)))
    known = {"format", "kind", "genlab", "config", "sha256", "borrowed"}
    model.extra = {k: v for k, v in description.items() if k not in known} | {"name": folder.name}
    state, read, digests = _read_weights(weights), functools.cache(_read_weights), functools.cache(sha256)
    for part, source in description.get("borrowed", {}).items():
        lender, expected = source["from"], source["sha256"]
        try:
            path = locate(lender) / WEIGHTS  # several parts may come from one: it is read once
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} borrows its `{part}` from {lender}, which isn't here: {error}") from None
        if verify and (digest := digests(path)) != expected:
            raise ValueError(
                f"{folder} borrows its `{part}` from {lender}, whose weights are others than when it was made "
                f"(SHA-256 {digest[:12]}…, {CONFIG} says {expected[:12]}…): take both from one release, or "
                "fetch it again"
            )
        state |= _lent(read(path), lender, part, description["kind"])
    load_strict(model, state, where=str(weights))
    return model.to(device=device, dtype=dtype).eval()


def dequantise(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Int8 weights and their scales as floats; what isn't quantised stays as it is.

    Raises:
        ValueError: for int8 weights without a scale.
    """
    scales = {k.removesuffix(SCALE): v for k, v in state.items() if k.endswith(SCALE)}
    if bare := [k for k, v in state.items() if v.dtype == torch.int8 and k not in scales]:
        raise ValueError(f"int8 weights without their scale: {', '.join(bare[:5])}. Fetch the checkpoint again")
    return {
        k: v.float() * scales[k].view(-1, *[1] * (v.ndim - 1)) if k in scales else v
        for k, v in state.items()
        if not k.endswith(SCALE)
    }


def load_strict(model: nn.Module, state: dict[str, torch.Tensor], *, where: str) -> None:
    """Load a state dict, every key accounted for.

    Raises:
        ValueError: naming the missing, unexpected or misshapen keys.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape and not state[k].numel() == v.numel() == 1
    ]
    problems = [
        f"{label}: {', '.join(keys[:5])}{f' … ({len(keys)} in all)' if len(keys) > 5 else ''}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise ValueError(f"{where} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state)
