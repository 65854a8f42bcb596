"""What several commands need: parsing options, the top floor's packages, ranges of seeds, manifests."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import genlab
from genlab.config import from_dict, load_json, to_dict

T = TypeVar("T")

OUTPUTS = ("out", "grid", "html", "json", "page")
"""Options that name what a command writes."""


def parse(cls: type[T], argv: list[str], *, prog: str, default: T | None = None) -> T:
    """Options into a config; `--config FILE.json` starts from a file, `--print-config` prints and stops.

    Raises:
        SystemExit: 2 for unknown options (tyro explains), 0 after `--help` and `--print-config`.
        ValueError: for a place to write to (`OUTPUTS`) that can't be one.
    """
    import tyro

    argv = list(argv)
    show = "--print-config" in argv
    if show:
        argv.remove("--print-config")
    if file := take(argv, "--config"):
        data = load_json(file)
        if isinstance(data, dict) and "command_config" in data:  # a manifest holds the config it came from
            data = data["command_config"]
        default = from_dict(cls, data, where=file)
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    about = inspect.cleandoc(cls.__doc__ or "")
    value = tyro.cli(cls, args=argv, prog=prog, description=about, config=(tyro.conf.AvoidSubcommands,), **kwargs)
    if show:
        print(json.dumps(to_dict(value), indent=2))
        raise SystemExit(0)
    for name in OUTPUTS:
        if isinstance(path := getattr(value, name, None), Path):
            require_writable(path, f"--{name}")
    return value


def require_writable(path: Path, option: str) -> None:
    """Refuse what can't be written to before work is done for it; a name that ends like a file's is one.

    Raises:
        ValueError: for a folder in a file's place, a file in a folder's or in the way to it, or a read-only folder.
    """
    path = path.expanduser().absolute()
    is_file = option == "--grid" or path.suffix in (".html", ".json", ".md", ".npz")
    if path.is_dir() if is_file else path.is_file():
        wrong, right = ("folder", "file") if is_file else ("file", "folder")
        raise ValueError(f"{path} is a {wrong}; expected the name of a {right} to make: choose another {option}")
    there = path if path.is_dir() else next(folder for folder in path.parents if folder.exists())
    if not there.is_dir():
        raise ValueError(f"can't write to {path}: {there} is a file; choose another {option}")
    if not os.access(there, os.W_OK):
        raise ValueError(f"can't write to {path}: {there} is read-only; choose another {option}")


def load(module: str) -> Any:
    """Import a module of the top floor (`train.loop`, `eval.harness`), though a user's own `train.py` shadow its name.

    A module of the user's that is loaded already stays alive in the code that imported it; the name is ours now.
    """
    top, root = module.split(".")[0], str(Path(genlab.__file__).parents[1])
    home = getattr(sys.modules.get(top), "__path__", None)
    if home is not None and str(Path(next(iter(home))).parent) == root:
        return importlib.import_module(module)
    for name in [k for k in sys.modules if k == top or k.startswith(f"{top}.")]:
        del sys.modules[name]
    sys.path.insert(0, root)
    try:
        importlib.import_module(top)
    finally:
        sys.path.remove(root)
    return importlib.import_module(module)


def take(argv: list[str], name: str, default: str = "") -> str:
    """Remove `name VALUE`, or `name=VALUE`, from the words and return VALUE.

    Raises:
        ValueError: if the value is missing.
    """
    at = next((i for i, word in enumerate(argv) if word.partition("=")[0] == name), None)
    if at is None:
        return default
    _, joined, value = argv.pop(at).partition("=")
    if not joined and at < len(argv):
        value = argv.pop(at)
    elif not value:
        raise ValueError(f"{name} needs a value")
    return value


def numbers(text: str) -> list[int]:
    """Whole numbers out of `0-15`, `3`, `1,5,9-11`.

    Raises:
        ValueError: for anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            span = range(int(low), int(high if dash else low) + 1)
        except ValueError:
            raise ValueError(f"can't read {text!r} as numbers; expected e.g. 0-15 or 1,5,9-11") from None
        if not span or span[-1] >= 2**63:
            raise ValueError(f"{part.strip()!r} names no number that fits; expected e.g. 0-15")
        found += span
    return found


def git_revision() -> str | None:
    """The checkout's revision, `+` where it has uncommitted changes; None outside a checkout."""
    root = Path(genlab.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = lambda *a: subprocess.run(["git", "-C", str(root), *a], capture_output=True, text=True, check=True).stdout  # noqa: E731
        return run("rev-parse", "HEAD").strip() + ("+" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"genlab": genlab.__version__, "python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "diffusers", "timm", "torch-fidelity"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def torch_device(name: str) -> Any:
    """A torch device; "auto" takes a GPU where there is one.

    Raises:
        ValueError: for a device that isn't there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"no device {name!r} here ({why}); try --device cpu") from None


def require_positive(c: Any, *names: str) -> None:
    """Refuse numbers of a config below 1.

    Raises:
        ValueError: naming the option.
    """
    for name in names:
        if (value := getattr(c, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def require_grid(path: Path, model: str, clips: bool) -> None:
    """Refuse a name for a grid that doesn't end as what is written there.

    Raises:
        ValueError: for pictures that aren't .png, or clips that aren't .webp, .gif or .mp4.
    """
    fit = (".webp", ".gif", ".mp4") if clips else (".png",)
    if path.suffix.lower() not in fit:
        what, others = ("clips", f" (or {', '.join(fit[1:])})") if clips else ("pictures", "")
        raise ValueError(f"{model} makes {what}: give --grid {path.with_suffix(fit[0])}{others}")
