"""ELM's transformer with k sub-token heads, teacher-forced."""

from __future__ import annotations

import math

from genlab.convert.elm import convert_elm


def logits(config, state, inputs):
    side = math.isqrt(config["block_size"])
    model = convert_elm(state, heads=config["n_head"], grid=(side, side))
    tokens = inputs["tokens"].view(*inputs["tokens"].shape[:2], model.K)
    return {"logits": model.logits(tokens, inputs["labels"]).flatten(1, 2)}
