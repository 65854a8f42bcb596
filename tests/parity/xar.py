"""xAR's cases: the block-causal forward, and the whole Euler-Maruyama sampler."""

from __future__ import annotations

import torch

from genlab.convert.xar import convert_xar
from genlab.generators.base import Guidance
from genlab.noise import Noise
from samplers.flow import FlowConfig, FlowSampler


def velocity(config, state, inputs):
    model = convert_xar(state, heads=config["num_heads"])
    t = inputs["t"].expand(len(inputs["labels"]), -1)
    return {"velocity": model.velocity(inputs["x"], inputs["labels"], t)}


class RecordedNoise(Noise):
    """Gives the recorded tensors in place of counter-based noise."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def normal(self, *shape: int) -> torch.Tensor:
        position = torch.atleast_2d(self.position)[0]
        if self.purpose == "start":
            return self.start[self.cells[tuple(position.tolist())]].double()
        steps, parts = torch.as_tensor(self.step).expand_as(position), []
        for step in steps.unique_consecutive().tolist():
            recorded = self.steps[self.cells[tuple(position[steps == step].tolist())]]
            # the last step has no noise, and none is recorded
            parts.append(recorded[step] if step < len(recorded) else torch.zeros_like(recorded[0]))
        return torch.cat(parts, 1).double()


def sample(config, state, inputs):
    model = convert_xar(state, heads=config["num_heads"])

    class Recorded(RecordedNoise):
        start, steps = inputs["start_noise"], inputs["step_noise"]
        cells = {tuple(model.where(g).tolist()): g for g in range(model.n_groups)}

    sampler = FlowSampler(FlowConfig(steps=config["num_steps"], guidance=Guidance(scale=config["cfg"])))
    tokens, _ = sampler.draw(model, inputs["labels"], Recorded(torch.zeros(len(inputs["labels"]))))
    h, w = model.config.grid
    return {"latents": tokens.values.unflatten(1, (h, w)).permute(0, 3, 1, 2)}
