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

from genlab.nn.lite0 import load_lite0
from genlab.tokens import Tokens, TokenSpec

SIDE = 224
"""Side of the images that the encoder is shown."""


class Looks:
    """A frozen image encoder's pooled features; `cached_tokens` takes it as an encoder."""

    kind = "looks"

    def __init__(self, encoder: str, image_size: int) -> None:
        """Args: encoder: the packaged `efficientnet-lite0`, or a timm model. image_size: side of the images."""
        if encoder == "efficientnet-lite0":
            net: Any = load_lite0()
        else:
            import timm

            net = timm.create_model(encoder, pretrained=True)
        self.config, self.image_size, self.device = {"encoder": encoder}, image_size, torch.device("cpu")
        # channels last: a convolutional network is then twice as quick on a CPU
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(net.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        self.mean, self.std, self.state_dict = mean, std, net.state_dict

    def to(self, device: torch.device) -> Looks:
        """Move it."""
        self.device = torch.device(device)
        self.net.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, F), float32, of images (B, 3, H, W) in [-1, 1]."""
        x = F.interpolate(images.to(self.device), SIDE, mode="bicubic", align_corners=False, antialias=True)
        x = (((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True).float()

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """The same, in half precision, as the one token of each image."""
        y, size = self(images).half()[:, None], (self.image_size, self.image_size)
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
