"""ELM's bae/*/binaryae_ema.th to `BAE`."""

from __future__ import annotations

import torch

from genlab.hub import load_strict
from tokenizers_img.bae import BAE, BAEConfig

from .conv import conv_sizes, to_diffusers
from .keys import count, need


def convert_bae(
    state: dict[str, torch.Tensor],
    *,
    image_size: int = 256,
    sub_tokens: int | None = None,
    deterministic: bool = False,
) -> BAE:
    """A `BAE` with these weights.

    Args:
        state: official names and tensors: of the whole GAN (`ae.…`), or of the autoencoder alone.
        image_size: side of the images it is to take.
        sub_tokens: k, which no weight tells; None takes the fewest of at most 12 bits, as ELM's best models.
        deterministic: the bits are rounded, as `bae_16_deter`'s, not drawn.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named, or bits that don't split evenly.
    """
    if any(k.startswith("ae.") for k in state):  # the rest trained it: discriminator and perceptual net
        others = [k for k in state if not k.startswith(("ae.", "disc.", "perceptual."))]
        if others:
            raise ValueError(f"the BAE checkpoint has unexpected keys: {', '.join(others[:5])}")
        state = {k.removeprefix("ae."): v for k, v in state.items() if k.startswith("ae.")}
    n = need(state, "quantize.proj.0.weight").shape[0]
    k = sub_tokens or next(k for k in range(1, n + 1) if n % k == 0 and n // k <= 12)
    if n % k:
        raise ValueError(f"{n} bits don't split into {k} sub-tokens")
    renamed = _named(state, "encoder", "encoder", "down") | _named(state, "generator", "decoder", "up")
    named = {"quantize.proj.0.weight": "pre.weight", "quantize.proj.0.bias": "pre.bias"}
    norm_first = "post.1.weight" in renamed
    model = BAE(
        BAEConfig(
            image_size=image_size,
            sub_tokens=k,
            bits=n // k,
            deterministic=deterministic,
            norm_first=norm_first,
            **conv_sizes(renamed),
        )
    )
    ours = to_diffusers(renamed)
    for name, value in state.items():
        if name == "quantize.embed.weight":
            ours["post.0.weight"] = value.T[:, :, None, None]
        # `logsigma` was meant for a likelihood and takes no part in decoding
        elif not name.startswith(("encoder.blocks.", "generator.blocks.", "generator.logsigma.")):
            ours[named.get(name, name)] = value
    load_strict(model, ours, where="the BAE checkpoint")
    return model.eval()


def _named(state: dict[str, torch.Tensor], theirs: str, ours: str, way: str) -> dict[str, torch.Tensor]:
    """ELM's flat list of blocks under the names of taming-transformers, told apart by what they hold."""
    total = count(state, rf"{theirs}\.blocks\.(\d+)")

    def kind(i: int) -> str:
        prefix = f"{theirs}.blocks.{i}."
        if f"{prefix}conv1.weight" in state:
            return "res"
        if f"{prefix}q.weight" in state:
            return "attn"
        if f"{prefix}conv.weight" in state:
            return "resample"
        return "norm" if need(state, f"{prefix}weight").ndim == 1 else "conv"

    kinds = [kind(i) for i in range(total)]
    levels = kinds.count("resample") + 1
    prefix_of: list[str] = []
    if way == "down":
        body, tail = kinds[1:-5], [".mid.block_1", ".mid.attn_1", ".mid.block_2", ".norm_out", ".conv_out"]
        head = [".conv_in"]
    else:
        head = [".conv_in", ".mid.block_1", ".mid.attn_1", ".mid.block_2"]
        head = [" norm", *head] if kinds[0] == "norm" else head
        body, tail = kinds[len(head) : -2], [".norm_out", ".conv_out"]
    level, counts = (0 if way == "down" else levels - 1), {"res": 0, "attn": 0}
    middle = []
    for what in body:
        if what == "resample":
            middle.append(f".{way}.{level}.{way}sample")
            level, counts = level + (1 if way == "down" else -1), {"res": 0, "attn": 0}
        elif what in counts:
            middle.append(f".{way}.{level}.{'block' if what == 'res' else 'attn'}.{counts[what]}")
            counts[what] += 1
        else:
            raise ValueError(f"the BAE checkpoint's {theirs} is laid out in an unknown way: {', '.join(kinds)}")
    prefix_of = [*head, *middle, *tail]
    renamed = {}
    for name, value in state.items():
        if not name.startswith(f"{theirs}.blocks."):
            continue
        number, rest = name.removeprefix(f"{theirs}.blocks.").split(".", 1)
        if rest.startswith("conv_out."):
            # every residual block has this shortcut; it is used where the width changes
            conv = need(state, f"{theirs}.blocks.{number}.conv1.weight")
            if conv.shape[0] == conv.shape[1]:
                continue
            rest = rest.replace("conv_out", "nin_shortcut")
        prefix = prefix_of[int(number)]
        renamed["post.1." + rest if prefix == " norm" else f"{ours}{prefix}.{rest}"] = value
    return renamed
