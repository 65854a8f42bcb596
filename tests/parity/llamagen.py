"""LlamaGen's transformer, teacher-forced."""

from __future__ import annotations

import math

from genlab.convert.llamagen import convert_llamagen


def logits(config, state, inputs):
    side = math.isqrt(config["block_size"])
    model = convert_llamagen(state, heads=config["n_head"], grid=(side, side))
    return {"logits": model.logits(inputs["tokens"][..., None], inputs["labels"])[:, :, 0]}
