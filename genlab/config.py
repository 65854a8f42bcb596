"""Configs: frozen keyword-only dataclasses that go to and from JSON and refuse what they don't know."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        """Stand in for the type checker's marker (typing has it from Python 3.11 on)."""
        return lambda f: f


T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose JSON form rejects unknown keys.

    However it is made, a `Literal` field takes its own values only: a typo must not run another algorithm.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    cls.__post_init__ = _check_literals  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@cache
def _literals(cls: type) -> dict[str, tuple[Any, ...]]:
    """The values of each field that is one of some, None among them where it may be left out."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(get_origin(part) is Literal or part is type(None) for part in parts):
            found[name] = tuple(v for part in parts for v in get_args(part) or (None,))
    return found


def _check_literals(self: Any) -> None:
    cls: Any = type(self)
    for name, values in _literals(cls).items():
        if (value := getattr(self, name)) not in values:
            raise ValueError(f"{cls.__name__}.{name} must be one of {', '.join(map(str, values))}; got {value!r}")


def to_dict(value: Any) -> dict[str, Any]:
    """A config as plain JSON-ready data."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(value)).dump_python(value, mode="json")


def to_json(value: Any) -> str:
    """A config as indented JSON."""
    return json.dumps(to_dict(value), indent=2) + "\n"


def from_dict(cls: type[T], data: Any, *, where: str = "config") -> T:
    """Build a config from plain data.

    Args:
        cls: the config's class.
        data: what `to_dict` gave.
        where: where the data came from, for the message.

    Raises:
        ValueError: for an unknown key, a missing one or a value of the wrong type, each named.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            key = ".".join(str(x) for x in e["loc"]) or "(top)"
            known = ""
            if e["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = f" (known: {', '.join(f.name for f in dataclasses.fields(cls))})" if len(e["loc"]) == 1 else ""  # type: ignore[arg-type]
            problems.append(f"  {key}: {e['msg']}{known}")
        raise ValueError(f"{where} is not a valid {cls.__name__}:\n" + "\n".join(problems)) from None


def load_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}; write one with `--print-config > {path}`")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
