"""ELM's tokenizer case."""

from __future__ import annotations

import torch

from genlab.convert.bae import convert_bae


def bae(config, state, inputs):
    model = convert_bae(state, image_size=config["img_size"], deterministic=True)
    bits = model.draw(model.probabilities(inputs["images"]), None)
    assert torch.equal(model.to_bits(model.to_ids(bits)), bits)
    return {"codes": bits, "decoded": model.synthesise(bits)}
