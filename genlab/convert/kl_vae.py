"""kl16.ckpt of MAR and xAR (key `model`), and autoencoders of that layout, to `KLVAE`."""

from __future__ import annotations

import torch

from genlab.hub import load_strict
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

from .conv import conv_sizes, to_diffusers
from .keys import need

LATENT_SCALE = 0.2325  # MAR and xAR multiply latents by it


def convert_kl_vae(state: dict[str, torch.Tensor], *, image_size: int = 256, scale: float = LATENT_SCALE) -> KLVAE:
    """A `KLVAE` with these weights.

    Args:
        state: official names and tensors.
        image_size: side of the images it is to take.
        scale: what its latents are multiplied by.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    sizes = conv_sizes(state)
    if sizes["decoder_layers"] != sizes["layers"] + 1:
        raise ValueError(f"a decoder of {sizes['decoder_layers']} blocks a level does not go with {sizes['layers']}")
    model = KLVAE(
        KLVAEConfig(
            image_size=image_size,
            channels=sizes["channels"],
            layers=sizes["layers"],
            latent_channels=need(state, "post_quant_conv.weight").shape[0],
            attention_levels=sizes["attention_levels"],
            kl_weight=1e-6,
        )
    )
    weights = to_diffusers({k: v for k, v in state.items() if not k.startswith("loss.")})
    ours = {
        "latent_mean": torch.zeros(model.config.latent_channels),
        "latent_std": torch.full((model.config.latent_channels,), 1 / scale),
        **{f"vae.{name}": value for name, value in weights.items()},
    }
    load_strict(model, ours, where="the KL autoencoder checkpoint")
    return model.eval()
