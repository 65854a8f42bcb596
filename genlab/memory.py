"""What a language model may look up: captioned images, by how alike they look.

A model that was trained on few images knows few words by heart. What similar images are called stands beside what it
writes itself, and the caption that most of these agree with is given (`SeedLlama.caption`). The vectors are part of the
model's checkpoint, so that looking up needs no data set.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genlab.tokens import Tokens, TokenSpec

SIDE = 224
"""Side of the images that the encoder is shown."""


class Looks:
    """A frozen image encoder's features, averaged over places; `cached_tokens` takes it as an encoder."""

    kind = "looks"

    def __init__(self, encoder: str, image_size: int) -> None:
        """Args: encoder: `efficientnet-lite0`, a timm model, or one of transformers. image_size: side of its images."""
        from tokenizers_img.qformer import FrozenEncoder

        self.net = FrozenEncoder(encoder, size=SIDE, image_size=image_size)
        self.config, self.state_dict = {"encoder": self.net.config}, self.net.state_dict

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.net.device

    def to(self, device: Any) -> Looks:
        """Move it."""
        self.net.to(device)
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, F), float32, of images (B, 3, H, W) in [-1, 1]."""
        with torch.inference_mode():
            return self.net.features(images.to(self.device)).float().mean(1)

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """The same, in half precision, as the one token of each image."""
        y = self(images).half()[:, None]
        size = (self.net.image_size, self.net.image_size)
        return Tokens(y, TokenSpec(kind="continuous", grid=(1,), dim=y.shape[2], image_size=size))


class Memory(nn.Module):
    """Vectors of images, and which caption each has; the words are their model's to keep."""

    axes_FD: torch.Tensor
    vectors_ND: torch.Tensor
    caption_N: torch.Tensor

    def __init__(self, images: int, features: int, dim: int) -> None:
        """Room for N images, of whose F features D principal ones are kept."""
        super().__init__()
        self.register_buffer("axes_FD", torch.zeros(features, dim))
        self.register_buffer("vectors_ND", torch.zeros(images, dim))
        self.register_buffer("caption_N", torch.zeros(images, dtype=torch.long))

    @classmethod
    def of(cls, features_NF: torch.Tensor, caption_N: torch.Tensor, dim: int) -> Memory:
        """Remember images by their features; cosines are kept as well as D axes can.

        Args:
            features_NF: one row an image.
            caption_N: the number of its caption.
            dim: D; at most N and F.
        """
        unit = F.normalize(features_NF.float(), dim=-1)
        axes = torch.linalg.svd(unit, full_matrices=False).Vh[:dim].T
        memory = cls(len(unit), *axes.shape)
        memory.axes_FD.copy_(axes)
        memory.vectors_ND.copy_(F.normalize(unit @ axes, dim=-1))
        memory.caption_N.copy_(caption_N)
        return memory

    def nearest(self, features_BF: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Different captions, that of the most similar image first: cosines and numbers, (B, n) each.

        Args:
            features_BF: of images to look up.
            n: how many; all where there are fewer.
        """
        likeness = F.normalize(features_BF.to(self.axes_FD) @ self.axes_FD, dim=-1) @ self.vectors_ND.T
        captions = int(self.caption_N.max()) + 1
        best = likeness.new_full((len(likeness), captions), -torch.inf)
        best = best.scatter_reduce(1, self.caption_N.expand_as(likeness), likeness, "amax")
        values, indices = best.topk(min(n, captions), dim=1)
        return values, indices
