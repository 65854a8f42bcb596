"""Every discrete generator's preset names a tokenizer preset that makes its tokens."""

import pytest
import torch

from genlab.registry import GENERATORS, model_class
from genlab.tokens import require_fit
from train.presets import PRESETS


def spec_of(name):
    config = PRESETS[name]().model
    with torch.device("meta"):
        return model_class(config.kind)(config).spec


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("llamagen", "elm", "var"))])
def test_tokenizer_fits(name):
    config = PRESETS[name]()
    assert config.model.kind in GENERATORS
    require_fit(config.tokenizer, spec_of(config.tokenizer), name, spec_of(name))
