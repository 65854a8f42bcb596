"""MAR's checkpoint-last.pth (key `model_ema`) to `MAR`, masked order."""

from __future__ import annotations

import math

import torch

from genlab.generators.mar import MAR, MARConfig
from genlab.hub import load_strict

from .keys import count, need

PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 16}
_RENAMED = {
    ".attn.": ".",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
    "diffloss.net.final_layer.adaLN_modulation.1.": "head.final_ada_lin.",
    "diffloss.net.final_layer.linear.": "head.final.",
    "diffloss.net.res_blocks.": "head.blocks.",
    "diffloss.net.": "head.",
    ".in_ln.": ".norm.",
    ".adaLN_modulation.1.": ".ada_lin.",
    "_pos_embed_learned": "_pos",
}


def convert_mar(
    state: dict[str, torch.Tensor], *, heads: int | None = None, grid: tuple[int, int] | None = None
) -> MAR:
    """A `MAR` with these weights.

    Args:
        state: official names and tensors.
        heads: attention heads, which no shape tells; None takes the published model of that width.
        grid: rows and columns of the token map; None: a square.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    z_proj, table = need(state, "z_proj.weight"), need(state, "class_emb.weight")
    length, dim = need(state, "diffusion_pos_embed_learned").shape[-2], z_proj.shape[0]
    if heads is None and dim not in PUBLISHED_HEADS:
        raise ValueError(f"width {dim} is no published MAR's ({', '.join(map(str, PUBLISHED_HEADS))}): give heads=")
    side = math.isqrt(length)
    grid = grid or (side, side)
    if math.prod(grid) != length:
        raise ValueError(f"the checkpoint has {length} positions, no {grid[0]}x{grid[1]} map: give grid=")
    model = MAR(
        MARConfig(
            grid=grid,
            channels=z_proj.shape[1],
            num_classes=table.shape[0],
            dim=dim,
            encoder_depth=count(state, r"encoder_blocks\.(\d+)"),
            decoder_depth=count(state, r"decoder_blocks\.(\d+)"),
            heads=heads or PUBLISHED_HEADS[dim],
            buffer=need(state, "encoder_pos_embed_learned").shape[-2] - length,
            head_width=need(state, "diffloss.net.input_proj.weight").shape[0],
            head_depth=count(state, r"diffloss\.net\.res_blocks\.(\d+)"),
        )
    )
    ours = {"class_emb.weight": torch.cat([table, need(state, "fake_latent").to(table)])}
    for name, value in state.items():
        if name in ("class_emb.weight", "fake_latent"):
            continue
        own = name
        for old, new in _RENAMED.items():
            own = own.replace(old, new)
        if own == "mask_token" or own.endswith("_pos"):
            value = value.squeeze(0)
        ours[own] = value.squeeze(0) if own == "mask_token" else value
    load_strict(model, ours, where="the MAR checkpoint")
    return model.eval()
