"""Apple and EPFL's FlexTok tokenizers and their autoencoders (safetensors) to `FlexTok` and `KLVAE`.

`flextok_{d12_d12,d18_d18,d18_d28}_{in1k,dfn}` and `flextok_vae_{c4,c8,c16}`. What no shape tells (the latents' scale)
is read from the file's own metadata or the config.json beside it.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from genlab.hub import load_strict
from tokenizers_img.flextok import FlexTok, FlexTokConfig
from tokenizers_img.kl_vae import KLVAE, KLVAEConfig

from .keys import count, need

_TOP = {
    "encoder.enc_patch_emb.patch_proj": "encoder.patch_in",
    "encoder.enc_register_module.registers": "encoder.registers",
    "encoder.enc_to_latents.proj": "encoder.out",
    "decoder.dec_from_latents.proj": "decoder.codes_in",
    "decoder.dec_registers_posemb_module.posembs": "decoder.register_positions",
    "decoder.dec_nested_dropout.dropout_mask_token": "decoder.absent",
    "decoder.dec_latent_dropout.nullcond": "decoder.null",
    "decoder.dec_noise_patch_emb.patch_proj": "decoder.patch_in",
    "decoder.dec_time_embedder.mlp": "decoder.time.mlp",
    "decoder.dec_to_patches.proj": "decoder.patch_out",
    "decoder.dec_to_patches.adaLN_modulation.1": "decoder.ada_out",
}
_BLOCK = {"attn.proj": "proj", "mlp.fc1": "mlp.fc1_g", "mlp.fc3": "mlp.fc1_x", "mlp.fc2": "mlp.fc2"}
_BLOCK |= {"adaLN_modulation.1": "ada"}
# the fixed sines of patches, and what only training needs
_DROPPED = ("enc_posemb_module.", "dec_patches_posemb_module.", "dec_repa_")


def vae_config(state: dict[str, torch.Tensor], *, image_size: int, norm_groups: int) -> KLVAEConfig:
    """What the shapes of a diffusers `AutoencoderKL` tell, names from `encoder.conv_in` on."""
    levels = count(state, r"encoder\.down_blocks\.(\d+)")
    first = [f"encoder.down_blocks.{i}." for i in range(levels)]
    return KLVAEConfig(
        image_size=image_size,
        channels=tuple(need(state, f"{name}resnets.0.conv2.weight").shape[0] for name in first),
        layers=count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)"),
        latent_channels=need(state, "post_quant_conv.weight").shape[0],
        norm_groups=norm_groups,
        attention_levels=tuple(i for i, name in enumerate(first) if f"{name}attentions.0.to_q.weight" in state),
        kl_weight=1e-6,
    )


def vae_weights(state: dict[str, torch.Tensor], channels: int, scaling_factor: float) -> dict[str, torch.Tensor]:
    """A `KLVAE`'s state dict; the published latents are multiplied by `scaling_factor`."""
    scale = {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1 / scaling_factor)}
    return scale | {f"vae.{k}": v for k, v in state.items()}


def convert_flextok_vae(
    state: dict[str, torch.Tensor],
    *,
    image_size: int = 256,
    norm_groups: int = 32,
    scaling_factor: float | None = None,
    source: Path | None = None,
) -> KLVAE:
    """A `KLVAE` with these weights.

    Args:
        state: official names and tensors, behind any number of `vae.`.
        image_size: side of the images it is to take.
        norm_groups: of its group normalisations.
        scaling_factor: what its latents are multiplied by; None looks into the metadata at `source`.
        source: the checkpoint file.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named, or an unknown scaling factor.
    """
    while state and all(k.startswith("vae.") for k in state):
        state = {k.removeprefix("vae."): v for k, v in state.items()}
    model = KLVAE(vae_config(state, image_size=image_size, norm_groups=norm_groups))
    factor = scaling_factor or find_number(source, "scaling_factor")
    ours = vae_weights(state, model.config.latent_channels, factor)
    load_strict(model, ours, where="the FlexTok autoencoder checkpoint")
    return model.eval()


def convert_flextok(
    state: dict[str, torch.Tensor],
    *,
    image_size: int | None = None,
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
    head_dim: int = 64,
    norm_groups: int = 32,
    scaling_factor: float | None = None,
    source: Path | None = None,
) -> FlexTok:
    """A `FlexTok` with these weights.

    Args:
        state: official names and tensors.
        image_size: side of the images; None: as the table of positions says, or 256 where there is none.
        levels: of the FSQ, which has no weights.
        head_dim: channels of an attention head.
        norm_groups, scaling_factor, source: of the autoencoder, as in `convert_flextok_vae`.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named, or levels of another number than the
            checkpoint's.
    """
    state = {k.replace(".module_dict.", "."): v for k, v in state.items()}
    vae = {k.removeprefix("vae.vae."): v for k, v in state.items() if k.startswith("vae.")}
    registers = need(state, "encoder.enc_register_module.registers").squeeze()
    width, in_patch = need(state, "decoder.dec_noise_patch_emb.patch_proj.weight").shape
    C = need(vae, "post_quant_conv.weight").shape[0]
    patch = math.isqrt(in_patch // C)
    codes = need(state, "encoder.enc_to_latents.proj.weight").shape[0]
    if len(levels) != codes:
        raise ValueError(f"the checkpoint's codes have {codes} channels, levels {levels} are {len(levels)}")
    if image_size is None:
        table = state.get("encoder.enc_posemb_module.posembs")
        side = math.isqrt(table.numel() // registers.shape[-1]) if table is not None else 0
        image_size = side * patch * 2 ** (count(vae, r"encoder\.down_blocks\.(\d+)") - 1) or 256
    ada = need(state, "decoder.dec_transformer.blocks.0.adaLN_modulation.1.weight").shape[0]
    kinds: Any = ada // (6 * width)
    model = FlexTok(
        FlexTokConfig(
            vae=vae_config(vae, image_size=image_size, norm_groups=norm_groups),
            registers=len(registers),
            levels=levels,
            patch=patch,
            encoder_dim=registers.shape[-1],
            encoder_depth=count(state, r"encoder\.enc_transformer\.blocks\.(\d+)"),
            decoder_dim=width,
            decoder_depth=count(state, r"decoder\.dec_transformer\.blocks\.(\d+)"),
            head_dim=head_dim,
            kinds=kinds,
            learned_null="decoder.dec_latent_dropout.nullcond" in state,
        )
    )
    factor = scaling_factor or find_number(source, "scaling_factor")
    ours = {f"vae.{k}": v for k, v in vae_weights(vae, C, factor).items()}
    for name, value in state.items():
        if name.startswith("vae.") or any(name.split(".", 1)[1].startswith(d) for d in _DROPPED):
            continue
        name = _rename(name)
        if name == "encoder.registers":
            value = registers
        elif name == "decoder.register_positions":  # (1, 1, width, registers)
            value = value.reshape(width, -1).T
        elif name.endswith((".null", ".absent")):
            value = value.flatten()
        ours[name] = value
    for name in [k for k in ours if k.endswith(".wq.weight")]:
        parts = [need(ours, name.replace(".wq.", f".w{x}.")) for x in "qkv"]
        ours[name.replace("attn.wq", "qkv")] = torch.cat(parts)
        for x in "qkv":
            del ours[name.replace(".wq.", f".w{x}.")]
    load_strict(model, ours, where="the FlexTok checkpoint")
    return model.eval()


def _rename(name: str) -> str:
    """An official parameter's name in ours; unknown names stay as they are."""
    block = re.match(r"(encoder|decoder)\.(?:enc|dec)_transformer\.blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
    if block:
        return f"{block[1]}.blocks.{block[2]}.{_BLOCK.get(block[3], block[3])}.{block[4]}"
    for old, new in _TOP.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def find_number(source: Path | None, name: str) -> float:
    """A number out of the safetensors' metadata or the config.json beside it, wherever it stands in there.

    Raises:
        ValueError: if it is in neither.
    """
    texts = []
    if source is not None and source.is_file():
        from safetensors import safe_open

        with safe_open(str(source), "pt") as file:
            texts += list((file.metadata() or {}).values())
        beside = source.with_name("config.json")
        texts += [beside.read_text()] if beside.is_file() else []
    for text in texts:
        # JSON or YAML; nothing that the text names is imported or run
        if found := re.search(rf"""["']?{name}["']?\s*[:=]\s*([0-9.eE+-]+)""", text):
            return float(json.loads(found[1]))
    raise ValueError(
        f"the checkpoint doesn't say its {name}: keep config.json beside the file, or give --{name.replace('_', '-')}"
    )
