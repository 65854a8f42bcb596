"""Recipes of the continuous line: KL autoencoders, xAR."""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.ddpm_unet import DDPMUNetConfig
from genlab.generators.xar import XARConfig
from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.losses import AutoencoderLossConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset


@preset("kl_vae-f8c16-emoji64")
def kl_vae_f8c16_emoji64(name: str) -> TrainConfig:
    """64x64 pixels to 8x8 tokens of 16 channels: 1/12 as many numbers."""
    return run_config(
        name=name,
        model=KLVAEConfig(
            image_size=64,
            patch=8,
            channels=(256,),
            layers=2,
            latent_channels=16,
            shortcut=True,
            equivariance=0.25,
        ),
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.1, perceptual_fraction=0.125),
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=1_000),
        images=36_000,
        batch_size=16,
        threads=1,
        ema=0.999,
    )


@preset("kl_vae-f8c16-decoder-emoji64")
def kl_vae_f8c16_decoder_emoji64(name: str) -> TrainConfig:
    """`kl_vae-f8c16-emoji64` a second time, its encoder frozen: a decoder that sees seams and forgives noise."""
    first = kl_vae_f8c16_emoji64(name)
    return dataclasses.replace(
        first,
        model=dataclasses.replace(first.model, refine=64, decoder_noise=0.15, equivariance=0.0),
        init="kl_vae-f8c16-emoji64",
        freeze=("vae.encoder", "vae.quant_conv", "to_latent"),
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.2, perceptual_fraction=0.5),
        optim=dataclasses.replace(first.optim, lr=5e-4),
        cpu_minutes=25,
    )


def over_kl_vae(name: str, model: Any, cpu_minutes: float = 15) -> TrainConfig:
    """Equal training for all that draw `kl_vae-f8c16-emoji64`'s tokens: what one core gives in so many minutes.

    In minutes, steps count for more than width: small batches of a narrow model at a high rate.
    """
    return run_config(
        name=name,
        model=model,
        tokenizer="kl_vae-f8c16-emoji64",
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.96), weight_decay=0.02, warmup=3_000),
        cpu_minutes=cpu_minutes,
        images=400_000,
        batch_size=8,
        ema=0.999,
        threads=1,
    )


def _first(name: str, model: Any) -> TrainConfig:
    """How the demo's model and its baseline were trained."""
    run = over_kl_vae(name, model, 60)
    return dataclasses.replace(
        run, optim=dataclasses.replace(run.optim, lr=1e-3), images=200_000, batch_size=32, ema=0.998
    )


_TINY = XARConfig(
    grid=(8, 8),
    channels=16,
    num_classes=10,
    size=4,
    dim=256,
    encoder_depth=3,
    decoder_depth=3,
    heads=4,
    dropout=0.0,
    guidance=2.0,  # the paper's ramp would leave the first of only four cells unguided
    guidance_schedule="constant",
)


@preset("xar-cell-emoji64")
def xar_cell_emoji64(name: str) -> TrainConfig:
    """Four cells of 4x4 tokens, 7.3M parameters: the model of the demo."""
    return _first(name, _TINY)


@preset("xar-cell-things-emoji64")
def xar_cell_things_emoji64(name: str) -> TrainConfig:
    """`xar-cell-emoji64` a second time, with things as often as people.

    Three training images of five show people, whom it draws well long before anything else.
    """
    run = xar_cell_emoji64(name)
    return dataclasses.replace(
        run, init="xar-cell-emoji64", cpu_minutes=60, batch_size=8, data=DataConfig(balance=0.75),
        optim=dataclasses.replace(run.optim, lr=7e-4, warmup=500),
    )  # fmt: skip


def _xar_in256(name: str, dim: int, depth: int, heads: int, guidance: float, steps: int) -> TrainConfig:
    return run_config(
        name=name,
        model=XARConfig(dim=dim, encoder_depth=depth, decoder_depth=depth, heads=heads, guidance=guidance, steps=steps),
        tokenizer="kl16-in256",
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=4e-4, betas=(0.9, 0.96), weight_decay=0.02, warmup=128_116_700),
        images=800 * 1_281_167,
        batch_size=2048,
        ema=0.9999,
    )


@preset("xar-b-in256")
def xar_b_in256(name: str) -> TrainConfig:
    """The paper's base model (172.6M): ImageNet 256x256, 800 epochs; `imagenet` is your image folder."""
    return _xar_in256(name, 768, 8, 12, 2.7, 40)


@preset("xar-l-in256")
def xar_l_in256(name: str) -> TrainConfig:
    """The paper's large model (608.4M)."""
    return _xar_in256(name, 1024, 16, 16, 2.3, 50)


@preset("xar-h-in256")
def xar_h_in256(name: str) -> TrainConfig:
    """The paper's huge model (1186.0M)."""
    return _xar_in256(name, 1280, 20, 16, 2.2, 50)


@preset("ddpm_unet-emoji64")
def ddpm_unet_emoji64(name: str) -> TrainConfig:
    """The baseline of `genlab bench baseline`: a U-Net DDPM on the same tokens."""
    return _first(name, DDPMUNetConfig(grid=(8, 8), channels=16, num_classes=10))
