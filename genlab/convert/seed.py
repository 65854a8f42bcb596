"""SEED's `seed_quantizer.pt` to `SEED`, every key accounted for.

The released loader always builds the variant with narrow layers and loads what fits; the file decides here: a second
Q-Former or narrow layers, its width, and whether the blocks that restore the embeddings are in it.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from genlab.hub import load_strict
from tokenizers_img.seed import SEED, SEEDConfig

from .keys import count, need

State = dict[str, torch.Tensor]
UNCLIP = "stabilityai/stable-diffusion-2-1-unclip"
# the Q-Former's text half, and its table of positions, which pictures never pass
_TEXT = re.compile(
    r"bert\.embeddings\.(position_ids|word_embeddings|position_embeddings)|cls\.|"
    r"bert\.encoder\.layer\.\d+\.(intermediate|output)\."
)
_PARTS = {
    "attention.self.": "attention.", "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention.norm", "crossattention.self.": "cross.",
    "crossattention.output.dense": "cross.out", "crossattention.output.LayerNorm": "cross.norm",
    "intermediate_query.dense": "fc1", "output_query.dense": "fc2", "output_query.LayerNorm": "norm",
}  # fmt: skip
_BLOCK = {
    "attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
    "attn.proj.": "self_attn.out_proj.", "mlp.fc1.": "linear1.", "mlp.fc2.": "linear2.",
}  # fmt: skip
_TOP = {
    "visual_encoder.": "encoder.net.", "ln_vision.": "norm.", "quantize.embedding.weight": "codebook",
    "encode_task_layer.": "down.", "decode_task_layer.": "up.", "image_down.": "reverse.",
    "distill_image_proj.": "to_target.",
}  # fmt: skip


def qformer(state: State, tokens: torch.Tensor) -> State:
    """Names below `Qformer.` to those of our `QFormer`, and its queries, (1, N, D)."""
    ours: State = {"queries": tokens.squeeze(0)}
    for key, value in state.items():
        if _TEXT.match(key):
            continue
        layer = re.match(r"bert\.encoder\.layer\.(\d+)\.(.+)$", key)
        if layer:
            rest = layer[2]
            old = next((old for old in _PARTS if rest.startswith(old)), "")
            ours[f"layers.{layer[1]}.{_PARTS.get(old, '')}{rest.removeprefix(old)}"] = value
        else:
            ours[key.replace("bert.embeddings.LayerNorm.", "norm.")] = value
    return ours


def qformer_sizes(state: State, tokens: torch.Tensor) -> dict[str, Any]:
    """What the shapes below `Qformer.` tell of `QFormer`'s arguments; heads have 64 channels, as BERT's."""
    dim = tokens.shape[-1]
    first = "bert.encoder.layer."
    crossing = [
        int(m[1])
        for k in state
        if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.crossattention\.self\.key\.weight", k))
    ]
    depth = count(state, r"bert\.encoder\.layer\.(\d+)")
    crossing.sort()
    return {
        "dim": dim,
        "depth": depth,
        "heads": max(1, dim // 64),
        "hidden": need(state, f"{first}0.intermediate_query.dense.weight").shape[0],
        "cross_every": crossing[1] - crossing[0] if len(crossing) > 1 else max(2, depth),
    }


def below(state: State, prefix: str) -> State:
    """What stands below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def convert_seed(state: State, *, image_size: int = 768) -> SEED:
    """A `SEED` with these weights, its image encoder among them.

    Args:
        state: official names and tensors.
        image_size: side of the images it takes and its pipeline draws.

    Raises:
        ValueError: for missing or unexpected keys.
    """
    queries, codebook = need(state, "query_tokens"), need(state, "quantize.embedding.weight")
    patch, table = need(state, "visual_encoder.patch_embed.proj.weight"), need(state, "visual_encoder.pos_embed")
    target = need(state, "distill_image_proj.weight")
    second = "reverse_tokens" in state
    if not second and "image_down.0.weight" not in state:
        raise ValueError("the file holds neither a second Q-Former (reverse_tokens) nor narrow layers (image_down)")
    text = second and need(state, "reverse_tokens").shape[1] > 1
    side = round((table.shape[1] - 1) ** 0.5) * patch.shape[-1]
    encoder_args: dict[str, Any] = {"depth": count(state, r"visual_encoder\.blocks\.(\d+)")}
    width = patch.shape[0]
    if width != 1408:
        hidden = need(state, "visual_encoder.blocks.0.mlp.fc1.weight").shape[0]
        encoder_args |= {"embed_dim": width, "num_heads": max(1, width // 88), "mlp_ratio": hidden / width}
    if side != 224 or patch.shape[-1] != 14:
        encoder_args |= {"img_size": side, "patch_size": patch.shape[-1]}
    model = SEED(
        SEEDConfig(
            image_size=image_size,
            encoder_args=encoder_args,
            encoder_size=side,
            encoder_dim=width,
            encoder_saved=True,
            queries=queries.shape[1],
            **qformer_sizes(below(state, "Qformer."), queries),
            contrastive_dim=0,
            codes=len(codebook),
            code_dim=codebook.shape[1],
            blocks=count(state, r"blocks_image\.(\d+)"),
            restores="pos_embed" in state,
            target="sd_text77" if text else "unclip",
            target_dim=target.shape[0],
            target_tokens=state["reverse_tokens"].shape[1] if text else 77,
            reverse="qformer" if second else "down",
            diffusion=UNCLIP if not text and target.shape[0] == 1024 else "",
            stage="codes",
        )
    )
    ours = {f"qformer.{k}": v for k, v in qformer(below(state, "Qformer."), queries).items()}
    if second:
        inner = qformer(below(state, "Reverse_Qformer."), state["reverse_tokens"])
        ours |= {f"reverse.{k}": v for k, v in inner.items()}
    for key, value in state.items():
        if key.startswith(("Qformer.", "Reverse_Qformer.")) or key in ("query_tokens", "reverse_tokens"):
            continue
        if block := re.match(r"blocks(_image)?\.(\d+)\.(.+)$", key):
            rest = block[3]
            for old, new in _BLOCK.items():
                rest = rest.replace(old, new)
            ours[f"{'target_blocks' if block[1] else 'blocks'}.layers.{block[2]}.{rest}"] = value
        elif position := re.match(r"pos_embed(_image)?$", key):
            ours["target_positions" if position[1] else "positions"] = value.squeeze(0)
        else:
            old = next((old for old in _TOP if key.startswith(old)), "")
            ours[_TOP.get(old, "") + key.removeprefix(old)] = value
    load_strict(model, {k: v.float() for k, v in ours.items()}, where="seed_quantizer.pt")
    return model.eval()
