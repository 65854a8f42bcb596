"""The KL-16 autoencoder's cases."""

from __future__ import annotations

from genlab.convert.kl_vae import convert_kl_vae


def roundtrip(config, state, inputs):
    model = convert_kl_vae(state, image_size=inputs["images"].shape[-1])
    mean, logvar = model.posterior(inputs["images"])
    return {"mean": mean, "logvar": logvar, "decoded": model.decode_latents(inputs["z"])}
