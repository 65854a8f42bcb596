"""Recipes of the language models over discrete image tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from genlab.generators.seed_llama import SeedLlamaConfig

from ..config import DataConfig, OptimConfig, TrainConfig, run_config
from . import preset

# -- the embedded emoji, 64x64 pixels ------------------------------------------------------------------------------

PROMPTS = (
    "smiling face", "red heart", "woman: dark skin tone", "thumbs up: medium-light skin tone", "cat face", "tree",
    "red apple", "slice of pizza", "blue car", "house", "soccer ball", "trophy", "book", "light bulb", "hat", "clock",
    "right arrow", "no entry", "flag: France", "flag: Japan",
)  # fmt: skip
_LM: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "attention_dropout": 0.1,
    "attn_implementation": "eager",  # on CPUs the fused kernel's backward pass is a third slower at these lengths
    "bos_token_id": 0,
    "eos_token_id": 1,
}


_NOISY = {"code_noise": 0.3, "caption_drop": 0.1}
"""Noisy codes are read and not predicted, so that images without a caption have to come otherwise, for guidance."""


def _emoji64(name: str, tokenizer: str, minutes: float = 40, lr: float = 2e-3, **fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {"lm": _LM, "text_vocab": 2048, "text_length": 48, "dropout": 0.1, "visual_prefix": 0.25}
    return run_config(
        name=name,
        model=SeedLlamaConfig(**sizes | fields),
        tokenizer=tokenizer,
        prompts=PROMPTS[::2],
        data=DataConfig(flip=True),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.95), weight_decay=0.05, warmup=3_000),
        cpu_minutes=minutes,
        batch_size=16,
        ema=0.999,
        threads=1,
    )


@preset("seed_llama-emoji64")
def seed_llama_emoji64(name: str) -> TrainConfig:
    """Over SEED's 32 causal codes."""
    return _emoji64(name, "seed-emoji64", grid=(32,), vocab=1024, neighbours=24, **_NOISY)


@preset("seed_llama-things-emoji64")
def seed_llama_things_emoji64(name: str) -> TrainConfig:
    """The first, trained on with things as often as people, of whom three images of five are."""
    run = seed_llama_emoji64(name)
    return dataclasses.replace(
        run, init="runs/seed_llama-emoji64/model", cpu_minutes=22, data=DataConfig(flip=True, balance=0.75),
        optim=dataclasses.replace(run.optim, lr=1e-3),
    )  # fmt: skip


@preset("seed_llama-vq-emoji64")
def seed_llama_vq_emoji64(name: str) -> TrainConfig:
    """The same LM, budget and data over 256 codes in raster order, to compare: not shipped."""
    return _emoji64(name, "vq-f4-emoji64", grid=(16, 16), order="raster", vocab=1024, **_NOISY)


@preset("seed_llama-chat-emoji64")
def seed_llama_chat_emoji64(name: str) -> TrainConfig:
    """The first, tuned by LoRA to be asked in a chat, and to see up to three pictures in one."""
    return _emoji64(
        name, "seed-emoji64", 8, 5e-4, grid=(32,), vocab=1024, base="seed_llama-emoji64", lora_rank=16, chat=1.0,
        interleave=3, text_length=64,
    )  # fmt: skip


# -- the published 8B; `captions` is your set of images with captions ---------------------------------------------


def _published(name: str, steps: int, batch: int, lr: float, **fields: Any) -> TrainConfig:
    """Vicuna under LoRA, with the published tokenizer converted to `seed-tokenizer-2`; GPUs are yours to choose."""
    return run_config(
        name=name,
        model=SeedLlamaConfig(lora_rank=16, **fields),
        tokenizer="seed-tokenizer-2",
        data=DataConfig(source="captions"),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.95), weight_decay=0.05, warmup=steps * batch * 3 // 100, final_lr=0.05),
        images=steps * batch,
        batch_size=batch,
    )


@preset("seed_llama-8b-pretrain")
def seed_llama_8b_pretrain(name: str) -> TrainConfig:
    """SEED-LLaMA-8B, pre-training."""
    return _published(name, 30_000, 512, 1.5e-4, base="lmsys/vicuna-7b-v1.1", interleave=4)


@preset("seed_llama-8b-sft")
def seed_llama_8b_sft(name: str) -> TrainConfig:
    """SEED-LLaMA-8B, instruction tuning of the pre-trained one."""
    return _published(name, 50_000, 512, 1e-4, base="seed_llama-8b-pretrain", chat=1.0)
