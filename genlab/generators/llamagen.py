"""LlamaGen: Llama's architecture on the ids of a VQ tokenizer, in raster order (Sun et al., arXiv 2406.06525).

Class-conditional, or text-conditional from the embeddings of any text encoder.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.noise import Noise
from genlab.tokens import TokenSpec

from .base import Condition, Guidance, Text
from .causal import CausalConfig, CausalLM


@config
class LlamaGenConfig(CausalConfig):
    """Sizes of a LlamaGen; the defaults are the paper's B at 256x256."""

    kind: Literal["llamagen"] = "llamagen"
    vocab: int = 16384
    """Codebook size."""
    condition: Literal["class", "text"] = "class"
    """What it draws by."""
    text_dim: int = 2048
    """text: channels of the encoder's embeddings."""
    text_length: int = 120
    """text: embeddings in front of the image; shorter captions are padded on the left."""


class CaptionEmbedding(nn.Module):
    """An MLP over caption embeddings, and the embeddings that stand for no caption (fixed noise, as published)."""

    uncond: torch.Tensor

    def __init__(self, text_dim: int, dim: int, length: int) -> None:
        """Args: text_dim: channels in. dim: channels out. length: embeddings a caption."""
        super().__init__()
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        self.register_buffer("uncond", torch.randn(length, text_dim) / text_dim**0.5)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """(B, T, text_dim) to (B, T, dim)."""
        return self.fc2(F.gelu(self.fc1(x_BTC), approximate="tanh"))


class LlamaGen(CausalLM):
    """See the module's docstring."""

    kind = "llamagen"
    Config = LlamaGenConfig
    config: LlamaGenConfig
    cls_embedding: Any

    @property
    def spec(self) -> TokenSpec:
        """A raster of ids."""
        return TokenSpec(kind="discrete", grid=self.config.grid, vocab=self.config.vocab)

    @property
    def default_guidance(self) -> Guidance:
        """Constant, as published: 2 by class, 7.5 by text."""
        return Guidance(scale=2.0 if self.config.condition == "class" else 7.5, schedule="constant")

    def make_condition(self) -> None:
        """A table of classes, or an MLP over captions."""
        c = self.config
        if c.condition == "class":
            super().make_condition()
        else:
            self.prefix = self.text_length = c.text_length
            self.cls_embedding = CaptionEmbedding(c.text_dim, c.dim, c.text_length)

    def check_condition(self, condition: Condition) -> Condition:
        """Classes as they are; captions padded on the left to `text_length`.

        Raises:
            ValueError: for classes where captions are wanted or the other way round, or captions of another size.
        """
        c = self.config
        if c.condition == "class":
            return super().check_condition(condition)
        if not isinstance(condition, Text):
            raise ValueError("this llamagen draws by text: give `Text(embeddings (B, T, D), mask (B, T))`, not classes")
        condition = condition.to(self.device)
        (T, D), mask = condition.embeds_BTD.shape[1:], condition.mask_BT
        if c.text_dim != D or not 0 < T <= c.text_length:
            raise ValueError(
                f"captions must be 1 to {c.text_length} embeddings of {c.text_dim} channels, got {T} of {D}: "
                "use the text encoder it was trained with, and cut captions to that length"
            )
        return Text(condition.embeds_BTD.to(self.cls_embedding.fc1.weight), mask).padded(c.text_length, "left")

    def embed_condition(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A class: one position. A caption: `text_length`, of which the padding doesn't count."""
        if not isinstance(condition, Text):
            return super().embed_condition(condition)
        return self.cls_embedding(condition.embeds_BTD), condition.mask_BT

    def no_condition(self, condition: Condition) -> Condition:
        """No class; or the fixed embeddings, under the caption's own mask (as published)."""
        if not isinstance(condition, Text):
            return super().no_condition(condition)
        uncond = self.cls_embedding.uncond.to(condition.embeds_BTD)
        return Text(uncond.expand_as(condition.embeds_BTD), condition.mask_BT)

    def drop_condition(self, condition: Condition, noise: Noise) -> Condition:
        """Drop a share of classes or captions."""
        if not isinstance(condition, Text):
            return super().drop_condition(condition, noise)
        drop = noise.at(purpose="label drop").uniform(1) < self.config.label_drop
        free = self.no_condition(condition)
        assert isinstance(free, Text)
        drop = drop.to(self.device)[..., None]
        return Text(torch.where(drop, free.embeds_BTD, condition.embeds_BTD), condition.mask_BT)
