"""xAR-{B,L,H}.pth (a bare state dict) to `XAR`: 8x8 cells."""

from __future__ import annotations

import math

import torch

from genlab.generators.xar import XAR, XARConfig
from genlab.hub import load_strict

from .keys import count, need

PUBLISHED = {768: (12, 2.7, 40), 1024: (16, 2.3, 50), 1280: (16, 2.2, 50)}
"""By width: attention heads, guidance and steps a cell of xAR-B, L and H."""
_RENAMED = {".attn.qkv.": ".qkv.", ".attn.proj.": ".proj.", ".ada_lin.1.": ".ada_lin."}
_BUFFERS = ("mask", "rope.freqs", "rope.freqs_cos", "rope.freqs_sin")


def convert_xar(state: dict[str, torch.Tensor], *, heads: int | None = None) -> XAR:
    """An `XAR` with these weights.

    Args:
        state: official names and tensors.
        heads: attention heads, which no shape tells; None takes the published model of that width.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    pos, z_proj = need(state, "encoder_pos_embed_learned"), need(state, "z_proj.weight")
    side, dim = math.isqrt(pos.shape[1]), z_proj.shape[0]
    if heads is None and dim not in PUBLISHED:
        raise ValueError(f"width {dim} is no published xAR's ({', '.join(map(str, PUBLISHED))}): give heads=")
    known_heads, guidance, steps = PUBLISHED.get(dim, (0, XARConfig.guidance, XARConfig.steps))
    model = XAR(
        XARConfig(
            grid=(side, side),
            channels=z_proj.shape[1],
            num_classes=need(state, "class_emb.weight").shape[0] - 1,
            size=side // 2,
            dim=dim,
            encoder_depth=count(state, r"encoder_blocks\.(\d+)"),
            decoder_depth=count(state, r"decoder_blocks\.(\d+)"),
            heads=heads or known_heads,
            guidance=guidance,
            steps=steps,
        )
    )
    ours = {}
    for name, value in state.items():
        if name.endswith(_BUFFERS):
            continue
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if name.endswith("_pos_embed_learned"):
            name, value = name.removesuffix("_embed_learned"), value[0]
        ours[name] = value
    load_strict(model, ours, where="the xAR checkpoint")
    return model.eval()
