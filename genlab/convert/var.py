"""VAR's var_d*.pth (a bare state dict) to `VAR`; the codebook comes from vae_ch160v4096z32.pth."""

from __future__ import annotations

import re
from typing import Any

import torch

from genlab.generators.var import VAR, VARConfig
from genlab.hub import load_strict

from .keys import count, need

SCALES = {680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
"""Positions of the published models at 256 and 512 pixels -> sides of their maps."""
_RENAMED = {
    "attn.scale_mul_1H11": "scale",
    "attn.mat_qkv.weight": "qkv.weight",
    "attn.q_bias": "q_bias",
    "attn.v_bias": "v_bias",
    "ada_gss": "ada_offset",
    "pos_1LC": "pos",
    "lvl_embed.weight": "scale_emb.weight",
}
_PREFIXES = {"attn.proj.": "proj.", "ffn.": "", "ada_lin.1.": "ada_lin.", "head_nm.ada_lin.1.": "head_ada_lin."}
_PREFIXES |= {"shared_ada_lin.1.": "shared_ada_lin."}
_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")


def convert_var(
    state: dict[str, torch.Tensor],
    *,
    vae: dict[str, torch.Tensor] | None = None,
    heads: int | None = None,
    scales: tuple[int, ...] | None = None,
) -> VAR:
    """A `VAR` with these weights.

    Args:
        state: official names and tensors.
        vae: the tokenizer's, for the codebook; without it the model gives logits but can't draw until `adopt`.
        heads: attention heads; None takes the shapes', or, for models without l2 attention, width / 64.
        scales: side of each map; None takes the `lvl_1L` buffer's, or the published models' of that length.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named, or scales that can't be told.
    """
    dim, code_dim = need(state, "word_embed.weight").shape
    length = need(state, "pos_1LC").shape[1]
    if scales is None and "lvl_1L" in state:
        scales = tuple(round(n**0.5) for n in state["lvl_1L"].flatten().bincount().tolist())
    elif scales is None and length not in SCALES:
        raise ValueError(f"{length} positions are no published VAR's ({', '.join(map(str, SCALES))}): give scales=")
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    sizes: dict[str, Any] = {}
    if vae is not None:
        sizes["phis"] = count(vae, r"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)") or int(
            any(k.startswith("quantize.quant_resi.qresi.") for k in vae)
        )
    model = VAR(
        VARConfig(
            scales=scales or SCALES[length],
            vocab=need(state, "head.weight").shape[0],
            code_dim=code_dim,
            num_classes=need(state, "class_emb.weight").shape[0] - 1,
            dim=dim,
            depth=count(state, r"blocks\.(\d+)"),
            heads=heads or (dim // 64 if scale_mul is None else scale_mul.shape[1]),
            mlp_ratio=need(state, "blocks.0.ffn.fc1.weight").shape[0] / dim,
            l2_attention=scale_mul is not None,
            shared_modulation="shared_ada_lin.1.weight" in state,
            **sizes,
        )
    )
    ours = {f"codes.{name}": value for name, value in model.codes.state_dict().items()}
    for name, value in state.items():
        if _BUFFERS.fullmatch(name):
            continue
        block, rest = m.groups() if (m := re.match(r"(blocks\.\d+\.)(.*)", name)) else ("", name)
        for old, new in _PREFIXES.items():
            if rest.startswith(old):
                rest = new + rest.removeprefix(old)
        rest = _RENAMED.get(rest, rest)
        if rest in ("scale", "ada_offset"):
            value = value.flatten()
        elif rest in ("pos", "pos_start"):
            value = value[0]
        ours[block + rest] = value
    for name, value in (vae or {}).items():
        if name == "quantize.embedding.weight":
            ours["codes.codebook"] = value
        elif m := re.fullmatch(r"quantize\.quant_resi\.(?:qresi_ls\.)?(qresi|\d+)\.(weight|bias)", name):
            ours[f"codes.phis.{0 if m[1] == 'qresi' else m[1]}.{m[2]}"] = value
    load_strict(model, ours, where="the VAR checkpoint")
    return model.eval()
