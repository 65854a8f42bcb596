"""Recipes of the discrete line's generators: LlamaGen, ELM, VAR."""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.elm import ELMConfig, ELMMaskedConfig
from genlab.generators.llamagen import LlamaGenConfig
from genlab.generators.var import VARConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset

# -- the embedded emoji, 64x64 pixels: 16x16 = 256 tokens -------------------------------------------------------

# With tens of CPU-minutes in float32, steps count for more than width: narrow models, small batches, a high rate.
_SMALL: dict[str, Any] = {"grid": (16, 16), "num_classes": 10, "dim": 128, "depth": 6, "heads": 4, "hidden": 352}
_DRAFT: dict[str, Any] = _SMALL | {"dim": 64, "depth": 2, "heads": 2, "hidden": 192}
_TEXT: dict[str, Any] = {"condition": "text", "text_dim": 384, "text_length": 16, "guidance": 1.5}
"""Small models bear little guidance: at the published 7.5 these draw confetti."""


_PROMPTS = ("a red apple", "cat face", "smiling face", "blue car", "tree", "red heart", "slice of pizza", "flag")


def _emoji64(name: str, tokenizer: str, model: Any, cpu_minutes: float = 32, images: int = 100_000) -> TrainConfig:
    return run_config(
        name=name,
        model=model,
        tokenizer=tokenizer,
        prompts=_PROMPTS if "text" in name else (),
        optim=OptimConfig(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=1_000),
        images=images,
        cpu_minutes=cpu_minutes,
        batch_size=8,
        ema=0.999,
        threads=1,
    )


def _again(first: TrainConfig, init: str, cpu_minutes: float, flip: bool = True) -> TrainConfig:
    """A recipe a second time, from what it made, at a lower rate; by default with mirrored pictures too."""
    optim = dataclasses.replace(first.optim, lr=2e-3)
    data = dataclasses.replace(first.data, flip=flip)
    return dataclasses.replace(first, init=init, data=data, optim=optim, cpu_minutes=cpu_minutes)


@preset("llamagen-emoji64")
def llamagen_emoji64(name: str) -> TrainConfig:
    """By class: the target of the speculative benches."""
    return _emoji64(name, "vq-f4-emoji64", LlamaGenConfig(vocab=1024, **_SMALL))


@preset("llamagen-more-emoji64")
def llamagen_more_emoji64(name: str) -> TrainConfig:
    """`llamagen-emoji64` a second time, longer and at a lower rate."""
    return _again(llamagen_emoji64(name), "llamagen-emoji64", 50, flip=False)


@preset("llamagen-draft-emoji64")
def llamagen_draft_emoji64(name: str) -> TrainConfig:
    """By class: a draft for `llamagen-emoji64`."""
    return _emoji64(name, "vq-f4-emoji64", LlamaGenConfig(vocab=1024, **_DRAFT), 8)


@preset("llamagen-text-emoji64")
def llamagen_text_emoji64(name: str) -> TrainConfig:
    """By caption (MiniLM's embeddings)."""
    return _emoji64(name, "vq-f4-emoji64", LlamaGenConfig(vocab=1024, **_SMALL, **_TEXT), 20)


@preset("llamagen-text-more-emoji64")
def llamagen_text_more_emoji64(name: str) -> TrainConfig:
    """`llamagen-text-emoji64` a second time, at a lower rate, with mirrored pictures too.

    Captions invite learning by heart.
    """
    return _again(llamagen_text_emoji64(name), "llamagen-text-emoji64", 25)


@preset("llamagen-text-draft-emoji64")
def llamagen_text_draft_emoji64(name: str) -> TrainConfig:
    """By caption: a draft for `llamagen-text-emoji64`."""
    return _emoji64(name, "vq-f4-emoji64", LlamaGenConfig(vocab=1024, **_DRAFT, **_TEXT), 4)


@preset("elm-2-6-emoji64")
def elm_2_6_emoji64(name: str) -> TrainConfig:
    """Two sub-tokens of six bits."""
    return _emoji64(name, "bae-f4-emoji64", ELMConfig(sub_tokens=2, bits=6, **_SMALL))


@preset("elm-2-6-more-emoji64")
def elm_2_6_more_emoji64(name: str) -> TrainConfig:
    """`elm-2-6-emoji64` a second time, longer and at a lower rate."""
    return _again(elm_2_6_emoji64(name), "elm-2-6-emoji64", 45, flip=False)


@preset("elm_masked-2-6-emoji64")
def elm_masked_2_6_emoji64(name: str) -> TrainConfig:
    """The masked variant of `elm-2-6-emoji64`."""
    return _emoji64(name, "bae-f4-emoji64", ELMMaskedConfig(sub_tokens=2, bits=6, **_SMALL))


@preset("var-emoji64")
def var_emoji64(name: str) -> TrainConfig:
    """Six scales up to 16x16."""
    scales = (1, 2, 3, 5, 8, 16)
    model = VARConfig(scales=scales, vocab=1024, code_dim=16, num_classes=10, dim=128, depth=6, heads=4)
    return _emoji64(name, "msvq-f4-emoji64", model, 25)


@preset("var-more-emoji64")
def var_more_emoji64(name: str) -> TrainConfig:
    """`var-emoji64` a second time, at a lower rate, with mirrored pictures too."""
    return _again(var_emoji64(name), "var-emoji64", 18)


# -- ImageNet at 256x256, the papers' sizes; `imagenet` is your image folder -----------------------------------------

_IMAGENET = 1_281_167


def _gpt_in256(name: str, model: Any, tokenizer: str, epochs: int) -> TrainConfig:
    """What LlamaGen and ELM share: AdamW 1e-4, constant, weight decay 0.05, batch 256."""
    return run_config(
        name=name,
        model=model,
        tokenizer=tokenizer,
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=0, schedule="constant"),
        images=epochs * _IMAGENET,
        batch_size=256,
        ema=0.9999,
    )


def _llamagen(name: str, dim: int, depth: int, heads: int) -> TrainConfig:
    return _gpt_in256(name, LlamaGenConfig(dim=dim, depth=depth, heads=heads), "vq-ds16-in256", 300)


@preset("llamagen-b-in256")
def llamagen_b_in256(name: str) -> TrainConfig:
    """LlamaGen-B (111M)."""
    return _llamagen(name, 768, 12, 12)


@preset("llamagen-l-in256")
def llamagen_l_in256(name: str) -> TrainConfig:
    """LlamaGen-L (343M)."""
    return _llamagen(name, 1024, 24, 16)


@preset("llamagen-xl-in256")
def llamagen_xl_in256(name: str) -> TrainConfig:
    """LlamaGen-XL (775M)."""
    return _llamagen(name, 1280, 36, 20)


@preset("llamagen-xxl-in256")
def llamagen_xxl_in256(name: str) -> TrainConfig:
    """LlamaGen-XXL (1.4B)."""
    return _llamagen(name, 1536, 48, 24)


@preset("llamagen-3b-in256")
def llamagen_3b_in256(name: str) -> TrainConfig:
    """LlamaGen-3B (3.1B)."""
    return _llamagen(name, 3200, 24, 32)


def _elm(name: str, dim: int, depth: int, heads: int, *, k: int = 2, d: int = 12, masked: bool = False) -> TrainConfig:
    sizes: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads, "sub_tokens": k, "bits": d}
    bae = f"bae-{k * d}-in256" if k == 2 else f"bae-{k}-{d}-in256"
    return _gpt_in256(name, ELMMaskedConfig(**sizes) if masked else ELMConfig(**sizes), bae, 400)


@preset("elm-l-2-10-in256")
def elm_l_2_10_in256(name: str) -> TrainConfig:
    """ELM-L, 2-10, of the official training script."""
    return _elm(name, 1024, 24, 16, d=10)


@preset("elm-l-2-12-in256")
def elm_l_2_12_in256(name: str) -> TrainConfig:
    """ELM-L, 2-12 (328M)."""
    return _elm(name, 1024, 24, 16)


@preset("elm-xl-2-12-in256")
def elm_xl_2_12_in256(name: str) -> TrainConfig:
    """ELM-XL, 2-12 (757M)."""
    return _elm(name, 1280, 36, 20)


@preset("elm-xxl-2-12-in256")
def elm_xxl_2_12_in256(name: str) -> TrainConfig:
    """ELM-XXL, 2-12 (1390M)."""
    return _elm(name, 1536, 48, 24)


@preset("elm-2b-2-12-in256")
def elm_2b_2_12_in256(name: str) -> TrainConfig:
    """ELM-2B, 2-12 (1909M)."""
    return _elm(name, 1792, 48, 28)


@preset("elm_masked-l-1-16-in256")
def elm_masked_l_1_16_in256(name: str) -> TrainConfig:
    """ELM's masked L, 1-16."""
    return _elm(name, 1024, 24, 16, k=1, d=16, masked=True)


@preset("elm_masked-xl-1-16-in256")
def elm_masked_xl_1_16_in256(name: str) -> TrainConfig:
    """ELM's masked XL, 1-16."""
    return _elm(name, 1280, 36, 20, k=1, d=16, masked=True)


@preset("elm_masked-xxl-1-16-in256")
def elm_masked_xxl_1_16_in256(name: str) -> TrainConfig:
    """ELM's masked XXL, 1-16."""
    return _elm(name, 1536, 48, 24, k=1, d=16, masked=True)


def _var(
    name: str, depth: int, epochs: int, *, lr: float, gate_start: float, final_lr: float, batch: int = 768
) -> TrainConfig:
    """The repository's rule: width 64 times the depth, heads as many as blocks; its decay is linear, ours a cosine."""
    model = VARConfig(dim=64 * depth, depth=depth, heads=depth, drop_path=depth / 240, gate_start=gate_start)
    return run_config(
        name=name,
        model=model,
        tokenizer="msvq-in256",
        data=DataConfig(source="imagenet", flip=True),
        optim=OptimConfig(
            lr=lr * batch / 256,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup=epochs * _IMAGENET // 50,
            final_lr=final_lr,
            clip=2.0,
        ),
        images=epochs * _IMAGENET,
        batch_size=batch,
        ema=0.9999,
    )


@preset("var-d16-in256")
def var_d16_in256(name: str) -> TrainConfig:
    """VAR-d16 (310M)."""
    return _var(name, 16, 200, lr=1e-4, gate_start=1e-3, final_lr=0.1)


@preset("var-d20-in256")
def var_d20_in256(name: str) -> TrainConfig:
    """VAR-d20 (600M)."""
    return _var(name, 20, 250, lr=1e-4, gate_start=1e-3, final_lr=0.1)


@preset("var-d24-in256")
def var_d24_in256(name: str) -> TrainConfig:
    """VAR-d24 (1.0B)."""
    return _var(name, 24, 350, lr=8e-5, gate_start=1e-4, final_lr=0.01)


@preset("var-d30-in256")
def var_d30_in256(name: str) -> TrainConfig:
    """VAR-d30 (2.0B)."""
    return _var(name, 30, 350, lr=8e-5, gate_start=1e-5, final_lr=0.01, batch=1024)
