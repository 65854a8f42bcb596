"""Recipes of residual quantisation: RVQ."""

from __future__ import annotations

from tokenizers_img.losses import AutoencoderLossConfig
from tokenizers_img.rvq import RVQConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset


@preset("rvq-f8-emoji64")
def rvq_f8_emoji64(name: str) -> TrainConfig:
    """64 positions of 8 depths of 1,024 codes."""
    return run_config(
        name=name,
        model=RVQConfig(
            image_size=64,
            patch=8,
            channels=(256,),
            layers=1,
            decoder_layers=2,
            features=128,
            attention_levels=(),
            shortcut=True,
            codes=1024,
            depth=8,
            dim=64,
        ),
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.1, perceptual_fraction=0.125),
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=1_000),
        cpu_minutes=25,
        batch_size=16,
        threads=1,
        ema=0.999,
    )
