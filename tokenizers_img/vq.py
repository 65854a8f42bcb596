"""VQ: images to a raster of codes from an l2-normalised codebook (LlamaGen, Sun et al., arXiv 2406.06525, sec. 2.1).

Encodings and codes lie on the unit sphere (ViT-VQGAN, Yu et al., arXiv 2110.04627), with few dimensions. The
codebook learns by gradients, as published. What keeps codes alive: the low dimension and the sphere, as
published, and the entropy term, which is off there; with `shortcut`, the start by k-means is ours.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.noise import Noise
from genlab.processes import mean_of_parts
from genlab.tokens import Tokens, TokenSpec

from .codebook import lloyd, nearest
from .conv import ConvConfig, ConvTokenizer
from .usage import perplexity


@config
class VQConfig(ConvConfig):
    """Sizes of a VQ tokenizer; the defaults are LlamaGen's VQ-16."""

    kind: Literal["vq"] = "vq"
    codes: int = 16384
    """Codebook size."""
    dim: int = 8
    """Channels of a code."""
    commitment: float = 0.25
    """Weight that pulls encodings to their codes, beside 1 for codes to their encodings."""
    entropy: float = 0.0
    """Weight of the entropy term: certain of the code a token, spread over the codes a batch."""


class VQ(ConvTokenizer):
    """Images to a raster of codebook ids."""

    kind = "vq"
    Config = VQConfig
    config: VQConfig
    constant = 2.0  # on the sphere, magnitudes survive only beside a channel that doesn't vary

    def __init__(self, config: VQConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't fit together."""
        c = config
        super().__init__(c, c.dim, nn.Conv2d(c.features, c.dim, 1), nn.Conv2d(c.dim, c.features, 1))
        self.codebook = nn.Parameter(F.normalize(torch.randn(c.codes, c.dim), dim=1))

    @property
    def spec(self) -> TokenSpec:
        """A raster of ids."""
        c = self.config
        return TokenSpec(kind="discrete", grid=(c.side, c.side), vocab=c.codes, image_size=(c.image_size, c.image_size))

    def quantise(self, z_BChw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A map before quantisation to ids (B, h, w) and their unit codes (B, C, h, w)."""
        ids = nearest(F.normalize(rearrange(z_BChw, "b c h w -> (b h w) c"), dim=1), F.normalize(self.codebook, dim=1))
        ids_Bhw = ids.view(len(z_BChw), *z_BChw.shape[2:])
        return ids_Bhw, self.embed(ids_Bhw)

    def embed(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Unit codes (B, C, h, w) of ids."""
        return rearrange(F.normalize(self.codebook, dim=1)[ids_Bhw], "b h w c -> b c h w")

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, h*w); the encoder is deterministic."""
        return Tokens(self.quantise(self.analyse(self.check_images(images)))[0].flatten(1), self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]; the decoder is deterministic."""
        h, w = self.spec.grid
        return self.synthesise(self.embed(tokens.values.unflatten(1, (h, w)))).clamp(-1, 1)

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Straight-through reconstruction; `prior` is codebook, commitment and entropy loss."""
        c = self.config
        z = F.normalize(self.analyse(images), dim=1)
        with torch.autocast(z.device.type, enabled=False):
            ids, code = self.quantise(z)
            terms = {
                "codebook": F.mse_loss(code, z.detach()),
                "commitment": F.mse_loss(z, code.detach()),
                "perplexity": perplexity(torch.bincount(ids.flatten(), minlength=c.codes)).float(),
            }
            terms["prior"] = terms["codebook"] + c.commitment * terms["commitment"]
            if c.entropy:
                terms["entropy"] = entropy_loss(rearrange(z, "b c h w -> (b h w) c"), F.normalize(self.codebook, dim=1))
                terms["prior"] = terms["prior"] + c.entropy * terms["entropy"]
        return self.synthesise(z + (code - z).detach()), terms

    @torch.no_grad()
    def start_codes(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Five rounds of k-means on the sphere."""
        x = F.normalize(rearrange(z_BChw, "b c h w -> (b h w) c"), dim=1)
        for i in range(6):
            ids = nearest(x, self.codebook) if i else torch.zeros(len(x), dtype=torch.long, device=x.device)
            self.codebook.copy_(F.normalize(lloyd(x, ids, self.codebook, seed=i), dim=1))
        return self.quantise(z_BChw)[1]


def entropy_loss(x_NC: torch.Tensor, codebook_VC: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """Mean entropy a token less the entropy of the mean (nats), of soft assignments by squared distance.

    LlamaGen's optional term (weight 0 in its published runs).
    """
    distance = x_NC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1) - 2 * x_NC @ codebook_VC.T
    log_p = (-distance / temperature).log_softmax(-1)
    p = log_p.exp()
    mean = mean_of_parts(p.mean(0))
    return (mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(-1).mean()
