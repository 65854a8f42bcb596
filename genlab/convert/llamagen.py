"""LlamaGen's c2i_*.pt and t2i_*.pt (key `model`, or bare from FSDP) to `LlamaGen`."""

from __future__ import annotations

from typing import Any

import torch

from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.hub import load_strict

from .keys import count, need

PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
_BLOCK = {
    "attention.wqkv": "wqkv",
    "attention.wo": "wo",
    "feed_forward.w1": "mlp.fc1_g",
    "feed_forward.w3": "mlp.fc1_x",
}
_BLOCK |= {"feed_forward.w2": "mlp.fc2", "attention_norm": "attention_norm", "ffn_norm": "ffn_norm"}
_TOP = {
    "cls_embedding.embedding_table.weight": "cls_embedding.weight",
    "cls_embedding.cap_proj.fc1.weight": "cls_embedding.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "cls_embedding.fc2.weight",
    "cls_embedding.uncond_embedding": "cls_embedding.uncond",
    "tok_embeddings.weight": "tok_embeddings.0.weight",
    "norm.weight": "gpt.norm.weight",
    "output.weight": "output.0.weight",
}


def heads_of(dim: int, heads: int | None) -> int:
    """The number of attention heads, which no shape tells.

    Raises:
        ValueError: for a width that is no published model's, without `heads`.
    """
    if heads is None and dim not in PUBLISHED_HEADS:
        raise ValueError(f"width {dim} is no published model's ({', '.join(map(str, PUBLISHED_HEADS))}): give heads=")
    return heads or PUBLISHED_HEADS[dim]


def rename(name: str, top: dict[str, str]) -> str:
    """An official parameter's name in `GPT` or around it; unknown names stay as they are."""
    if name.startswith("layers."):
        _, i, rest = name.split(".", 2)
        stem = rest.removesuffix(".weight")
        return f"gpt.layers.{i}.{_BLOCK.get(stem, stem)}.weight"
    return top.get(name, name)


def convert_llamagen(
    state: dict[str, torch.Tensor], *, heads: int | None = None, grid: tuple[int, int] = (16, 16)
) -> LlamaGen:
    """A `LlamaGen` with these weights; `cls_embedding` says whether by class or by text.

    Args:
        state: official names and tensors.
        heads: attention heads, which no shape tells; None takes the published model of that width.
        grid: rows and columns, which no shape tells either: (16, 16), or (24, 24) for c2i_*_384 and (32, 32) for
            t2i_XL_stage2_512.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    vocab, dim = need(state, "tok_embeddings.weight").shape
    sizes: dict[str, Any] = {}
    if "cls_embedding.uncond_embedding" in state:
        length, text_dim = state["cls_embedding.uncond_embedding"].shape
        sizes = {"condition": "text", "text_length": length, "text_dim": text_dim}
    else:
        sizes = {"num_classes": need(state, "cls_embedding.embedding_table.weight").shape[0] - 1}
    model = LlamaGen(
        LlamaGenConfig(
            grid=grid,
            vocab=vocab,
            dim=dim,
            depth=count(state, r"layers\.(\d+)"),
            heads=heads_of(dim, heads),
            hidden=need(state, "layers.0.feed_forward.w1.weight").shape[0],
            **sizes,
        )
    )
    ours = {rename(name, _TOP): value for name, value in state.items() if name != "freqs_cis"}
    load_strict(model, ours, where="the LlamaGen checkpoint")
    return model.eval()
