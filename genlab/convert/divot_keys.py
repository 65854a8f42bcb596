"""How the release of Divot names its parameters: sub-state-dicts in the official layout to ours."""

from __future__ import annotations

import re

import torch

from tokenizers_img.video_unet import VideoUNetConfig

from .keys import count, need

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


_UNET = {"input_blocks.0.0": "enter", "init_attn.0": "first", "out.0": "norm", "out.2": "leave"}
_UNET |= {f"time_embed.{i}": f"embed_t.mlp.{i}" for i in (0, 2)}
_UNET |= {f"fps_embedding.{i}": f"embed_stride.mlp.{i}" for i in (0, 2)}
_UNET_ATTENTION = (
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_k_ip", "k2"), ("to_v_ip", "v2"), ("to_out.0", "proj"),
)  # fmt: skip
_UNET_PART = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "skip", "op": "conv", "proj_in": "enter", "proj_out": "leave",
    "ff.net.0.proj": "fc1", "ff.net.2": "fc2",
} | {f"temopral_conv.conv{i}.0": f"over_time.norms.{i - 1}" for i in (1, 2, 3, 4)} | {
    f"temopral_conv.conv{i}.{2 if i == 1 else 3}": f"over_time.convs.{i - 1}" for i in (1, 2, 3, 4)
} | {
    f"attn{i}.{theirs}": f"attn{i}.{own}"
    for i in (1, 2)
    for theirs, own in _UNET_ATTENTION
}  # fmt: skip


def video_unet(state: State) -> State:
    """Names below `diffusion_model.` to those of `VideoUNet`; unknown ones stay as they are."""
    ours: State = {}
    for key, value in state.items():
        for theirs, own in _UNET.items():
            if key.startswith(theirs + "."):
                name = own + key[len(theirs) :]
                break
        else:
            name = re.sub(r"^input_blocks\.(\d+)", lambda m: f"down.{int(m[1]) - 1}", key)
            name = name.replace("middle_block.", "middle.").replace("output_blocks.", "up.")
        name = name.replace(".transformer_blocks.0.", ".")
        if part := re.match(r"(first|middle\.\d+|(?:down|up)\.\d+\.\d+)\.(.+)\.(weight|bias)$", name):
            name = f"{part[1]}.{_UNET_PART.get(part[2], part[2])}.{part[3]}"
            if part[2] in ("proj_in", "proj_out"):  # some are convolutions over one place
                value = value.flatten(1) if part[3] == "weight" else value
        ours[name] = value
    return ours


def video_unet_config(state: State, head_dim: int) -> VideoUNetConfig:
    """What the shapes tell of a U-Net, names below `diffusion_model.`; head_dim and the constants they don't."""
    channels = need(state, "input_blocks.0.0.weight").shape[0]
    widths: list[list[int]] = [[]]
    attention: set[int] = set()
    for i in range(1, count(state, r"input_blocks\.(\d+)")):
        if f"input_blocks.{i}.0.op.weight" in state:
            widths.append([])
            continue
        widths[-1].append(need(state, f"input_blocks.{i}.0.out_layers.3.weight").shape[0])
        if f"input_blocks.{i}.1.norm.weight" in state:
            attention.add(len(widths) - 1)
    return VideoUNetConfig(
        channels=channels,
        multipliers=tuple(level[0] // channels for level in widths),
        layers=len(widths[0]),
        attention_levels=tuple(sorted(attention)),
        head_dim=head_dim,
    )
