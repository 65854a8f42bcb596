"""The FlexAR models of EPFL's search over tokens (`EPFL-VILAB/FlexAR-*`, arXiv 2502.13967) to `FlexAR`.

Shapes tell the sizes. Heads, norms and activations stand in the config.yaml beside the weights, which describes the
model as a tree of Python classes and their arguments: it is read as data, and nothing that it names is imported.
A setting that changes what the model computes and is not known here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from genlab.generators.flexar import ACTIVATIONS, DecoderConfig, FlexAR, FlexARConfig
from genlab.hub import load_strict

from .keys import count, need

_NORMS: dict[str, tuple[str, float]] = {  # kind, epsilon where none is given
    "LAYER_NORM": ("layer", 1e-6),
    "LayerNorm": ("layer", 1e-5),
    "LayerNormFP32": ("layer", 1e-5),
    "LPLayerNorm": ("layer", 1e-5),
    "RMSNorm": ("rms", 1e-6),
}
_FFNS = {"MLP": "", "GatedFFN": "", "SwiGLUFFN": "silu", "GeGELU": "gelu"}  # the activation that is part of it
_SCALED, _PLAIN = ("EfficientAttention", "AttentionWithMask"), ("GenericAttention",)  # only some heed qk_scale
_CROSS = ("GeneralizedAttention", "GeneralizedAttentionWithMask")
_SUMS: dict[str, Any] = {  # what the framework's configs compute with
    "add": lambda *x: sum(x),
    "subtract": lambda x, *y: x - sum(y),
    "mul": lambda x, y: x * y,
    "mul_int": lambda x, y: int(x * y),
    "div_int": lambda x, y: int(x / y),
    "div_float": lambda x, y: x / y,
    "sqrt_div": lambda x, y: (x / y) ** 0.5,
}


def convert_flexar(state: dict[str, torch.Tensor], *, source: Path | None = None) -> FlexAR:
    """A `FlexAR` with these weights, by class or by text.

    Args:
        state: official names and tensors; those of the image tokenizer and of the text encoder, which have checkpoints
            of their own, are left out.
        source: the checkpoint file, its config.yaml beside it.

    Raises:
        FileNotFoundError: without a config.yaml.
        ValueError: for settings that are not known here, or missing, unexpected or misshapen keys, each named.
    """
    state = {k: v for k, v in state.items() if "image_tokenizer" not in k and "t5_embedder" not in k}
    start = next((k for k in state if k.endswith("preprocessor.sos_token_embed")), "preprocessor.sos_token_embed")
    prefix = start.removesuffix("preprocessor.sos_token_embed")
    captions = {k.split(".mlp.", 1)[1]: v for k, v in state.items() if "text_encoder." in k and ".mlp." in k}
    own = {k.removeprefix(prefix): v for k, v in state.items() if "text_encoder." not in k}
    vocab, dim = need(own, "preprocessor.embedding.weight").shape
    need(own, "preprocessor.sos_token_embed")
    settings = read_settings(source)
    trunk = next(find(settings, "trunk"), None)
    if not isinstance(trunk, dict):
        raise ValueError("config.yaml describes no transformer: expected a `trunk` with its attention and its MLP")
    ours = rename(own)
    sizes: dict[str, Any] = {"condition": "class"}
    if captions:
        text_dim = need(captions, "fc1.weight").shape[1]
        length = next(find(settings, "encoder_seqlen_max"), None) or FlexARConfig.text_length
        sizes = {"condition": "text", "text_dim": text_dim, "text_length": int(length)}
        ours |= {f"cls_embedding.{k}": v for k, v in captions.items()}
        ours["cls_embedding.nothing"] = torch.full((1, text_dim), torch.nan)  # until its encoder is met
    elif "preprocessor.cls_embedding.weight" in own:
        sizes["num_classes"] = len(own["preprocessor.cls_embedding.weight"])
    else:
        raise ValueError(
            "the checkpoint draws neither by class (preprocessor.cls_embedding) nor by text (text_encoder)"
        )
    how = read_trunk(trunk)
    layer = "gpt.layers.0."
    decoder = DecoderConfig(
        **how,
        norm_bias=how["norm"] == "rms" or f"{layer}norm_1.bias" in ours,
        final_norm=any(k.startswith("gpt.norm.0.") for k in ours),
        head_norm=any(k.startswith("gpt.norm.1.") for k in ours),
        head_bias="output.0.bias" in ours,
        qkv_bias=f"{layer}attn.q.bias" in ours,
        bias=f"{layer}attn.proj.bias" in ours,
        caption_hidden=len(captions["fc1.weight"]) if captions else DecoderConfig.caption_hidden,
        caption_bias="fc1.bias" in captions,
        caption_act=read_act(
            next((m.get("act_layer") for m in find(settings, "mlp") if isinstance(m, dict)), None), "gelu_tanh"
        ),
    )
    model = FlexAR(
        FlexARConfig(
            grid=(1, len(need(own, "preprocessor.positional_embedding"))),
            vocab=vocab,
            dim=dim,
            depth=count(own, r"trunk\.blocks\.(\d+)"),
            heads=int(trunk_attention(trunk)["num_heads"]),
            hidden=len(need(own, "trunk.blocks.0.mlp.fc1.weight")),
            guidance=float(next(find(settings, "cfg_factor"), None) or 0),
            decoder=decoder,
            **sizes,
        )
    )
    load_strict(model, ours, where="the FlexAR checkpoint")
    if captions:
        model.extra["text_encoder"] = next(find(settings, "hf_hub_path"), None) or "google/flan-t5-xl"
    return model.eval()


_TOP = {
    "preprocessor.embedding.weight": "tok_embeddings.0.weight",
    "preprocessor.sos_token_embed": "sos",
    "preprocessor.positional_embedding": "gpt.positions",
    "preprocessor.cls_embedding.weight": "cls_embedding.weight",
}
_PARTS = {
    "self_attn.": "attn.", "q_proj": "q", "k_proj": "k", "v_proj": "v", "Wq": "q", "Wk": "k", "Wv": "v",
}  # fmt: skip


def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's parameters under our names; unknown names stay as they are."""
    cross, gated = (any(part in k for k in state) for part in (".cross_attn.", ".mlp.fc3."))
    ours: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if found := re.match(r"(trunk\.post_trunk_norm|head\.norm)\.(\w+)$", name):
            ours[f"gpt.norm.{int(found[1] == 'head.norm')}.{found[2]}"] = value
        elif found := re.match(r"head\.(?:\w+\.)*(weight|bias)$", name):
            ours[f"output.0.{found[1]}"] = value
        elif found := re.match(r"trunk\.blocks\.(\d+)\.(.+)\.(weight|bias)$", name):
            part = found[2]
            for old, new in _PARTS.items():
                part = part.replace(old, new)
            if gated:
                part = {"mlp.fc1": "mlp.fc1_g", "mlp.fc3": "mlp.fc1_x"}.get(part, part)
            if not cross and part == "norm_2":
                part = "norm_3"
            stem, kind = f"gpt.layers.{found[1]}.{part}", found[3]
            if part.endswith(".qkv"):
                stem = stem.removesuffix("qkv")
                ours |= zip((f"{stem}{x}.{kind}" for x in "qkv"), value.chunk(3), strict=True)
            else:
                ours[f"{stem}.{kind}"] = value
        else:
            ours[_TOP.get(name, name)] = value
    return ours


# -- config.yaml -----------------------------------------------------------------------------------------------------


def read_settings(source: Path | None) -> dict[str, Any]:
    """The config.yaml beside a checkpoint, its references and sums worked out.

    Raises:
        ImportError: without the library omegaconf.
        FileNotFoundError: if there is none.
        ValueError: if it can't be read.
    """
    path = None if source is None else (source if source.is_dir() else source.parent) / "config.yaml"
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml beside {source}: a FlexAR's heads, norms and activations stand there alone. Fetch it from "
            "the model's page on the Hub, and keep it in the checkpoint's folder"
        )
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise ImportError("a FlexAR's config.yaml needs the library omegaconf: pip install 'genlab[hf]'") from error
    for name, function in _SUMS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


def find(node: Any, name: str) -> Iterator[Any]:
    """Every value that stands under a name, anywhere in a tree."""
    if isinstance(node, dict):
        if name in node:
            yield node[name]
        for value in node.values():
            yield from find(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from find(value, name)


def target(node: Any, default: str) -> str:
    """The last part of the name of the class or function that a node stands for."""
    if isinstance(node, dict):
        node = node.get("path") or node.get("_target_")  # `path`: what hydra's get_class and get_method return
    return str(node or default).rpartition(".")[2]


def trunk_attention(trunk: dict[str, Any]) -> dict[str, Any]:
    """The settings of its self-attention.

    Raises:
        ValueError: if there are none.
    """
    node = trunk.get("self_attn_target", trunk.get("attn_target"))
    if not isinstance(node, dict) or "num_heads" not in node:
        raise ValueError("config.yaml says nothing of the trunk's self-attention: expected attn_target with num_heads")
    return node


def read_trunk(trunk: dict[str, Any]) -> dict[str, Any]:
    """What the trunk's settings say that no shape tells.

    Raises:
        ValueError: for anything that isn't known here and changes what is computed.
    """
    own, cross = trunk_attention(trunk), trunk.get("cross_attn_target") or {}
    kinds = (target(own, ""), _SCALED + _PLAIN), (target(cross, _CROSS[0]), _CROSS)
    for kind, known in kinds:
        if kind not in known:
            raise ValueError(f"config.yaml names the attention {kind!r}, known are {', '.join(known)}")
    for node in (own, cross):
        for name in ("rope", "rope_pos_embed", "relative_pos_embed"):
            if node.get(name) is not None:
                raise ValueError(f"config.yaml asks for relative positions ({name}), which no known FlexAR has")
        if node.get("num_kv_heads") not in (None, node.get("num_heads")):
            raise ValueError("config.yaml asks for fewer heads of keys than of queries, which no known FlexAR has")
    if not own.get("is_causal") and target(own, "") != "AttentionWithMask":
        raise ValueError("config.yaml's self-attention isn't causal (is_causal)")
    if cross and cross.get("num_heads") != own["num_heads"]:
        raise ValueError("config.yaml gives cross-attention other heads than self-attention, which no known FlexAR has")
    if cross and read_norm(cross.get("qk_norm"), "") != read_norm(own.get("qk_norm"), ""):
        raise ValueError("config.yaml norms the queries of its two attentions differently, which no known FlexAR does")
    (norm, eps), (qk_norm, qk_eps) = read_norm(trunk.get("norm_layer"), "LAYER_NORM"), read_norm(own.get("qk_norm"), "")
    ffn, block = trunk.get("ffn_target"), trunk.get("block")
    if target(ffn, "MLP") not in _FFNS:
        raise ValueError(f"config.yaml names the MLP {target(ffn, '')!r}, known are {', '.join(_FFNS)}")
    # the official decoder trunk doesn't hand its act_layer on to its blocks: GELU, whatever it says
    given = [node.get("act_layer") for node in (ffn, block) if isinstance(node, dict)]
    given += [] if cross else [trunk.get("act_layer")]
    act = _FFNS[target(ffn, "MLP")] or read_act(next((node for node in given if node), None), "gelu")
    return {
        "norm": norm, "eps": eps, "qk_norm": qk_norm, "qk_eps": qk_eps, "act": act,
        "gated": target(ffn, "MLP") != "MLP",
        "scale": float(own.get("qk_scale") or 0) if target(own, "") in _SCALED else 0.0,
    }  # fmt: skip


def read_norm(node: Any, default: str) -> tuple[str, float]:
    """The kind and the epsilon of a norm; none where neither node nor default names one.

    Raises:
        ValueError: for an unknown one.
    """
    name = target(node, default)
    if not name:
        return "", DecoderConfig.qk_eps
    if name not in _NORMS:
        raise ValueError(f"config.yaml names the norm {name!r}, known are {', '.join(_NORMS)}")
    kind, eps = _NORMS[name]
    given = node.get("eps") if isinstance(node, dict) else None
    return kind, float(given if given is not None else eps)


def read_act(node: Any, default: str) -> Any:
    """The activation that a node names.

    Raises:
        ValueError: for an unknown one.
    """
    name = target(node, default).lower()
    if name == "gelu" and isinstance(node, dict) and node.get("approximate", "none") == "tanh":
        return "gelu_tanh"
    if name not in ACTIVATIONS:
        raise ValueError(f"config.yaml names the activation {name!r}, known are {', '.join(ACTIVATIONS)}")
    return name
