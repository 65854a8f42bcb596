"""Recipes by name, `{system}-{variant}-{data}{px}`: plain functions that return a `TrainConfig`.

The emoji64 recipes are what the shipped weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.losses import AutoencoderLossConfig

from .config import DataConfig, OptimConfig, TrainConfig, run_config

PRESETS: dict[str, Callable[[], TrainConfig]] = {}


def preset(name: str) -> Callable[[Callable[[str], TrainConfig]], Callable[[str], TrainConfig]]:
    """Register a recipe; the function takes its own name."""

    def add(make: Callable[[str], TrainConfig]) -> Callable[[str], TrainConfig]:
        PRESETS[name] = lambda: make(name)
        return make

    return add


@preset("kl_vae-f8c16-emoji64")
def kl_vae_f8c16_emoji64(name: str) -> TrainConfig:
    """64x64 pixels to 8x8 tokens of 16 channels: 1/12 as many numbers."""
    return run_config(
        name=name,
        model=KLVAEConfig(
            image_size=64, patch=4, channels=(96, 160), layers=1, latent_channels=16, norm_groups=16, equivariance=0.25
        ),
        loss=AutoencoderLossConfig(perceptual=0.5, perceptual_fraction=0.125),
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=3_000),
        images=100_000,
        batch_size=16,
        threads=1,
        ema=0.999,
    )
