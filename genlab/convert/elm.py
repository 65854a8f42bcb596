"""ELM's gpt/{L,XL,XXL,2B}-k-d.pth to `ELM`, gpt/mlm{L,XL,XXL}-1-16.pth to `ELMMasked` (bare state dicts)."""

from __future__ import annotations

import math
from typing import Any

import torch

from genlab.generators.elm import ELM, ELMConfig, ELMMasked, ELMMaskedConfig
from genlab.hub import load_strict

from .keys import count, need
from .llamagen import heads_of, rename

_TOP = {"cls_embedding.embedding_table.weight": "cls_embedding.weight", "norm.weight": "gpt.norm.weight"}
_TOP |= {"tok_embedder.weight": "tok_embeddings.0.weight", "output.weight": "output.0.weight"}
_TOP |= {"mlm_layer.fc.weight": "fc.weight", "mlm_layer.fc.bias": "fc.bias"}
_TOP |= {"mlm_layer.ln.weight": "ln.weight", "mlm_layer.ln.bias": "ln.bias", "mlm_layer.bias": "bias"}


def bits_of(vocab: int) -> int:
    """Bits d of a vocabulary of 2^d.

    Raises:
        ValueError: if it is no power of two.
    """
    if vocab < 2 or vocab & (vocab - 1):
        raise ValueError(f"a vocabulary of {vocab} is no power of two: not an ELM of this kind")
    return vocab.bit_length() - 1


def convert_elm(
    state: dict[str, torch.Tensor], *, heads: int | None = None, grid: tuple[int, int] = (16, 16)
) -> ELM | ELMMasked:
    """An `ELM`, or an `ELMMasked` where the checkpoint has `mlm_layer`, with these weights.

    Args:
        state: official names and tensors.
        heads: attention heads, which no shape tells; None takes the published model of that width.
        grid: rows and columns, which a causal model's shapes don't tell.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    k = count(state, r"tok_embedder\.(\d+)") or 1
    rows, dim = need(state, "tok_embedder.weight" if k == 1 else "tok_embedder.0.weight").shape
    masked = "mlm_layer.fc.weight" in state
    if masked and "pos_embed.weight" in state:  # frozen and unused beside rotary positions, but as long as the map
        side = math.isqrt(len(state["pos_embed.weight"]))
        grid = (side, side)
    sizes: dict[str, Any] = {
        "grid": grid,
        "num_classes": need(state, "cls_embedding.embedding_table.weight").shape[0] - 1,
        "dim": dim,
        "depth": count(state, r"layers\.(\d+)"),
        "heads": heads_of(dim, heads),
        "hidden": need(state, "layers.0.feed_forward.w1.weight").shape[0],
        "sub_tokens": k,
        "bits": bits_of(rows - masked),
    }
    model: ELM | ELMMasked = ELMMasked(ELMMaskedConfig(**sizes)) if masked else ELM(ELMConfig(**sizes))
    ours = {}
    for name, value in state.items():
        if name == "freqs_cis" or (masked and name in ("pos_embed.weight", "output.weight")):
            continue  # the masked model's `output` is never used
        if name == "mlm_layer.bias":
            value = value.flatten()[None, : rows - 1]  # without the mask's own logit, which is cut off everywhere
        name = name.replace("tok_embedder.", "tok_embeddings.") if k > 1 else name
        ours[rename(name, _TOP)] = value
    load_strict(model, ours, where="the ELM checkpoint")
    return model.eval()
