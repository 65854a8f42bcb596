"""Configs: to JSON and back, and a refusal of what they don't know."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from genlab.config import config, from_dict, load_json, to_dict, to_json


@config
class Circle:
    """One of two shapes."""

    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@config
class Square:
    """The other."""

    kind: Literal["square"] = "square"
    sides: tuple[int, ...] = (2, 3)


@config
class Drawing:
    """A config with all that configs hold."""

    name: str
    shape: Circle | Square = Circle()
    method: Literal["pen", "brush"] | None = None
    out: Path | None = None
    scale: float = 1.0
    frame: bool = False


FULL = Drawing(name="ü", shape=Square(sides=(4,)), method="pen", out=Path("a/b"), scale=1e-7, frame=True)


@pytest.mark.parametrize("value", [FULL, Drawing(name="")])
def test_round_trip(value):
    assert from_dict(Drawing, json.loads(to_json(value))) == value
    assert from_dict(Drawing, to_dict(value)) == value
    assert to_json(value).endswith("}\n")


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.name = "other"
    with pytest.raises(TypeError):
        Drawing("name")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nmae": 1}, r"  nmae: .*\(known: name, shape, method, out, scale, frame\)"),
        ({"name": None}, "  name: .*string"),
        ({"scale": "wide"}, "  scale: .*number"),
        ({"method": "pencil"}, r"  method(\.\S*)?: .*'pen' or 'brush'"),
        ({"frame": "perhaps"}, "  frame: .*boolean"),
        ({"shape": {"kind": "square", "radius": 2}}, r"  shape\.Square\.radius: "),
        ({"shape": {"kind": "triangle"}}, r"  shape\.Circle\.kind: .*'circle'"),
        ({"shape": {"kind": "square", "sides": [2, "x"]}}, r"  shape\.Square\.sides\.1: .*integer"),
    ],
)
def test_problems_are_named(change, problem):
    with pytest.raises(ValueError, match=rf"run.json is not a valid Drawing:\n(.*\n)*{problem}"):
        from_dict(Drawing, {**to_dict(FULL), **change}, where="run.json")


def test_all_problems_at_once_and_missing_ones():
    with pytest.raises(ValueError, match=r"(?s)name: .*required.*scale: .*colour: ") as error:
        from_dict(Drawing, {"scale": "x", "colour": 3})
    assert str(error.value).startswith("config is not a valid Drawing:")
    with pytest.raises(ValueError, match=r"\(top\): "):
        from_dict(Drawing, [1, 2])


def test_load_json(tmp_path):
    (tmp_path / "good.json").write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert load_json(tmp_path / "good.json") == {"a": [1, "ü"]}
    with pytest.raises(FileNotFoundError, match=r"no config file at .*none.json; write one with `--print-config"):
        load_json(tmp_path / "none.json")
    for bad in (b"", b"{", b"\xff\xfe", b"{'a': 1}"):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
            load_json(tmp_path / "bad.json")


def test_a_choice_is_one_of_its_own_also_from_python():
    with pytest.raises(ValueError, match=r"Drawing\.method must be one of pen, brush"):
        dataclasses.replace(FULL, method="pencil")
    from genlab.generators.base import Guidance

    with pytest.raises(ValueError, match=r"Guidance\.schedule must be one of constant, linear, .*; got 'linaer'"):
        Guidance(schedule="linaer")
