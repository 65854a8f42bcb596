"""Recipes of the continuous line beside xAR's cells: its other entities, MAR, ECAR, one flow, raw pixels.

The flow transformer (DiT's and SiT's design: one flow over the whole map) is `XAR(entity="image")` and has no file of
its own: with one group nothing of xAR's block-causal mask, cache or order is left.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.ecar import ECARConfig
from genlab.generators.mar import MARConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset
from .continuous import over_kl_vae, xar_cell_emoji64

# -- xAR over other entities than cells ---------------------------------------------------------------------


def _xar_emoji64(name: str, **change: Any) -> TrainConfig:
    """`xar-cell-emoji64`, narrower, with another entity."""
    return over_kl_vae(name, dataclasses.replace(xar_cell_emoji64(name).model, dim=192, **change))


@preset("xar-patch-emoji64")
def xar_patch_emoji64(name: str) -> TrainConfig:
    """Token by token: 64 groups."""
    return _xar_emoji64(name, entity="patch")


@preset("xar-subsample-emoji64")
def xar_subsample_emoji64(name: str) -> TrainConfig:
    """Four groups of 16 tokens, every other one in each direction."""
    return _xar_emoji64(name, entity="subsample", size=2)


@preset("xar-scale-emoji64")
def xar_scale_emoji64(name: str) -> TrainConfig:
    """Four maps, 1x1 to 8x8: 85 tokens in all."""
    return _xar_emoji64(name, entity="scale", scales=(1, 2, 4, 8))


@preset("xar-text-emoji64")
def xar_text_emoji64(name: str) -> TrainConfig:
    """Cells by caption, 4.3M parameters; the default text encoder, 16 word pieces."""
    return _xar_emoji64(name, condition="text", text_dim=384, text_length=16)


# -- ECAR against one flow ------------------------------------------------------------------------------------


@preset("ecar-emoji64")
def ecar_emoji64(name: str) -> TrainConfig:
    """Three stages (2x2, 4x4, 8x8 tokens), 4.2M parameters, half of the blocks once a stage."""
    return over_kl_vae(
        name,
        ECARConfig(
            grid=(8, 8),
            channels=16,
            num_classes=10,
            sides=(2, 4, 8),
            dim=192,
            context_depth=3,
            flow_depth=3,
            heads=4,
            dropout=0.0,
            method="heun",
            steps=(4, 3, 2),
        ),
    )


@preset("flow-emoji64")
def flow_emoji64(name: str) -> TrainConfig:
    """ECAR's baseline: the single-stage flow transformer of equal size (4.2M)."""
    return _xar_emoji64(name, entity="image")


@preset("ecar-pixels-emoji64")
def ecar_pixels_emoji64(name: str) -> TrainConfig:
    """ECAR on raw pixels, 8x8 patches of 8x8 (`pixels-p8-emoji64` makes the tokens)."""
    run = ecar_emoji64(name)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, channels=192), tokenizer="pixels-p8-emoji64")


# -- MAR --------------------------------------------------------------------------------------------------------

_TINY_MAR = MARConfig(
    grid=(8, 8),
    channels=16,
    num_classes=10,
    dim=192,
    encoder_depth=3,
    decoder_depth=3,
    heads=4,
    buffer=4,
    head_width=192,
    head_depth=3,
    head_steps=25,
    head_repeats=2,
    head_clip=6.0,
    dropout=0.0,
)


@preset("mar-masked-emoji64")
def mar_masked_emoji64(name: str) -> TrainConfig:
    """The published order, tiny."""
    return over_kl_vae(name, _TINY_MAR)


@preset("mar-target-emoji64")
def mar_target_emoji64(name: str) -> TrainConfig:
    """Raster order with a cache: the target of continuous speculative decoding."""
    return over_kl_vae(name, dataclasses.replace(_TINY_MAR, order="raster"))


@preset("mar-draft-emoji64")
def mar_draft_emoji64(name: str) -> TrainConfig:
    """The target's draft, an eighth of its size."""
    small = dataclasses.replace(
        _TINY_MAR, order="raster", dim=96, encoder_depth=1, decoder_depth=1, heads=2, head_width=96, head_depth=2
    )
    return over_kl_vae(name, small, cpu_minutes=5)


@preset("mar-draft-distilled-emoji64")
def mar_draft_distilled_emoji64(name: str) -> TrainConfig:
    """`mar-draft-emoji64`, taught what `mar-target-emoji64` does: more of its steps are accepted."""
    run = mar_draft_emoji64(name)
    optim = dataclasses.replace(run.optim, lr=5e-4)
    return dataclasses.replace(
        run, init="mar-draft-emoji64", teacher="mar-target-emoji64", optim=optim, precision="fp32", cpu_minutes=20
    )


def _mar_in256(name: str, dim: int, depth: int, heads: int, head_depth: int, head_width: int) -> TrainConfig:
    return run_config(
        name=name,
        model=MARConfig(
            dim=dim, encoder_depth=depth, decoder_depth=depth, heads=heads, head_depth=head_depth, head_width=head_width
        ),
        tokenizer="kl16-in256",
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(
            lr=8e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup=128_116_700, schedule="constant", clip=3.0
        ),
        images=800 * 1_281_167,
        batch_size=2048,
        ema=0.9999,
    )


@preset("mar-b-in256")
def mar_b_in256(name: str) -> TrainConfig:
    """The paper's base model (208M): ImageNet 256x256, 800 epochs; `imagenet` is your image folder."""
    return _mar_in256(name, 768, 12, 12, 6, 1024)


@preset("mar-l-in256")
def mar_l_in256(name: str) -> TrainConfig:
    """The paper's large model (478M)."""
    return _mar_in256(name, 1024, 16, 16, 8, 1280)


@preset("mar-h-in256")
def mar_h_in256(name: str) -> TrainConfig:
    """The paper's huge model (943M)."""
    return _mar_in256(name, 1280, 20, 16, 12, 1536)
