"""LlamaGen's tokenizer case."""

from __future__ import annotations

from genlab.convert.vq import convert_vq


def vq(config, state, inputs):
    model = convert_vq(state, image_size=inputs["images"].shape[-1])
    z = model.analyse(inputs["images"])
    ids, code = model.quantise(z)
    return {"pre_quant": z, "ids": ids.flatten(1), "decoded": model.synthesise(code)}
