"""Names and sizes of the VQGAN family's encoders and decoders, as diffusers calls them."""

from __future__ import annotations

import re
from typing import Any

import torch

from .keys import count, need

_RENAMED: list[tuple[str, Any]] = [
    (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.attn\.(\d+)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.attn\.(\d+)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def conv_sizes(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes tell of a `ConvConfig`, from the names of taming-transformers.

    Raises:
        ValueError: if the state dict isn't of that family.
    """
    levels = count(state, r"encoder\.down\.(\d+)")
    return {
        "channels": tuple(need(state, f"encoder.down.{i}.block.0.conv1.weight").shape[0] for i in range(levels)),
        "layers": count(state, r"encoder\.down\.0\.block\.(\d+)"),
        "decoder_layers": count(state, r"decoder\.up\.0\.block\.(\d+)"),
        "features": need(state, "encoder.conv_out.weight").shape[0],
        "attention_levels": tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state),
    }


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encoder and decoder (`encoder.…`, `decoder.…`) from the names of taming-transformers to diffusers'.

    There `decoder.up.0` is the finest level, here the coarsest. Convolutions of attention become linear layers,
    q, k and v in one become three.
    """
    levels = count(state, r"encoder\.down\.(\d+)")
    ours: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        if ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        if ".qkv." in name:
            ours |= {name.replace("qkv", f"to_{x}"): part for x, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            ours[name] = value
    return ours
