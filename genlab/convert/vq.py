"""LlamaGen's vq_ds{8,16}_{c2i,t2i}.pt (key `model`) to `VQ`."""

from __future__ import annotations

import re

import torch

from genlab.hub import load_strict
from tokenizers_img.vq import VQ, VQConfig

from .conv import conv_sizes, to_diffusers
from .keys import count, need

_RENAMED = {"quantize.embedding.weight": "codebook", "quant_conv.": "pre.", "post_quant_conv.": "post."}


def convert_vq(state: dict[str, torch.Tensor], *, image_size: int = 256) -> VQ:
    """A `VQ` with these weights.

    Args:
        state: official names and tensors.
        image_size: side of the images it is to take.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named.
    """
    last = count(state, r"decoder\.conv_blocks\.(\d+)") - 1

    def taming(name: str) -> str:
        name = re.sub(r"encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", name)
        name = re.sub(r"decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        name = name.replace(".res.", ".block.").replace(".mid.0.", ".mid.block_1.")
        return name.replace(".mid.1.", ".mid.attn_1.").replace(".mid.2.", ".mid.block_2.")

    # `codebook_used` is a log of recent ids
    renamed = {taming(k): v for k, v in state.items() if k != "quantize.codebook_used"}
    codes, dim = need(renamed, "quantize.embedding.weight").shape
    model = VQ(VQConfig(image_size=image_size, codes=codes, dim=dim, **conv_sizes(renamed)))
    ours = {}
    for name, value in to_diffusers(renamed).items():
        for old, new in _RENAMED.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        ours[name] = value
    load_strict(model, ours, where="the LlamaGen VQ checkpoint")
    return model.eval()
