"""RVQ: images to a raster of stacks of codes, each depth quantising what the one before left over.

Residual quantisation over a convolutional autoencoder, as RQ-VAE (Lee et al., arXiv 2203.01941) and ResGen (Kim et
al., arXiv 2412.10208) use it; the codebooks learn by moving averages and dead codes are revived (van den Oord et al.,
arXiv 1711.00937; SoundStream, arXiv 2107.03312), by vector-quantize-pytorch, which also synchronises them
over processes. In training some rows are decoded from their first depths only (SoundStream's quantiser dropout, here a
row at a time), so that any `Tokens.first_depths(d)` is a whole image.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .conv import ConvConfig, ConvTokenizer
from .usage import perplexity


@config
class RVQConfig(ConvConfig):
    """Sizes of an RVQ tokenizer."""

    kind: Literal["rvq"] = "rvq"
    codes: int = 1024
    """Codebook size, of each depth."""
    depth: int = 8
    """Depths D: codes a position."""
    dim: int = 64
    """Channels of a code."""
    decay: float = 0.99
    """Of the moving averages that are the codebooks, a step."""
    revive: float = 0.05
    """A code that (by moving average) fewer vectors a batch choose than this becomes one of the batch's vectors."""
    commitment: float = 0.25
    """Weight that pulls encodings to their codes, the mean over the depths."""
    depth_drop: float = 0.5
    """Share of training rows that are decoded from their first 1 to D - 1 depths only."""


class RVQ(ConvTokenizer):
    """Images to a raster of D codes a position, coarse to fine."""

    kind = "rvq"
    Config = RVQConfig
    config: RVQConfig

    def __init__(self, config: RVQConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't fit together."""
        from vector_quantize_pytorch import ResidualVQ

        c = config
        if c.depth < 1 or not 0 <= c.depth_drop <= 1:
            raise ValueError(f"depth must be at least 1 and depth_drop in [0, 1], got {c.depth} and {c.depth_drop}")
        super().__init__(c, c.dim, nn.Conv2d(c.features, c.dim, 1), nn.Conv2d(c.dim, c.features, 1))
        self.quantiser: Any = ResidualVQ(
            dim=c.dim,
            num_quantizers=c.depth,
            codebook_size=c.codes,
            decay=c.decay,
            threshold_ema_dead_code=c.revive,
            kmeans_init=c.shortcut,
        )
        self._wait_for_codes(False)

    @property
    def spec(self) -> TokenSpec:
        """A raster of stacks of ids."""
        c = self.config
        return TokenSpec(
            kind="residual",
            grid=(c.side, c.side),
            vocab=c.codes,
            depth=c.depth,
            image_size=(c.image_size, c.image_size),
        )

    @property
    def codebooks(self) -> torch.Tensor:
        """The codes (D, V, C)."""
        return self.quantiser.codebooks

    def embed(self, ids_BLD: torch.Tensor, depths_B: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the codes of ids (B, L, D), of each row's first depths_B only: (B, L, C)."""
        codes = self.quantiser.get_codes_from_indices(ids_BLD)
        return (codes if depths_B is None else codes * self._first(depths_B)).sum(0)

    def _first(self, depths_B: torch.Tensor) -> torch.Tensor:
        depth = torch.arange(self.config.depth, device=depths_B.device)
        return (depth[:, None] < depths_B)[:, :, None, None]

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, h*w, D); the encoder is deterministic."""
        z = rearrange(self.analyse(self.check_images(images)), "b c h w -> b (h w) c")
        return Tokens(self.quantiser(z, freeze_codebook=True)[1], self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of the depths that `tokens` keep; the decoder is deterministic."""
        h, w = self.spec.grid
        code = self.embed(tokens.values, tokens.depths)
        return self.synthesise(rearrange(code, "b (h w) c -> b c h w", h=h, w=w)).clamp(-1, 1)

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Straight-through reconstruction from all depths or a row's first few; `prior` is the commitment loss.

        Codes follow the encoder: where it is frozen, they stay.
        """
        c = self.config
        z = self.analyse(images)
        h, w = z.shape[2:]
        with torch.autocast(z.device.type, enabled=False):
            x = rearrange(z, "b c h w -> b (h w) c").float()
            _, ids, losses, codes = self.quantiser(x, return_all_codes=True, freeze_codebook=not x.requires_grad)
            u = noise.at(purpose="depth").uniform(2)
            fewer = 1 + (u[:, 1] * (c.depth - 1)).long()
            depths = torch.where((u[:, 0] < c.depth_drop) & (c.depth > 1), fewer, c.depth)
            code = (codes.detach() * self._first(depths)).sum(0)
            counts = [torch.bincount(i.flatten(), minlength=c.codes) for i in ids.unbind(-1)]
            terms = {
                "commitment": losses.mean(),
                "perplexity": torch.stack([perplexity(n) for n in counts]).mean().float(),
            }
            terms["prior"] = c.commitment * terms["commitment"]
            quantised = rearrange(x + (code - x).detach(), "b (h w) c -> b c h w", h=h, w=w)
        return self.synthesise(quantised), terms

    def _wait_for_codes(self, wait: bool) -> None:
        """Whether the library is to start its codes by k-means at the next vectors, be they only encoded."""
        for layer in self.quantiser.layers:
            layer._codebook.initted.fill_(not wait)

    @torch.no_grad()
    def start_codes(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """K-means depth by depth, by the library."""
        x = rearrange(z_BChw, "b c h w -> b (h w) c")
        self._wait_for_codes(True)
        was = self.quantiser.training
        self.quantiser.train()(x)
        code = self.embed(self.quantiser.eval()(x)[1])
        self.quantiser.train(was)
        return rearrange(code, "b (h w) c -> b c h w", h=z_BChw.shape[2])
