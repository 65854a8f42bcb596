"""FlexTok's case: images to ids, and any first ids to images, with and without guidance."""

from __future__ import annotations

import re

import torch
from einops import rearrange

from genlab.convert.flextok import convert_flextok


def roundtrip(config, state, inputs):
    vae, images = config["vae"], inputs["images"]
    model = convert_flextok(
        state,
        image_size=images.shape[-1],
        levels=tuple(config["levels"]),
        head_dim=config["head_dim"],
        norm_groups=vae["norm_num_groups"],
        scaling_factor=vae["scaling_factor"],
    )
    note = config.get("note", "")

    def number(pattern, otherwise):
        found = re.search(pattern, note)
        return float(found[1]) if found else otherwise

    latents = model.vae.encode(images)
    ids = model.encode(images)
    kept = torch.tensor(config["keep"])

    def decode(steps, guidance):
        z = model.draw_latents(ids.values, kept, inputs["noise"], steps=int(steps), guidance=guidance)
        return model.vae.decode_latents(z * model.vae.latent_std[:, None, None])

    return {
        "vae_latents": rearrange(latents.values, "b (h w) c -> b c h w", h=inputs["noise"].shape[2]),
        "ids": ids.values,
        "decoded": decode(number(r"decoded: (\d+) steps", 3), 1.0),
        "decoded_apg": decode(number(r"(\d+) Euler steps", 4), number(r"guidance ([\d.]+)", 7.5)),
    }
