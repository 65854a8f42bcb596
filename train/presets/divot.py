"""Recipes of Divot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from genlab.generators.divot_lm import DivotLMConfig
from tokenizers_img.divot import DivotConfig
from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.losses import AutoencoderLossConfig
from tokenizers_img.video_unet import VideoUNetConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset
from .continuous import kl_vae_f8c16_emoji64

# -- the embedded animations, and the embedded stills set in motion, 8 frames of 64x64 pixels, 4 a second -------------


def _emoji64(name: str, **fields: Any) -> TrainConfig:
    vae: KLVAEConfig = kl_vae_f8c16_emoji64(name).model
    model = DivotConfig(
        frames=8,
        fps=4.0,
        read=8,
        vae=vae,
        network="efficientnet-lite0",
        network_size=64,
        levels=(0, 1, 2),
        places=4,
        channels=1568,
        pool=4,
        tube=2,
        width=192,
        temporal_layers=1,
        temporal_heads=6,
        dim=192,
        depth=1,
        heads=6,
        resampler_depth=1,
        resampler_heads=6,
        dim_head=32,
        context=64,
        denoiser_dim=192,
        denoiser_depth=4,
        denoiser_heads=6,
        local=True,
        time_bias=2.0,
        steps=20,
        eta=0.0,
        guidance=1.0,
        rescale=0.0,
    )
    settings: dict[str, Any] = {
        "model": model,
        "tokenizer": "kl_vae-f8c16-emoji64",
        "data": DataConfig(source="emoji-anim+moved:emoji#1200", takes=2, reverse=True),
        "optim": OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.02, warmup=1_000),
        "cpu_minutes": 28,
        "batch_size": 8,
        "ema": 0.998,
        "sample_every": 4_000,
        "save_every": 4_000,
        "threads": 1,
    }
    return run_config(name=name, **(settings | fields))


@preset("divot-emoji64")
def divot_emoji64(name: str) -> TrainConfig:
    """Joint stage: 64 tokens of 256 channels a clip of two seconds."""
    return _emoji64(name)


@preset("divot-more-emoji64")
def divot_more_emoji64(name: str) -> TrainConfig:
    """The joint stage once more, from where that ended."""
    config = _emoji64(name, init="divot-emoji64", cpu_minutes=30)
    return replace(config, optim=replace(config.optim, lr=8e-4, warmup=400))


_DRAWING: dict[str, Any] = {"guidance": 2.0, "rescale": 0.7, "steps": 8}
"""How the later stages' models draw: more steps look sharper and move less as the original does."""


@preset("divot-detokenizer-emoji64")
def divot_detokenizer_emoji64(name: str) -> TrainConfig:
    """De-tokenizer stage: tokens frozen, the condition dropped in 5 %, guidance becomes possible."""
    config = _emoji64(name)
    model = replace(config.model, stage="detokenizer", **_DRAWING)
    return _emoji64(name, model=model, init="divot-more-emoji64", cpu_minutes=11)


@preset("divot-detokenizer-more-emoji64")
def divot_detokenizer_more_emoji64(name: str) -> TrainConfig:
    """The same once more, from where that ended."""
    config = divot_detokenizer_emoji64(name)
    return replace(config, init="divot-detokenizer-emoji64", optim=replace(config.optim, lr=6e-4, warmup=400))


_LM: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",  # on CPUs quicker to train than the fused kernel
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _lm_emoji64(name: str, **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {
        "lm": _LM,
        "text_vocab": 1024,
        "text_length": 32,
        "dropout": 0.1,
        "head_hidden": 384,
        "temperature": 0.0,
    }
    return run_config(
        name=name,
        model=DivotLMConfig(**sizes | fields),
        tokenizer="divot-emoji64",
        data=DataConfig(source="emoji-anim+moved:emoji#400", takes=3),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=2_000),
        cpu_minutes=30,
        batch_size=8,
        ema=0.998,
        sample_every=4_000,
        threads=1,
    )


@preset("divot_lm-emoji64")
def divot_lm_emoji64(name: str) -> TrainConfig:
    """Words and a clip, or a clip and its words; a mixture of 8 Gaussians a token."""
    return _lm_emoji64(name, components=8)


@preset("divot_lm-more-emoji64")
def divot_lm_more_emoji64(name: str) -> TrainConfig:
    """The same for longer, up to three pairs in a row: what a story needs."""
    run = _lm_emoji64(name, components=8, interleave=3)
    return replace(run, init="divot_lm-emoji64", cpu_minutes=8, optim=replace(run.optim, lr=4e-4, warmup=200))


@preset("divot_lm-mse-emoji64")
def divot_lm_mse_emoji64(name: str) -> TrainConfig:
    """The ablation that predicts a token's mean."""
    return _lm_emoji64(name, head="mse")


@preset("divot_lm-diffusion-emoji64")
def divot_lm_diffusion_emoji64(name: str) -> TrainConfig:
    """The ablation with a diffusion head a token."""
    return _lm_emoji64(name, head="diffusion")


@preset("divot-adapt-emoji64")
def divot_adapt_emoji64(name: str) -> TrainConfig:
    """Adaptation stage: the de-tokenizer learns from tokens that the language model draws."""
    config = _emoji64(name)
    model = replace(config.model, stage="adapt", **_DRAWING)
    data = DataConfig(source="emoji-anim", takes=3)
    return _emoji64(
        name, model=model, data=data, init="divot-emoji64", teacher="divot_lm-emoji64", cpu_minutes=8
    )  # fmt: skip


# -- films at 256x256, the release's sizes; `films` is your folder or shards of films, `imagenet` of images --------


@preset("divot-vae-c4-in256")
def divot_vae_c4_in256(name: str) -> TrainConfig:
    """The autoencoder of frames, 8x8 pixels to 4 channels; a usual recipe (the release takes Stable Diffusion's)."""
    return run_config(
        name=name,
        model=DivotConfig().vae,
        loss=AutoencoderLossConfig(l1=1.0, perceptual=1.0, adversarial=0.5, adversarial_start=20_000 * 128),
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=0, schedule="constant"),
        images=20_000_000,
        batch_size=128,
        ema=0.9999,
    )


# the release's denoiser; the paper starts it from DynamiCrafter's weights, here it starts afresh
_RELEASE = DivotConfig(unet=VideoUNetConfig())


def _films256(name: str, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": _RELEASE,
        "tokenizer": "divot-vae-c4-in256",
        "data": DataConfig(source="films", on_error="skip"),
        "optim": OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, warmup=0, schedule="constant"),
        "images": 10_000_000,
        "batch_size": 256,
        "ema": 0.9999,
    }
    return run_config(name=name, **(settings | fields))


@preset("divot-films256")
def divot_films256(name: str) -> TrainConfig:
    """Joint stage at the release's sizes, on 10M films (rate, batch and optimiser are unpublished)."""
    return _films256(name)


@preset("divot-detokenizer-films256")
def divot_detokenizer_films256(name: str) -> TrainConfig:
    """De-tokenizer stage at the release's sizes."""
    return _films256(name, model=replace(_RELEASE, stage="detokenizer"), init="divot-films256")


@preset("divot_lm-films256")
def divot_lm_films256(name: str) -> TrainConfig:
    """The release's LM: Mistral-7B-Instruct-v0.1 by LoRA, 16 Gaussians a token, 100,000 steps."""
    return run_config(
        name=name,
        model=DivotLMConfig(base="mistralai/Mistral-7B-Instruct-v0.1", lm={"model_type": "mistral"}, lora_rank=32),
        tokenizer="divot-films256",
        data=DataConfig(source="films", on_error="skip"),
        optim=OptimConfig(
            lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, warmup=500 * 256, schedule="cosine", final_lr=0.05
        ),
        images=100_000 * 256,
        batch_size=256,
        ema=0.999,
    )
