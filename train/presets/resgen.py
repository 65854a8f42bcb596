"""Recipes of residual quantisation: RVQ, ResGen."""

from __future__ import annotations

from genlab.generators.resgen import ResGenConfig
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


@preset("resgen-emoji64")
def resgen_emoji64(name: str) -> TrainConfig:
    """Over `rvq-f8-emoji64`."""
    return run_config(
        name=name,
        model=ResGenConfig(
            grid=(8, 8), vocab=1024, codes_depth=8, code_dim=64, num_classes=10, dim=256, depth=6, heads=4, mixtures=128
        ),
        tokenizer="rvq-f8-emoji64",
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02, warmup=3_000),
        cpu_minutes=25,
        batch_size=32,
        ema=0.998,
        threads=1,
    )
