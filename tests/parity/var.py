"""VAR's transformer, teacher-forced."""

from __future__ import annotations

from genlab.convert.var import convert_var


def logits(config, state, inputs):
    model = convert_var(state, heads=config["num_heads"], scales=tuple(config["patch_nums"]))
    return {"logits": model.logits(inputs["labels"], inputs["x"])}
