"""The registry: every name leads somewhere, and a wrong one is answered with what there is."""

import dataclasses

import pytest
import torch

from genlab.convert import CONVERTERS
from genlab.generators.base import Generator
from genlab.registry import GENERATORS, SAMPLERS, TOKENIZERS, Registry, model_class
from samplers.base import Sampler, SamplerConfig
from tokenizers_img.base import Tokenizer


def test_lookup_is_lazy_and_remembered():
    table = Registry("thing", {"decoder": "json:JSONDecoder", "none": "no.such.module:thing"})
    assert list(table) == ["decoder", "none"]
    assert "none" in table
    from json import JSONDecoder

    assert table["decoder"] is JSONDecoder
    assert table["decoder"] is JSONDecoder
    with pytest.raises(ModuleNotFoundError):
        table["none"]


def test_a_users_own():
    table = Registry("thing", {"a": "json:loads"})

    @table.register("mine")
    class Mine:
        pass

    assert table["mine"] is Mine
    for name in ("a", "mine"):
        with pytest.raises(ValueError, match=f"thing '{name}' is registered already"):
            table.register(name)(Mine)


def test_wrong_names_are_answered():
    with pytest.raises(ValueError, match=r"unknown sampler 'flwo'; did you mean 'flow'\? Known: flow, ancestral"):
        SAMPLERS["flwo"]
    with pytest.raises(ValueError, match=r"unknown generator 'zzzzz'; Known: xar"):
        GENERATORS["zzzzz"]
    with pytest.raises(ValueError, match=r"unknown model kind 'zzzzz'. Known: kl_vae, .*xar.*pip install -U genlab"):
        model_class("zzzzz")


@pytest.mark.parametrize("kind", [*TOKENIZERS, *GENERATORS])
def test_models(kind):
    cls = model_class(kind)
    assert cls.kind == kind
    assert issubclass(cls, Tokenizer if kind in TOKENIZERS else Generator)
    fields = {f.name: f for f in dataclasses.fields(cls.Config)}
    assert fields["kind"].default == kind
    assert cls.Config.__pydantic_config__ == {"extra": "forbid"}
    if cls is not TOKENIZERS["kl_vae"]:  # its config's defaults are the published model's: large, but no weights here
        return
    with torch.device("meta"):
        assert cls(cls.Config()).spec.describe() == "continuous 16x16 raster, 16 channels"


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers(name):
    cls = SAMPLERS[name]
    assert issubclass(cls, Sampler)
    assert cls.name == name
    assert isinstance(cls.exact, bool)
    assert isinstance(cls().config, SamplerConfig)
    assert cls.__doc__


def test_names_are_used_once():
    kinds = [*TOKENIZERS, *GENERATORS]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("system", list(CONVERTERS))
def test_converters_name_what_is_missing(system):
    with pytest.raises(ValueError, match=r"has no|missing|needs|expected|holds"):
        CONVERTERS[system]({"nothing.weight": torch.zeros(2, 2)})
