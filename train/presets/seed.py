"""Recipes of SEED's tokenizer, three stages each."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers_img.qformer import LITE0
from tokenizers_img.seed import SEEDConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset
from .continuous import over_kl_vae, xar_cell_emoji64

# -- the embedded emoji, 64x64 pixels ------------------------------------------------------------------------------

_EMOJI64 = SEEDConfig(
    image_size=64, encoder=LITE0, encoder_args={}, encoder_size=160, encoder_dim=1280, dim=128, depth=4, heads=2,
    hidden=512, dropout=0.2, contrastive_dim=384, codes=1024, code_dim=8, own_down=True, keep=3.0,
    weights=(5.0, 1.0, 5.0), blocks=2, target_dim=1280,
)  # fmt: skip


def _emoji64(name: str, minutes: float, lr: float, batch: int, **fields: Any) -> TrainConfig:
    return run_config(
        name=name,
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), weight_decay=0.2, warmup=4_000),
        cpu_minutes=minutes,
        batch_size=batch,
        ema=0.995,
        threads=1,
        **fields,
    )


@preset("seed-contrastive-emoji64")
def seed_contrastive_emoji64(name: str) -> TrainConfig:
    """Stage 1: EfficientNet-Lite0's features through the causal Q-Former, into MiniLM's space of captions."""
    return _emoji64(name, 12, 1e-3, 128, model=_EMOJI64, freeze=("text_head",))


@preset("seed-codes-emoji64")
def seed_codes_emoji64(name: str) -> TrainConfig:
    """Stage 2: 32 codes of 1,024."""
    model = dataclasses.replace(_EMOJI64, stage="codes", contrast=0.5, generator="xar-seed-emoji64")
    init = "runs/seed-contrastive-emoji64/model"
    return _emoji64(name, 9, 1e-3, 128, model=model, init=init, freeze=("text_head",))


@preset("xar-seed-emoji64")
def xar_seed_emoji64(name: str) -> TrainConfig:
    """What draws the codes: `xar-cell-emoji64`, which knows the pictures already, taught to read them."""
    model = dataclasses.replace(
        xar_cell_emoji64(name).model, condition="text", text_dim=_EMOJI64.target_dim, text_length=1
    )
    run = over_kl_vae(name, model, 25)
    return dataclasses.replace(
        run, init="xar-cell-emoji64", codes_of="seed-emoji64", data=DataConfig(flip=True), batch_size=8, ema=0.998,
        optim=dataclasses.replace(run.optim, lr=4e-4, warmup=500),
    )  # fmt: skip


@preset("xar-seed-more-emoji64")
def xar_seed_more_emoji64(name: str) -> TrainConfig:
    """`xar-seed-emoji64` once more, for longer.

    Codes of which it has seen few pictures come out as blots of their colours.
    """
    run = xar_seed_emoji64(name)
    return dataclasses.replace(
        run, init="runs/xar-seed-emoji64/model", cpu_minutes=45, optim=dataclasses.replace(run.optim, lr=5e-4)
    )


@preset("xar-seed-things-emoji64")
def xar_seed_things_emoji64(name: str) -> TrainConfig:
    """`xar-seed-more-emoji64` once more, with things as often as people.

    Three images of five show people, whom it draws well long before anything else. None is mirrored, so that each is
    seen twice as often.
    """
    run = xar_seed_more_emoji64(name)
    return dataclasses.replace(
        run, init="runs/xar-seed-more-emoji64/model", cpu_minutes=105, data=DataConfig(balance=0.75),
        optim=dataclasses.replace(run.optim, lr=7e-4),
    )  # fmt: skip


# -- the published sizes; `captions` is your set of images with captions ---------------------------------------------


def _published(name: str, images: int, batch: int, lr: float, **fields: Any) -> TrainConfig:
    return run_config(
        name=name,
        data=DataConfig(source="captions"),
        optim=OptimConfig(lr=lr, weight_decay=0.05, warmup=2_000 * batch, final_lr=0.1),
        images=images,
        batch_size=batch,
        **fields,
    )


_PAIRS = 500_000_000
"""What the authors trained on, about."""


@preset("seed-contrastive")
def seed_contrastive(name: str) -> TrainConfig:
    """SEED-2's stage 1: EVA ViT-g/14; ten epochs of about 500M pairs. Its Q-Former began as BLIP-2's."""
    return _published(name, 10 * _PAIRS, 4096, 3e-5, model=SEEDConfig())


@preset("seed-codes")
def seed_codes(name: str) -> TrainConfig:
    """SEED-2's stage 2, towards unCLIP's image embedding, by the second Q-Former."""
    model = SEEDConfig(
        stage="codes", reverse="qformer", target_from="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        diffusion="stabilityai/stable-diffusion-2-1-unclip",
    )  # fmt: skip
    return _published(name, _PAIRS, 2048, 1e-4, model=model, init="runs/seed-contrastive/model")


@preset("seed-codes-text77")
def seed_codes_text77(name: str) -> TrainConfig:
    """SEED-1's stage 2: towards Stable Diffusion's 77 text features."""
    model = SEEDConfig(
        stage="codes", target="sd_text77", reverse="qformer", target_dim=768, image_size=512,
        target_from="openai/clip-vit-large-patch14", diffusion="CompVis/stable-diffusion-v1-4",
    )  # fmt: skip
    return _published(name, _PAIRS, 2048, 1e-4, model=model, init="runs/seed-contrastive/model")
