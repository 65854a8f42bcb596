"""How the release of Divot names its parameters: sub-state-dicts in the official layout to ours."""

from __future__ import annotations

import re

import torch

from .keys import need

State = dict[str, torch.Tensor]


def _qkv(ours: State, name: str, suffix: str, value: torch.Tensor) -> None:
    q, kv = value.split([value.shape[0] // 3, 2 * value.shape[0] // 3])
    ours[f"{name}.q.{suffix}"], ours[f"{name}.kv.{suffix}"] = q.clone(), kv.clone()


def temporal_encoder(state: State) -> State:
    """Names below `temporal_encoder.` to those of `TemporalEncoder`."""
    ours: State = {}
    for key, value in state.items():
        key = key.replace("ln_final.", "norm.")
        if key == "positional_embedding":
            ours["position"] = value
        elif block := re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", key):
            prefix, rest = f"blocks.{block[1]}.", block[2]
            if rest.startswith("attn.in_proj_"):
                _qkv(ours, prefix + "attn", rest.removeprefix("attn.in_proj_"), value)
                continue
            for old, new in (("attn.out_proj", "attn.proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
                rest = rest.replace(old, new)
            ours[prefix + rest.replace("ln_", "norm")] = value
        else:
            ours[key] = value
    return ours


def resampler(state: State) -> State:
    """Names of a Perceiver resampler to those of `Resampler`."""
    names = {
        "0.norm1": "norm1", "0.norm2": "norm2", "0.to_q": "attn.q", "0.to_kv": "attn.kv", "0.to_out": "attn.proj",
        "1.0": "norm3", "1.1": "fc1", "1.3": "fc2",
    }  # fmt: skip
    ours: State = {"latents": need(state, "latents").squeeze(0)}
    for key, value in state.items():
        if key == "latents":
            continue
        layer = re.match(r"(layers\.\d+\.)(.+)\.(weight|bias)$", key)
        ours[f"{layer[1]}{names.get(layer[2], layer[2])}.{layer[3]}" if layer else key] = value
    return ours


def spatial_temporal(state: State) -> State:
    """Names below the tokenizer's `image_proj_model.` to those of `SpatialTemporalResampler`."""
    below = "down_sampler."
    inner = resampler({k.removeprefix(below): v for k, v in state.items() if k.startswith(below)})
    ours: State = {f"resampler.{k}": v for k, v in inner.items()}
    for key, value in state.items():
        if key.startswith(below):
            continue
        if match := re.match(r"(blocks\.\d+\.attn)\.qkv\.(weight|bias)$", key):
            _qkv(ours, match[1], match[2], value)
            continue
        key = {"pos_embed_spatial": "space", "pos_embed_temporal": "time"}.get(key, key)
        ours[key.replace(".mlp.", ".")] = value
    return ours
