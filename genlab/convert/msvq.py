"""VAR's vae_ch160v4096z32.pth (a bare state dict) to `MSVQ`."""

from __future__ import annotations

import re

import torch

from genlab.hub import load_strict
from tokenizers_img.msvq import MSVQ, MSVQConfig

from .conv import conv_sizes, to_diffusers
from .keys import need

# one phi for all scales, a few, or one a scale
_PHI = re.compile(r"quantize\.quant_resi\.(?:qresi_ls\.)?(qresi|\d+)\.(weight|bias)")
_RENAMED = {"quantize.embedding.weight": "quantiser.codebook", "quant_conv.": "pre.", "post_quant_conv.": "post."}


def convert_msvq(state: dict[str, torch.Tensor], *, scales: tuple[int, ...] = MSVQConfig.scales) -> MSVQ:
    """An `MSVQ` with these weights.

    Args:
        state: official names and tensors.
        scales: side of each map, which no weight tells; the default is the published models'.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named, or scales that don't fit.
    """
    hits = state.get("quantize.ema_vocab_hit_SV")
    if hits is not None and len(hits) != len(scales):
        raise ValueError(f"the checkpoint counts hits on {len(hits)} scales, but scales={scales} are {len(scales)}")
    state = {k: v for k, v in state.items() if k != "quantize.ema_vocab_hit_SV"}
    sizes = conv_sizes(state)
    codes, dim = need(state, "quantize.embedding.weight").shape
    phis = len({m[1] for k in state if (m := _PHI.fullmatch(k))})
    side = scales[-1] * 2 ** (len(sizes["channels"]) - 1)
    model = MSVQ(MSVQConfig(image_size=side, codes=codes, dim=dim, scales=scales, phis=phis, **sizes))
    ours = {}
    for name, value in to_diffusers(state).items():
        if m := _PHI.fullmatch(name):
            name = f"quantiser.phis.{0 if m[1] == 'qresi' else m[1]}.{m[2]}"
        for old, new in _RENAMED.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        ours[name] = value
    load_strict(model, ours, where="the VAR tokenizer checkpoint")
    return model.eval()
