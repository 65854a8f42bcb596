"""VAR's tokenizer case."""

from __future__ import annotations

from genlab.convert.msvq import convert_msvq


def vq(config, state, inputs):
    model = convert_msvq(state, scales=tuple(config["patch_nums"]))
    tokens = model.encode(inputs["images"])
    return {
        "ids": tokens.values,
        "decoded": model.decode(tokens),
        "next_scale_input": model.quantiser.next_scale_input(tokens.values),
    }
