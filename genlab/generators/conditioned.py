"""Class or caption: what the continuous generators (xAR, MAR, ECAR) draw by.

The papers condition on classes. By text is our extension, the same for all three: a caption becomes `text_length`
tokens that stand before the image's, read once a draw, and a vector (their mean) where a class's vector would be.
Shorter captions are filled with learned padding; "no caption" is padding alone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.noise import Noise
from genlab.text import Text

from .base import Condition, Generator


@config
class ConditionConfig:
    """What a generator draws by."""

    num_classes: int = 1000
    """Classes; one more row of the table stands for "no class"."""
    condition: Literal["class", "text"] = "class"
    """What it draws by."""
    text_dim: int = 2048
    """text: channels of the encoder's embeddings."""
    label_drop: float = 0.1
    """Share of training conditions replaced by "no class" or "no caption"."""


class Caption(nn.Module):
    """Caption embeddings to tokens in front of the image, and to one vector."""

    def __init__(self, text_dim: int, dim: int, length: int, pooled: bool) -> None:
        """Args: text_dim: channels in. dim: channels out. length: tokens a caption. pooled: give the vector too."""
        super().__init__()
        self.fc1 = nn.Linear(text_dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.pool = nn.Linear(dim, dim) if pooled else nn.Identity()
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))

    def forward(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions of full length, with a mask, to tokens (R, P, D) and vectors (R, D)."""
        assert text.mask_BT is not None
        real_RP1 = text.mask_BT[..., None]
        x = self.fc2(F.gelu(self.fc1(text.embeds_BTD.to(self.fc1.weight))))
        x = torch.where(real_RP1, x, 0)
        return self.place + x, self.pool(x.sum(1) / real_RP1.sum(1).clamp(min=1))


class ConditionedGenerator(Generator):
    """A generator that draws by class or by text, as its config says."""

    class_emb: nn.Embedding
    caption: Caption

    def make_condition(self, c: ConditionConfig, dim: int, length: int, pooled: bool = True) -> None:
        """Make the modules that embed the condition; length: tokens of a caption; pooled: its vector is wanted."""
        self.num_classes = c.num_classes
        if c.condition == "class":
            self.class_emb = nn.Embedding(c.num_classes + 1, dim)
        else:
            self.text_length = length
            self.caption = Caption(c.text_dim, dim, length, pooled)

    @property
    def prefix(self) -> int:
        """Tokens of the condition before the image's: 0 by class."""
        return self.text_length

    def check_condition(self, condition: Condition) -> Condition:
        """Classes as they are; captions filled up to the full length, with a mask.

        Raises:
            ValueError: for classes where captions are wanted or the other way round, or captions of another size.
        """
        if not self.by_text:
            return self.check_labels(condition)
        return self.check_captions(condition)

    def no_condition(self, condition: Condition) -> Condition:
        """What stands for the absence of a checked condition, as many rows."""
        if isinstance(condition, Text):
            assert condition.mask_BT is not None
            return Text(condition.embeds_BTD, torch.zeros_like(condition.mask_BT))
        return torch.full_like(condition, self.num_classes)

    def drop_condition(self, condition: Condition, noise: Noise) -> Condition:
        """Check, and replace a share of the rows by `no_condition`, for guidance."""
        if not self.by_text:
            return self.drop_labels(condition, self.config.label_drop, noise)
        condition = self.check_condition(condition)
        assert isinstance(condition, Text)
        assert condition.mask_BT is not None
        kept = noise.at(purpose="label drop").uniform(1) >= self.config.label_drop
        return Text(condition.embeds_BTD, condition.mask_BT & kept.to(self.device))

    def embed_condition(self, condition: Condition) -> tuple[torch.Tensor | None, torch.Tensor]:
        """A checked condition as tokens (R, P, D), None by class, and as vectors (R, D)."""
        if isinstance(condition, Text):
            return self.caption(condition)
        return None, self.class_emb(condition)

    def embed_rows(self, condition: Condition, guided: bool) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """For a draw: each distinct condition embedded once.

        Args:
            condition: checked, B rows.
            guided: whether unconditional rows follow the conditional ones.

        Returns:
            tokens (R, P, D) or None; vectors (K, D), the last or one of them "nothing"; and of each of the R rows,
            which of the K is its.
        """
        B = len(condition)
        if isinstance(condition, Text):
            tokens, vectors = self.caption(condition)
            nothing = self.no_condition(condition[:1])
            assert isinstance(nothing, Text)
            free_tokens, free_vector = self.caption(nothing)
            row = torch.arange(B, device=self.device)
            if guided:
                tokens = torch.cat([tokens, free_tokens.expand(B, -1, -1)])
                row = torch.cat([row, torch.full_like(row, B)])
            return tokens, torch.cat([vectors, free_vector]), row
        both = torch.cat([condition, condition.new_tensor([self.num_classes])])
        classes, row = both.unique(return_inverse=True)
        return None, self.class_emb(classes), torch.cat([row[:-1], row[-1:].expand(B * guided)])
