"""The identity tokenizer: a patch of raw pixels is a continuous token. Nothing is learned, nothing is lost."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from genlab.config import config
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer


@config
class PixelsConfig:
    """Sizes of the identity tokenizer."""

    kind: Literal["pixels"] = "pixels"
    image_size: int = 64
    """Side of the square image, in pixels."""
    patch: int = 8
    """Side of a patch: a token has 3 patch^2 channels."""


class Pixels(Tokenizer):
    """Images in [-1, 1] to a raster of patches and back, exactly; channels go colour, row, column."""

    kind = "pixels"
    Config = PixelsConfig
    config: PixelsConfig

    def __init__(self, config: PixelsConfig) -> None:
        """Args: config: sizes. Raises: ValueError: if the image size isn't a multiple of the patch."""
        super().__init__(config)
        if config.patch < 1 or config.image_size % config.patch:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the patch {config.patch}")

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens."""
        c = self.config
        side = c.image_size // c.patch
        size = (c.image_size, c.image_size)
        return TokenSpec(kind="continuous", grid=(side, side), dim=3 * c.patch**2, image_size=size)

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Tokens (B, h*w, 3 p^2); `seeds` change nothing."""
        x = F.pixel_unshuffle(self.check_images(images), self.config.patch)
        return Tokens(rearrange(x, "b c h w -> b (h w) c"), self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]."""
        x = rearrange(tokens.values, "b (h w) c -> b c h w", h=self.spec.grid[0])
        return F.pixel_shuffle(x, self.config.patch).clamp(-1, 1)
