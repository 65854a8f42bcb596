"""Recipes of the discrete line's tokenizers: VQ, BAE, multi-scale VQ."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers_img.bae import BAEConfig
from tokenizers_img.losses import AutoencoderLossConfig
from tokenizers_img.msvq import MSVQConfig
from tokenizers_img.vq import VQConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset

# -- the embedded emoji, 64x64 pixels to 16x16 places ------------------------------------------------------------

_SMALL: dict[str, Any] = {
    "image_size": 64,
    "patch": 4,
    "channels": (128,),
    "layers": 1,
    "decoder_layers": 2,
    "attention_levels": (),
    "shortcut": True,
}


def _emoji64(name: str, model: Any) -> TrainConfig:
    return run_config(
        name=name,
        model=model,
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.1, perceptual_fraction=0.125),
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=1_000),
        images=36_000,
        cpu_minutes=20,
        batch_size=16,
        threads=1,
        ema=0.999,
    )


@preset("vq-f4-emoji64")
def vq_f4_emoji64(name: str) -> TrainConfig:
    """256 tokens of 1,024 codes."""
    return _emoji64(name, VQConfig(**_SMALL, features=128, codes=1024, dim=8))


@preset("bae-f4-emoji64")
def bae_f4_emoji64(name: str) -> TrainConfig:
    """256 tokens of two sub-tokens of six bits: 4,096 codes."""
    return _emoji64(name, BAEConfig(**_SMALL, features=128, sub_tokens=2, bits=6, entropy=0.02))


@preset("msvq-f4-emoji64")
def msvq_f4_emoji64(name: str) -> TrainConfig:
    """Six scales up to 16x16, 359 tokens of 1,024 codes."""
    model = MSVQConfig(**_SMALL, features=32, codes=1024, dim=16, scales=(1, 2, 3, 5, 8, 16))
    return _emoji64(name, model)


_ENCODERS = {"vq": ("codebook",), "bae": (), "msvq": ("quantiser",)}
"""What of each belongs to the encoder beside encoder, pre, to_map."""


def _decoder_emoji64(name: str, first: TrainConfig) -> TrainConfig:
    """A tokenizer a second time, all that makes tokens frozen: a decoder that sees the seams between its patches."""
    return dataclasses.replace(
        first,
        name=name,
        model=dataclasses.replace(first.model, refine=64),
        init=first.name,
        freeze=("encoder", "pre", "to_map", *_ENCODERS[first.model.kind]),
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.2, perceptual_fraction=0.5),
        optim=dataclasses.replace(first.optim, lr=5e-4),
        cpu_minutes=12,
    )


@preset("vq-f4-decoder-emoji64")
def vq_f4_decoder_emoji64(name: str) -> TrainConfig:
    """The second stage of `vq-f4-emoji64`: its tokens stay as they are."""
    return _decoder_emoji64(name, vq_f4_emoji64("vq-f4-emoji64"))


@preset("bae-f4-decoder-emoji64")
def bae_f4_decoder_emoji64(name: str) -> TrainConfig:
    """The second stage of `bae-f4-emoji64`: its tokens stay as they are."""
    return _decoder_emoji64(name, bae_f4_emoji64("bae-f4-emoji64"))


@preset("msvq-f4-decoder-emoji64")
def msvq_f4_decoder_emoji64(name: str) -> TrainConfig:
    """The second stage of `msvq-f4-emoji64`: its tokens stay as they are."""
    return _decoder_emoji64(name, msvq_f4_emoji64("msvq-f4-emoji64"))


# -- ImageNet at 256x256, the papers' sizes; `imagenet` is your image folder -----------------------------------------

_IMAGENET = 1_281_167


@preset("vq-ds16-in256")
def vq_ds16_in256(name: str) -> TrainConfig:
    """LlamaGen's VQ-16 (72M), 16x16 tokens of 16,384 codes: 40 epochs, the PatchGAN from step 20,000."""
    return run_config(
        name=name,
        model=VQConfig(),
        loss=AutoencoderLossConfig(l1=0.0, l2=1.0, perceptual=1.0, adversarial=0.5, adversarial_start=20_000 * 128),
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=0, schedule="constant"),
        images=40 * _IMAGENET,
        batch_size=128,
        ema=0.9999,
    )


@preset("vq-ds8-in256")
def vq_ds8_in256(name: str) -> TrainConfig:
    """LlamaGen's VQ-8 (70M), 32x32 tokens of 16,384 codes."""
    sixteen = vq_ds16_in256(name)
    return run_config(
        **{k: getattr(sixteen, k) for k in ("name", "loss", "data", "optim", "images", "batch_size", "ema")},
        model=VQConfig(channels=(128, 256, 256, 512), attention_levels=(3,)),
    )


def _bae_in256(name: str, bits: int, *, sub_tokens: int = 2, deterministic: bool = False) -> TrainConfig:
    """The repository has no training script: 1M steps of 256 and the loss are published, the optimiser is not."""
    return run_config(
        name=name,
        model=BAEConfig(sub_tokens=sub_tokens, bits=bits // sub_tokens, deterministic=deterministic),
        # the published weight of L1 is 1, on images in [0, 1]
        loss=AutoencoderLossConfig(l1=0.5, perceptual=1.0, adversarial=1.0, adversarial_start=30_001 * 256),
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, warmup=0, schedule="constant"),
        images=256_000_000,
        batch_size=256,
        ema=0.9999,
    )


@preset("bae-16-in256")
def bae_16_in256(name: str) -> TrainConfig:
    """ELM's BAE (63.0M, without the parts it never uses) of 16 bits, cut in two."""
    return _bae_in256(name, 16)


@preset("bae-1-16-in256")
def bae_1_16_in256(name: str) -> TrainConfig:
    """`bae-16-in256` with its bits uncut, as the masked ELM reads them; the same weights serve both."""
    return _bae_in256(name, 16, sub_tokens=1)


@preset("bae-16-deterministic-in256")
def bae_16_deterministic_in256(name: str) -> TrainConfig:
    """ELM's BAE of 16 bits, rounded in place of drawn."""
    return _bae_in256(name, 16, deterministic=True)


@preset("bae-20-in256")
def bae_20_in256(name: str) -> TrainConfig:
    """ELM's BAE of 20 bits."""
    return _bae_in256(name, 20)


@preset("bae-24-in256")
def bae_24_in256(name: str) -> TrainConfig:
    """ELM's BAE of 24 bits."""
    return _bae_in256(name, 24)


@preset("msvq-in256")
def msvq_in256(name: str) -> TrainConfig:
    """VAR's tokenizer (109M), ten scales up to 16x16. Its recipe is unpublished; this is `vq-ds16-in256`'s."""
    sixteen = vq_ds16_in256(name)
    return run_config(
        **{k: getattr(sixteen, k) for k in ("name", "loss", "data", "optim", "images", "batch_size", "ema")},
        model=MSVQConfig(),
    )
