"""Recipes of FlexTok and of the transformers over its tokens."""

from __future__ import annotations

import math
from typing import Any

from genlab.generators.flexar import DecoderConfig, FlexARConfig
from genlab.nn.apg import APGConfig
from tokenizers_img.flextok import FlexTokConfig
from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.losses import AutoencoderLossConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset
from .continuous import kl_vae_f8c16_emoji64

# -- the embedded emoji, 64x64 pixels ------------------------------------------------------------------------------

# With tens of CPU-minutes, steps count for more than width: narrow models, small batches, a high rate. The latents are
# a map of 8x8 only, so a place of it is a patch.
_TOKENS, _LEVELS = 32, (8, 6, 5, 5)


def _emoji64(name: str, **fields: Any) -> TrainConfig:
    vae: KLVAEConfig = kl_vae_f8c16_emoji64(name).model
    model = FlexTokConfig(
        vae=vae,
        patch=1,
        draft=768,
        precondition=True,
        registers=_TOKENS,
        levels=_LEVELS,
        encoder_dim=192,
        encoder_depth=3,
        decoder_dim=192,
        decoder_depth=6,
        spread=0.05,
        times="stratified",
        steps=10,
        guidance=1.5,
        apg=APGConfig(momentum=0.0, threshold=0.0, eta=1.0),  # so mild a scale needs no projection
        **fields,
    )
    return run_config(
        name=name,
        model=model,
        tokenizer="kl_vae-f8c16-emoji64",
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.02, warmup=2_000),
        cpu_minutes=60,
        batch_size=8,
        ema=0.999,
        threads=1,
    )


@preset("flextok-d6-emoji64")
def flextok_d6_emoji64(name: str) -> TrainConfig:
    """1 to 32 tokens of 1,200 codes."""
    return _emoji64(name)


@preset("flextok-repa-d6-emoji64")
def flextok_repa_d6_emoji64(name: str) -> TrainConfig:
    """The same, its second block aligned with EfficientNet-Lite0."""
    return _emoji64(name, repa="efficientnet-lite0", repa_weight=0.5)


def _flexar_emoji64(name: str, **condition: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"dim": 128, "depth": 6, "heads": 4, "hidden": 352, "num_classes": 10}
    return run_config(
        name=name,
        model=FlexARConfig(grid=(1, _TOKENS), vocab=math.prod(_LEVELS), **sizes, **condition),
        tokenizer="flextok-d6-emoji64",
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=4_000),
        cpu_minutes=7,  # in 15 it knows the training set by heart: held-out nats are least after 6
        batch_size=32,
        ema=0.999,
        threads=1,
    )


@preset("flexar-emoji64")
def flexar_emoji64(name: str) -> TrainConfig:
    """By class, over `flextok-d6-emoji64`."""
    return _flexar_emoji64(name)


@preset("flexar-text-emoji64")
def flexar_text_emoji64(name: str) -> TrainConfig:
    """By caption (MiniLM's embeddings)."""
    return _flexar_emoji64(name, condition="text", text_dim=384, text_length=16)


# -- ImageNet at 256x256, the papers' sizes; `imagenet` is your image folder -----------------------------------------

_IMAGENET = 1_281_167
_VAE = KLVAEConfig(channels=(128, 256, 512, 512), kl_weight=1e-6)


@preset("flextok-vae-c16-in256")
def flextok_vae_c16_in256(name: str) -> TrainConfig:
    """The autoencoder under FlexTok, 8x8 pixels to 16 channels; with a usual recipe, since its own is unpublished."""
    return run_config(
        name=name,
        model=_VAE,
        loss=AutoencoderLossConfig(l1=1.0, perceptual=1.0, adversarial=0.5, adversarial_start=20_000 * 128),
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=0, schedule="constant"),
        images=40 * _IMAGENET,
        batch_size=128,
        ema=0.9999,
    )


def _flextok_in256(name: str, encoder: int, decoder: int) -> TrainConfig:
    """Width 64 times the depth, 256 tokens of 64,000 codes; batch, steps and optimiser are unpublished."""
    model = FlexTokConfig(
        vae=_VAE,
        encoder_dim=64 * encoder,
        encoder_depth=encoder,
        decoder_dim=64 * decoder,
        decoder_depth=decoder,
        repa="vit_large_patch14_reg4_dinov2",
    )
    return run_config(
        name=name,
        model=model,
        tokenizer="flextok-vae-c16-in256",
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=3e-4, betas=(0.9, 0.99), weight_decay=0.02, warmup=10 * _IMAGENET // 4),
        images=160 * _IMAGENET,
        batch_size=2048,
        ema=0.9998,
    )


@preset("flextok-d12-d12-in256")
def flextok_d12_d12_in256(name: str) -> TrainConfig:
    """FlexTok d12-d12."""
    return _flextok_in256(name, 12, 12)


@preset("flextok-d18-d18-in256")
def flextok_d18_d18_in256(name: str) -> TrainConfig:
    """FlexTok d18-d18."""
    return _flextok_in256(name, 18, 18)


@preset("flextok-d18-d28-in256")
def flextok_d18_d28_in256(name: str) -> TrainConfig:
    """FlexTok d18-d28, the one most used."""
    return _flextok_in256(name, 18, 28)


def _flexar_in256(name: str, depth: int) -> TrainConfig:
    return run_config(
        name=name,
        model=FlexARConfig(dim=64 * depth, depth=depth, heads=depth, decoder=DecoderConfig()),
        tokenizer="flextok-d18-d28-in256",
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=_IMAGENET * 5),
        images=300 * _IMAGENET,
        batch_size=1024,
        ema=0.9999,
    )


@preset("flexar-d12-in256")
def flexar_d12_in256(name: str) -> TrainConfig:
    """A depth of 12."""
    return _flexar_in256(name, 12)


@preset("flexar-d18-in256")
def flexar_d18_in256(name: str) -> TrainConfig:
    """A depth of 18."""
    return _flexar_in256(name, 18)


@preset("flexar-d28-in256")
def flexar_d28_in256(name: str) -> TrainConfig:
    """A depth of 28: 1.3B parameters, the paper's largest."""
    return _flexar_in256(name, 28)


def _flexar_text_in256(name: str, depth: int) -> TrainConfig:
    """By caption, Flan-T5-XL's features; `captions` is your set of images with captions. The recipe is ours."""
    return run_config(
        name=name,
        model=FlexARConfig(dim=64 * depth, depth=depth, heads=depth, condition="text", decoder=DecoderConfig()),
        tokenizer="flextok-d18-d28-in256",
        text_encoder="google/flan-t5-xl",
        data=DataConfig(source="captions"),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=5_000 * 1024),
        images=250_000 * 1024,
        batch_size=1024,
        ema=0.9999,
    )


@preset("flexar-text-d12-in256")
def flexar_text_d12_in256(name: str) -> TrainConfig:
    """FlexAR-113M-T2I's size."""
    return _flexar_text_in256(name, 12)


@preset("flexar-text-d18-in256")
def flexar_text_d18_in256(name: str) -> TrainConfig:
    """FlexAR-382M-T2I's size."""
    return _flexar_text_in256(name, 18)


@preset("flexar-text-d26-in256")
def flexar_text_d26_in256(name: str) -> TrainConfig:
    """FlexAR-1B-T2I's size."""
    return _flexar_text_in256(name, 26)


@preset("flexar-text-d36-in256")
def flexar_text_d36_in256(name: str) -> TrainConfig:
    """FlexAR-3B-T2I's size."""
    return _flexar_text_in256(name, 36)
