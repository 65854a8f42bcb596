"""kl16.ckpt of MAR and xAR (key `model`), and autoencoders of that layout, to `KLVAE`."""

from __future__ import annotations

import re

import torch

from genlab.hub import load_strict
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

from .keys import count, need

LATENT_SCALE = 0.2325  # MAR and xAR multiply latents by it
_RENAMED = [
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"\.(up|down)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def convert_kl_vae(state: dict[str, torch.Tensor], *, image_size: int = 256) -> KLVAE:
    """A `KLVAE` with these weights.

    Args:
        state: official names and tensors.
        image_size: side of the images it is to take.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    levels = count(state, r"encoder\.down\.(\d+)")
    channels = tuple(need(state, f"encoder.down.{i}.block.0.conv1.weight").shape[0] for i in range(levels))
    model = KLVAE(
        KLVAEConfig(
            image_size=image_size,
            channels=channels,
            layers=count(state, r"encoder\.down\.0\.block\.(\d+)"),
            latent_channels=need(state, "post_quant_conv.weight").shape[0],
            attention_levels=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state),
            kl_weight=1e-6,
        )
    )
    ours = {
        "latent_mean": torch.zeros(model.config.latent_channels),
        "latent_std": torch.full((model.config.latent_channels,), 1 / LATENT_SCALE),
    }
    for name, value in state.items():
        if name.startswith("loss."):
            continue
        # diffusers counts the decoder's levels the other way round
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        if ".attentions." in name and value.ndim == 4:  # 1x1 convolutions are linear layers there
            value = value[:, :, 0, 0]
        ours[f"vae.{name}"] = value
    load_strict(model, ours, where="the KL autoencoder checkpoint")
    return model.eval()
