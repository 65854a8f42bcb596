"""Recipes of residual quantisation: RVQ, ResGen."""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.resgen import ResGenConfig
from genlab.generators.rq_transformer import RQTransformerConfig
from tokenizers_img.losses import AutoencoderLossConfig
from tokenizers_img.rvq import RVQConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset

_RVQ: dict[str, Any] = {
    "image_size": 64, "patch": 8, "layers": 1, "decoder_layers": 2, "features": 128, "attention_levels": (),
    "shortcut": True, "codes": 1024,
}  # fmt: skip


def _rvq(name: str, model: RVQConfig, loss: AutoencoderLossConfig, cpu_minutes: float) -> TrainConfig:
    return run_config(
        name=name,
        model=model,
        loss=loss,
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=1_000),
        cpu_minutes=cpu_minutes,
        batch_size=16,
        threads=1,
        ema=0.999,
    )


@preset("rvq-f8-emoji64")
def rvq_f8_emoji64(name: str) -> TrainConfig:
    """64 positions of 8 depths of 1,024 codes."""
    loss = AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.1, perceptual_fraction=0.125)
    return _rvq(name, RVQConfig(**_RVQ, channels=(256,), depth=8, dim=64), loss, 10)


@preset("rvq-f16-emoji64")
def rvq_f16_emoji64(name: str) -> TrainConfig:
    """16 positions of 16 depths of 1,024 codes: half the codes of `rvq-f8-emoji64`, a quarter of its positions."""
    loss = AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.4, perceptual_fraction=0.25)
    return _rvq(name, RVQConfig(**_RVQ, channels=(256, 256), refine=32, depth=16, dim=128), loss, 25)


def _decoder(name: str, first: TrainConfig) -> TrainConfig:
    """A tokenizer a second time, all that makes tokens frozen: a decoder that clears up what rounding leaves."""
    return dataclasses.replace(
        first, name=name, model=dataclasses.replace(first.model, refine=32, depth_drop=0.2),
        init=f"runs/{first.name}/model", freeze=("encoder", "pre", "to_map"),
        loss=AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.4, perceptual_fraction=0.5),
        optim=dataclasses.replace(first.optim, lr=5e-4), cpu_minutes=20,
    )  # fmt: skip


@preset("rvq-f8-decoder-emoji64")
def rvq_f8_decoder_emoji64(name: str) -> TrainConfig:
    """The second stage of `rvq-f8-emoji64`: its tokens stay as they are."""
    return _decoder(name, rvq_f8_emoji64("rvq-f8-emoji64"))


@preset("rvq-f16-decoder-emoji64")
def rvq_f16_decoder_emoji64(name: str) -> TrainConfig:
    """The second stage of `rvq-f16-emoji64`: its tokens stay as they are."""
    return _decoder(name, rvq_f16_emoji64("rvq-f16-emoji64"))


def _over_rvq(name: str, model: Any, tokenizer: str = "rvq-f8-emoji64", batch_size: int = 8) -> TrainConfig:
    """The same training for all that draw residual codes: narrow, small batches, many steps."""
    return run_config(
        name=name,
        model=model,
        tokenizer=tokenizer,
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=1_000),
        cpu_minutes=25,
        batch_size=batch_size,
        ema=0.999,
        threads=1,
    )


_CODES: dict[str, Any] = {"vocab": 1024, "num_classes": 10, "heads": 4}
_F8: dict[str, Any] = _CODES | {"grid": (8, 8), "codes_depth": 8, "code_dim": 64}
_F16: dict[str, Any] = _CODES | {"grid": (4, 4), "codes_depth": 16, "code_dim": 128}
_PER_CODE: dict[str, Any] = {"mixtures": 0, "rank": 0, "classification": 64.0}
_OWN = "runs/rvq-f16-emoji64/model"


@preset("resgen-emoji64")
def resgen_emoji64(name: str) -> TrainConfig:
    """Over `rvq-f8-emoji64`, 2.7M parameters; a component for each code."""
    model = ResGenConfig(**_F8, **_PER_CODE, dim=160, depth=6, mask_power=1 / 12)
    return dataclasses.replace(_over_rvq(name, model, batch_size=16), cpu_minutes=30)


@preset("resgen-more-emoji64")
def resgen_more_emoji64(name: str) -> TrainConfig:
    """`resgen-emoji64` a second time, longer and at a lower rate."""
    first = resgen_emoji64(name)
    optim = dataclasses.replace(first.optim, lr=1.5e-3)
    return dataclasses.replace(first, init="resgen-emoji64", optim=optim, cpu_minutes=45)


@preset("rq_transformer-emoji64")
def rq_transformer_emoji64(name: str) -> TrainConfig:
    """The autoregressive baseline of ResGen's size: positions, then depths."""
    return _over_rvq(name, RQTransformerConfig(**_F8, dim=128, depth=4, stack_depth=2))


@preset("rq_transformer-flat-emoji64")
def rq_transformer_flat_emoji64(name: str) -> TrainConfig:
    """The other one: all 512 codes in a row."""
    return _over_rvq(name, RQTransformerConfig(**_F8, style="flat", dim=128, depth=6))


@preset("resgen-f16-emoji64")
def resgen_f16_emoji64(name: str) -> TrainConfig:
    """Over `rvq-f16-emoji64`, 4.3M parameters: for `genlab bench resgen`."""
    model = ResGenConfig(**_F16, **_PER_CODE, dim=160, depth=6, mask_power=1 / 24)
    return _over_rvq(name, model, _OWN, batch_size=32)


@preset("rq_transformer-f16-emoji64")
def rq_transformer_f16_emoji64(name: str) -> TrainConfig:
    """The autoregressive baseline of its size."""
    return _over_rvq(name, RQTransformerConfig(**_F16, dim=144, depth=4, stack_depth=2), _OWN)


@preset("rq_transformer-flat-f16-emoji64")
def rq_transformer_flat_f16_emoji64(name: str) -> TrainConfig:
    """The other one: all 256 codes in a row."""
    return _over_rvq(name, RQTransformerConfig(**_F16, style="flat", dim=144, depth=6), _OWN)
