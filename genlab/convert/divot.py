"""Tencent's Divot: the tokenizer's file to `Divot`, an LM and its agent's file to `DivotLM`.

The tokenizer's file holds no image network (timm brings it) and no de-tokenizer: alone it becomes a divot that encodes.
The de-tokenizer's file holds DynamiCrafter's U-Net, the autoencoder of frames and the resampler between.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from genlab.generators.divot_lm import DivotLM, DivotLMConfig
from genlab.generators.seed_llama import lm_config
from genlab.hub import load_strict
from genlab.nn.zero_snr import signal_levels
from tokenizers_img.divot import Divot, DivotConfig

from . import divot_keys
from .keys import count, need
from .kl_vae import convert_kl_vae
from .seed_llama import load_config, read_pieces

State = dict[str, torch.Tensor]
_MARKS = (("<vid>", "</vid>"), ("<img>", "</img>"))
_FIRST = "<frame_00000>"
_LATENT_SCALE = 0.18215  # Stable Diffusion's
# buffers of the noise schedule, which is ours too
_SCHEDULE = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "posterior_variance",
             "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_alphas_cumprod",
             "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}  # fmt: skip


def _below(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def convert_divot(
    state: State,
    *,
    image_size: int = 256,
    network: str = "vit_huge_patch14_clip_224.laion2b",
    network_size: int = 224,
    places: int = 16,
    dim_head: int = 64,
    heads: int = 8,
    detokenizer: State | None = None,
) -> Divot:
    """A `Divot` with these weights; without those of its de-tokenizer it only encodes.

    Args:
        state: official names and tensors, `Divot_tokenizer.bin`.
        image_size: side of the frames it is to take.
        network: the frozen image network, a timm model.
        network_size: side of the frames that it is given.
        places: side of its grid of patches.
        dim_head: channels a head of the temporal encoder and of the resampler.
        heads: of the spatial-temporal blocks.
        detokenizer: official names and tensors, `Divot_detokenizer_stage1.bin` or `_stage2.bin`; its heads have
            `dim_head` channels, too.

    Raises:
        ValueError: for missing, unexpected or misshapen keys, each named; for the de-tokenizer's file alone.
    """
    if any(k.startswith(("diffusion_model.", "first_stage_model.")) for k in state):
        raise ValueError(
            "this is Divot's de-tokenizer alone: convert Divot_tokenizer.bin, and give this file with --detokenizer"
        )
    temporal, spatial = _below(state, "temporal_encoder."), _below(state, "image_proj_model.")
    width, channels = need(temporal, "input_proj.weight").shape
    dim = need(temporal, "output_proj.weight").shape[0]
    inner = need(spatial, "down_sampler.layers.0.0.to_q.weight").shape[0]
    frames = need(temporal, "positional_embedding").shape[0]
    pooled = need(spatial, "pos_embed_spatial").numel() // dim
    latents = need(spatial, "down_sampler.latents")
    drawing: dict[str, Any] = {"vae": dataclasses.replace(DivotConfig().vae, image_size=image_size)}
    more: State = {}
    if detokenizer is not None:
        drawing, more = _drawing(detokenizer, state, image_size, dim_head)
    model = Divot(
        DivotConfig(
            **drawing,
            read=frames,
            network=network,
            network_size=network_size,
            places=places,
            channels=channels,
            pool=math.isqrt(pooled),
            width=width,
            temporal_layers=count(temporal, r"transformer\.resblocks\.(\d+)"),
            temporal_heads=width // dim_head,
            dim=dim,
            depth=count(spatial, r"blocks\.(\d+)"),
            heads=heads,
            resampler_depth=count(spatial, r"down_sampler\.layers\.(\d+)"),
            resampler_heads=inner // dim_head,
            dim_head=dim_head,
            queries=latents.shape[-2],
            token_dim=need(spatial, "down_sampler.proj_out.weight").shape[0],
            denoiser_depth=0,
        )
    )
    ours: State = more | {"seen_mean": torch.zeros(channels), "seen_std": torch.ones(channels)}
    ours |= {f"temporal.{k}": v for k, v in divot_keys.temporal_encoder(temporal).items()}
    ours |= {f"spatial.{k}": v for k, v in divot_keys.spatial_temporal(spatial).items()}
    ours |= {k: v for k, v in state.items() if not k.startswith(("temporal_encoder.", "image_proj_model."))}
    shapes = model.state_dict()
    for name in ("spatial.space", "spatial.time", "temporal.position"):  # some have a leading 1
        if name in ours and ours[name].numel() == shapes[name].numel():
            ours[name] = ours[name].reshape(shapes[name].shape)
    load_strict(model, ours, where="the Divot checkpoint")
    return model.eval()


def _drawing(state: State, tokenizer: State, image_size: int, head_dim: int) -> tuple[dict[str, Any], State]:
    """The config's fields and the weights of a de-tokenizer; names that are not known stay as they are.

    Raises:
        ValueError: if its noise schedule isn't the one that `genlab.nn.zero_snr` has.
    """
    levels = state.get("sqrt_alphas_cumprod")
    if levels is not None and not torch.allclose(levels.double(), signal_levels(), atol=1e-4):
        raise ValueError("the de-tokenizer's sqrt_alphas_cumprod is another noise schedule than the release's")
    parts = {name: _below(state, f"{name}.") for name in ("diffusion_model", "first_stage_model", "image_proj_model")}
    unet, unpack = parts["diffusion_model"], parts["image_proj_model"]
    vae = convert_kl_vae(parts["first_stage_model"], image_size=image_size, scale=_LATENT_SCALE)
    ours: State = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    ours |= {f"denoiser.{k}": v for k, v in divot_keys.video_unet(unet).items()}
    ours |= {f"unpack.{k}": v for k, v in divot_keys.resampler(unpack).items()}
    for name, value in state.items():
        again = tokenizer.get(name.removeprefix("video_tokenizer."))
        known = name.split(".")[0] in parts or name in _SCHEDULE
        if not known and not (again is not None and torch.equal(again, value)):
            ours[name] = value
    config = {
        "vae": vae.config,
        "unet": divot_keys.video_unet_config(unet, head_dim),
        "context": need(unpack, "latents").shape[-2],
    }
    return config, ours


def convert_divot_lm(
    state: State, *, source: Path | None = None, agent: State | None = None, pieces: str = ""
) -> DivotLM:
    """A `DivotLM` with the weights of an LM and of its agent.

    Args:
        state: the LM's, in transformers' names (the folder `llm`).
        source: the file or folder they came from; its config.json is read.
        agent: the agent's: `input_resampler.proj.*`, `output_resampler.proj.*`.
        pieces: its tokenizer, a folder or Hub id of transformers; empty: looked for beside the weights.

    Raises:
        ValueError: for missing or unexpected keys, without an agent, or where the tokenizer lacks the clip's words.
        FileNotFoundError: if the tokenizer is not there.
    """
    if agent is None:
        raise ValueError(
            "a divot_lm needs its agent, which reads and draws clips: give --agent agent/pytorch_model.bin"
        )
    if source is None:
        raise ValueError("the config beside the weights is needed: name their file or folder")
    folder = source if source.is_dir() else source.parent
    words, ids = read_pieces(pieces or str(folder), required=True)
    places = _layout(words, ids)
    dim = need(agent, "input_resampler.proj.0.weight").shape[1]
    out = need(agent, "output_resampler.proj.2.weight").shape[0]
    components, rest = divmod(out, 2 * dim + 1)
    if rest:
        raise ValueError(f"the agent writes {out} numbers a token, no mixture over {dim} channels (2 K C + K)")
    config = load_config(folder)
    model = DivotLM(DivotLMConfig(lm=lm_config(config), dim=dim, components=components, **places))
    ours: State = {}
    for key, value in state.items():
        if key.endswith(".rotary_emb.inv_freq"):  # older transformers saved these tables
            continue
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = value[: model.total]  # words behind the clip's, which nothing here uses
        ours[f"lm.{key}"] = value
    for key, value in agent.items():
        for theirs, own in (("input_resampler.proj.", "enter."), ("output_resampler.proj.", "leave.")):
            key = own + key.removeprefix(theirs) if key.startswith(theirs) else key
        ours[key] = value
    load_strict(model, ours, where=f"{source} and its agent")
    model.extra["word_pieces"] = words
    return model.eval()


def _layout(words: str, ids: dict[str, int]) -> dict[str, Any]:
    """Where queries and marks are among the LM's ids.

    Raises:
        ValueError: if the tokenizer has no words for clips.
    """
    from tokenizers import Tokenizer

    table = Tokenizer.from_str(words).get_vocab() | ids
    marks = next((pair for pair in _MARKS if all(word in table for word in pair)), None)
    if _FIRST not in table or marks is None:
        raise ValueError(
            f"the tokenizer lacks a clip's words: {_FIRST} and, around it, {' or '.join(map(' … '.join, _MARKS))}"
        )
    begin, end = (table[word] for word in marks)
    return {"text_vocab": table[_FIRST], "begin_image": begin, "end_image": end}
