"""FlexTok's autoregressive transformer: a GPT over ordered tokens, by class or by text (arXiv 2502.13967, sec. 4).

There are two transformers. Small models take LlamaGen's, with the condition in front; the raster is one row, so rotary
positions turn half of each head by the token's number and leave the other half alone. The published models' (`Decoder`)
learns its places, adds the class to a start token, and reads captions by cross-attention in every block.

What is new is that it may stop: the first k tokens are a whole image. `first(k)` is the same transformer that draws k
tokens only, under any sampler; the sampler `until-settled` stops each image when more tokens no longer change it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.nn.attention import attend
from genlab.nn.gpt import Keep
from genlab.nn.layers import GatedMLP, Linear
from genlab.text import Text
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Guidance
from .causal import CausalState
from .llamagen import LlamaGen, LlamaGenConfig

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Norm = Literal["layer", "rms"]


@config
class DecoderConfig:
    """The published models' transformer; what a checkpoint's shapes and its config.yaml tell."""

    norm: Norm = "layer"
    """Of the blocks: LayerNorm or RMSNorm."""
    eps: float = 1e-6
    """Its epsilon."""
    norm_bias: bool = True
    """LayerNorm: whether it has one."""
    final_norm: bool = True
    """Whether the last block's output is normed."""
    head_norm: bool = False
    """Whether the head begins with a LayerNorm of its own (epsilon 1e-5)."""
    head_bias: bool = False
    """Of the head."""
    qk_norm: Literal["", "layer", "rms"] = ""
    """Norm of each head's queries and keys; empty: none."""
    qk_eps: float = 1e-6
    """Its epsilon."""
    qkv_bias: bool = False
    """Of queries, keys and values."""
    bias: bool = False
    """Of attention's output and the MLP."""
    scale: float = 0.0
    """Self-attention's factor of the logits; 0: head_dim^-1/2, which cross-attention always takes."""
    act: Activation = "gelu"
    """The MLP's."""
    gated: bool = False
    """fc2(act(fc1 x) * fc3 x) in place of fc2(act(fc1 x))."""
    caption_hidden: int = 2048
    """text: width inside the MLP over captions."""
    caption_bias: bool = False
    """text: of that MLP."""
    caption_act: Activation = "gelu_tanh"
    """text: its activation."""
    nothing_length: int = 1
    """text: embeddings by which the encoder reads an empty caption (T5: its end of text)."""


@config
class FlexARConfig(LlamaGenConfig):
    """Sizes of a FlexAR; the defaults are a depth of 12 under the paper's rule, width 64 times the depth."""

    kind: Literal["flexar"] = "flexar"  # type: ignore[assignment]
    grid: tuple[int, int] = (1, 256)
    """One row, as long as the tokenizer's tokens are many."""
    vocab: int = 64000
    """Codebook size."""
    decoder: DecoderConfig | None = None
    """The published models' transformer; None: LlamaGen's blocks."""


class MLP(nn.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, dim: int, hidden: int, out: int, act: Activation, bias: bool) -> None:
        """Args: dim, hidden, out: widths. act: see `ACTIVATIONS`. bias: of both layers."""
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden, bias=bias), Linear(hidden, out, bias=bias)
        self.act = ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., out)."""
        return self.fc2(self.act(self.fc1(x)))


def make_norm(kind: str, dim: int, eps: float, bias: bool = True) -> nn.Module:
    """A norm over the last axis; no kind: none."""
    if not kind:
        return nn.Identity()
    return nn.LayerNorm(dim, eps=eps, bias=bias) if kind == "layer" else nn.RMSNorm(dim, eps=eps)


class Beside(NamedTuple):
    """Captions as cross-attention reads them: each layer's keys and values, and which of them count."""

    k_NRHSd: torch.Tensor
    v_NRHSd: torch.Tensor
    mask_R11S: torch.Tensor


class Attention(nn.Module):
    """Self-attention; or, with `cross`, attention to keys and values that are made once for a caption."""

    def __init__(self, dim: int, heads: int, c: DecoderConfig, cross: bool = False) -> None:
        """Args: dim, heads: sizes. c: how. cross: read other positions."""
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (Linear(dim, dim, bias=c.qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim, bias=c.bias)
        self.q_norm, self.k_norm = (make_norm(c.qk_norm, dim // heads, c.qk_eps) for _ in range(2))
        self.scale = None if cross else c.scale or None

    def keys(self, x_RSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (R, H, S, d)."""
        k, v = (layer(x_RSD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.k, self.v))
        return self.k_norm(k), v

    def forward(
        self, x_RTD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool = False
    ) -> torch.Tensor:
        """(R, T, D) to (R, T, D)."""
        q = self.q_norm(self.q(x_RTD).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return self.proj(attend(q, k, v, mask, self.scale, causal).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention where there are captions, and an MLP, pre-norm."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, c: DecoderConfig, cross: bool) -> None:
        """Args: dim, heads, hidden: sizes. dropout: of each branch. c: how. cross: read captions.

        Raises:
            ValueError: for a gate of an activation that `GatedMLP` doesn't have.
        """
        super().__init__()
        self.norm_1, self.attn = make_norm(c.norm, dim, c.eps, c.norm_bias), Attention(dim, heads, c)
        if cross:
            self.norm_2 = make_norm(c.norm, dim, c.eps, c.norm_bias)
            self.cross_attn = Attention(dim, heads, c, cross=True)
        self.norm_3 = make_norm(c.norm, dim, c.eps, c.norm_bias)
        if c.gated and c.act not in ("gelu", "silu"):
            raise ValueError(f"a gated MLP takes gelu or silu, not {c.act}")
        self.mlp: nn.Module = (
            GatedMLP(dim, hidden, act=c.act, bias=c.bias) if c.gated else MLP(dim, hidden, dim, c.act, c.bias)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        keep: Keep | None,
        beside: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """One block over (R, T, D); beside: this layer's keys and values of captions, and which of them count."""
        h = self.norm_1(x)
        k, v = self.attn.keys(h)
        if keep is not None:
            k, v = keep(k, v)
        x = x + self.dropout(self.attn(h, k, v, mask, causal))
        if beside is not None:
            x = x + self.dropout(self.cross_attn(self.norm_2(x), *beside))
        return x + self.dropout(self.mlp(self.norm_3(x)))


class Decoder(nn.Module):
    """The published models' blocks, called as `GPT` is."""

    def __init__(self, c: FlexARConfig, how: DecoderConfig) -> None:
        """Args: c: sizes. how: of its layers. Raises: ValueError: if dim is not a multiple of heads."""
        super().__init__()
        if c.dim % c.heads:
            raise ValueError(f"dim {c.dim} is not a multiple of heads {c.heads}")
        self.positions = nn.Parameter(0.02 * torch.randn(c.grid[1], c.dim))
        self.dropout = nn.Dropout(c.dropout)
        sizes = (c.dim, c.heads, c.hidden or 4 * c.dim, c.dropout, how, c.condition == "text")
        self.layers = nn.ModuleList(DecoderBlock(*sizes) for _ in range(c.depth))
        self.norm = nn.Sequential(
            make_norm(how.norm if how.final_norm else "", c.dim, how.eps, how.norm_bias),
            make_norm("layer" if how.head_norm else "", c.dim, 1e-5),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x_RTD: torch.Tensor,
        at: torch.Tensor | slice | None = None,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = True,
        keep: Callable[[int], Keep] | None = None,
        beside: Beside | None = None,
    ) -> torch.Tensor:
        """See `GPT.forward`; beside: the captions of these rows and perhaps of more behind them."""
        at = slice(x_RTD.shape[1]) if at is None else at
        if isinstance(at, torch.Tensor):  # what stands behind the last place is read by nobody
            at = at.clamp(max=len(self.positions) - 1)
        x = self.dropout(x_RTD + self.positions[at])
        read = [None] * len(self.layers) if beside is None else [
            (k[: len(x)], v[: len(x)], beside.mask_R11S[: len(x)])
            for k, v in zip(beside.k_NRHSd, beside.v_NRHSd, strict=True)
        ]  # fmt: skip
        for i, (layer, captions) in enumerate(zip(self.layers, read, strict=True)):
            x = layer(x, mask, causal, keep and keep(i), captions)
        return x


class CaptionMLP(MLP):
    """The MLP over caption embeddings, and what the encoder makes of an empty caption."""

    nothing: torch.Tensor

    def __init__(self, c: FlexARConfig, how: DecoderConfig) -> None:
        """Args: c: sizes. how: of its layers."""
        super().__init__(c.text_dim, how.caption_hidden, c.dim, how.caption_act, how.caption_bias)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        self.register_buffer("nothing", torch.randn(how.nothing_length, c.text_dim) / c.text_dim**0.5)


class FlexAR(LlamaGen):
    """See the module's docstring."""

    kind = "flexar"
    Config = FlexARConfig  # type: ignore[assignment]
    config: FlexARConfig

    sos: nn.Parameter

    def __init__(self, config: FlexARConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        if config.grid[0] != 1:
            raise ValueError(f"a flexar's tokens have one dimension: grid must be (1, length), got {config.grid}")
        super().__init__(config)

    @property
    def spec(self) -> TokenSpec:
        """Ids in one dimension, coarse to fine."""
        c = self.config
        return TokenSpec(kind="discrete", grid=c.grid[1:], order="coarse_to_fine", vocab=c.vocab)

    @property
    def default_guidance(self) -> Guidance:
        """The config's, else 1.5 by class and 3 by text, the published models' defaults; constant."""
        return Guidance(scale=self.config.guidance or (3.0 if self.by_text else 1.5), schedule="constant")

    def progress(self, group: int) -> float:
        """A token's place among all there could be, so that stopping early changes no guidance."""
        return group / max(1, self.spec.length - 1)

    # -- the published models' transformer ----------------------------------------------------------------------

    def make_condition(self) -> None:
        """LlamaGen's; or a start token, and a class that is added to it or an MLP over captions."""
        c = self.config
        if (how := c.decoder) is None:
            return super().make_condition()
        self.sos = nn.Parameter(0.02 * torch.randn(1, 1, c.dim))
        if c.condition == "class":
            self.cls_embedding = nn.Embedding(c.num_classes, c.dim)  # "no class" adds nothing
        else:
            self.text_length, self.cls_embedding = c.text_length, CaptionMLP(c, how)
        return None

    def make_network(self) -> None:
        """The blocks and the head."""
        c = self.config
        if (how := c.decoder) is None:
            return super().make_network()
        self.gpt, self.output = Decoder(c, how), nn.ModuleList([Linear(c.dim, self.V, bias=how.head_bias)])
        if how.head_bias:
            nn.init.zeros_(self.output[0].bias)  # type: ignore[arg-type]
        return None

    def embed_condition(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `CausalLM.embed_condition`: the start token, and by class its embedding added to it."""
        if self.config.decoder is None:
            return super().embed_condition(condition)
        if isinstance(condition, Text):
            return self.sos.expand(len(condition), -1, -1), None
        table = F.pad(self.cls_embedding.weight, (0, 0, 0, 1))  # a row of zeros for "no class"
        return self.sos + table[condition][:, None], None

    def read_beside(self, conditions: Sequence[Condition]) -> Beside | None:
        """Each layer's keys and values of captions, as many as the longest has; nothing by class."""
        if self.config.decoder is None or not self.by_text:
            return None
        masks = torch.cat([text.mask_BT for text in conditions])  # type: ignore[union-attr, misc]
        x = torch.cat([text.embeds_BTD for text in conditions])  # type: ignore[union-attr]
        used = masks.any(0)
        x = self.cls_embedding(x[:, used])
        k, v = zip(*(layer.cross_attn.keys(x) for layer in self.gpt.layers), strict=True)
        return Beside(torch.stack(k), torch.stack(v), masks[:, None, None, used])

    def no_condition(self, condition: Condition) -> Condition:
        """See `CausalLM.no_condition`; of captions, what the encoder makes of an empty one.

        Raises:
            ValueError: if a converted model has not met its encoder yet.
        """
        if self.config.decoder is None or not isinstance(condition, Text):
            return super().no_condition(condition)
        nothing = self.cls_embedding.nothing
        if bool(nothing.isnan().any()):
            raise ValueError(
                "guidance compares with an empty caption, and this flexar doesn't know yet how its text encoder reads "
                "one: read the captions with read_captions (as `genlab sample` does), or draw with guidance 1"
            )
        assert condition.mask_BT is not None
        free = self.text_length - len(nothing)
        embeds_TC = F.pad(nothing.to(condition.embeds_BTD.dtype), (0, 0, free, 0))
        mask_T = torch.arange(self.text_length, device=condition.mask_BT.device) >= free
        return Text(embeds_TC.expand_as(condition.embeds_BTD), mask_T.expand_as(condition.mask_BT))

    def read_captions(self, captions: Sequence[str]) -> Text:
        """See `Generator.read_captions`; a converted model also learns here how an empty one is read."""
        text = super().read_captions(captions)
        if (how := self.config.decoder) is not None and bool(self.cls_embedding.nothing.isnan().any()):
            nothing = self.text_encoder.encode("").to(self.cls_embedding.nothing)
            self.cls_embedding.nothing = nothing
            self.config = dataclasses.replace(
                self.config, decoder=dataclasses.replace(how, nothing_length=len(nothing))
            )
        return text

    def run(self, x_RTD: torch.Tensor, beside: Any, *where: Any, **how: Any) -> torch.Tensor:
        """See `CausalLM.run`."""
        if beside is None:
            return super().run(x_RTD, beside, *where, **how)
        return self.gpt(x_RTD, *where, beside=beside, **how)

    # -- stopping -----------------------------------------------------------------------------------------------

    def first(self, k: int) -> FlexAR:
        """The same transformer, drawing the first k tokens only; the weights are shared.

        Raises:
            ValueError: for k outside 1 … length.
        """
        if not 1 <= k <= self.spec.length:
            raise ValueError(f"this flexar draws 1 to {self.spec.length} tokens, asked for {k}")
        short = copy.copy(self)
        short.n_groups = k
        return short

    def tokens(self, state: CausalState) -> Tokens:
        """The finished ids; those never drawn are absent."""
        self.require_complete(state)
        absent = self.spec.length - self.n_groups
        tokens = Tokens(F.pad(state.ids_BLK[..., 0], (0, absent)), self.spec)
        return tokens.first(self.n_groups) if absent else tokens
