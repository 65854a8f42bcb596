"""MAR's cases: the masked encoder-decoder, and the diffusion head."""

from __future__ import annotations

import torch

from genlab.convert.mar import convert_mar
from genlab.nn.diffusion_head import DiffusionChain, process


def backbone(config, state, inputs):
    model = convert_mar(state, heads=config["num_heads"])
    # known positions first; rows may hide different numbers
    known = (inputs["mask"] == 0).long()
    count = known.sum(1).tolist()
    order = known.argsort(dim=1, descending=True, stable=True)[:, : max(count)]
    return {"z": model.fill(inputs["tokens"], model.buffer(inputs["labels"]), order, count)}


def diffusion_head(config, state, inputs):
    head = convert_mar(state, heads=config["num_heads"]).head
    x, z = inputs["x_t"], head.cond_embed(inputs["z"])
    raw = torch.cat(head(x, inputs["t"], z), -1)
    # one step of the chain, each row at a step of its own; its official number counts from the end
    steps = int(config["num_sampling_steps"])
    chain = DiffusionChain(head, z[None, :, None], torch.ones(len(x), 1), steps)
    got = chain.transition(x[:, None], steps - 1 - inputs["step"])
    eps, fraction = head(x, process(steps, x.device).t[inputs["step"]], z)
    mean, logvar = head.reverse(x, eps, fraction, inputs["step"][:, None], chain.process)
    assert torch.equal(got.mean[:, 0], mean)
    assert torch.equal(got.std[:, 0], torch.where(inputs["step"][:, None] == 0, 0, (0.5 * logvar).exp()))
    return {"eps_and_range": raw, "mean": mean.float(), "log_variance": logvar.float()}
