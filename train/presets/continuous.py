"""Recipes of the continuous line: KL autoencoders, xAR."""

from __future__ import annotations

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
            patch=4,
            channels=(96, 160),
            layers=1,
            latent_channels=16,
            norm_groups=16,
            shortcut=True,
            equivariance=0.25,
        ),
        loss=AutoencoderLossConfig(perceptual=0.5, perceptual_fraction=0.125),
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=3_000),
        images=100_000,
        batch_size=16,
        threads=1,
        ema=0.999,
    )
