"""Multi-scale residual VQ: images to maps of codes, coarse to fine (VAR, Tian et al., arXiv 2404.02905, alg. 1-2).

Each scale quantises what the scales before it have left over: the residual is averaged down to the scale's
size, replaced by the nearest codes, scaled up again (bicubic) and smoothed by a convolution phi. All scales
share one codebook. The sum of what the scales add is what the decoder sees.

A next-scale generator needs codebook and phis too: it takes a frozen copy (`genlab.nn.scales.ScaleCodes`) of
the tokenizer's `quantiser`, which has the same parameters.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.nn.scales import ScaleCodes
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .codebook import lloyd, nearest
from .conv import ConvConfig, ConvTokenizer
from .usage import perplexity


class MultiScaleQuantiser(ScaleCodes):
    """A map (B, C, H, W) to ids (B, L), scale after scale, and back: `ScaleCodes` that learns and quantises."""

    def __init__(
        self, *, codes: int, dim: int, scales: tuple[tuple[int, int], ...], phis: int = 4, phi_ratio: float = 0.5
    ) -> None:
        """Args: as `ScaleCodes`. Raises: ValueError: if the scales don't grow, from 1 at least."""
        if not scales or any(a[0] > b[0] or a[1] > b[1] for a, b in zip(((1, 1), *scales), scales, strict=False)):
            raise ValueError(f"scales must grow from coarse to fine, from 1 at least, got {scales}")
        super().__init__(codes=codes, dim=dim, scales=scales, phis=phis, phi_ratio=phi_ratio)
        self.lengths = [h * w for h, w in scales]
        nn.init.normal_(self.codebook)
        for phi in self.phis:  # each starts as the identity
            nn.init.dirac_(cast(nn.Conv2d, phi).weight)
            nn.init.zeros_(cast(torch.Tensor, phi.bias))
        self.requires_grad_(True)

    def forward(self, f_BCHW: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A map to ids (B, L), and the map as it stands behind each scale, with gradients to codes and phis."""
        rest, ids = f_BCHW.detach(), []
        maps: list[torch.Tensor] = []
        for s, length in enumerate(self.lengths):
            ids.append(nearest(self.pool(rest, s).flatten(0, 1), self.codebook).view(-1, length))
            added = self.contribution(ids[-1], s)
            maps.append(maps[-1] + added if maps else added)
            rest = rest - added.detach()
        return torch.cat(ids, 1), maps

    def maps(self, ids_BL: torch.Tensor) -> list[torch.Tensor]:
        """The map (B, C, H, W) as it stands behind each scale, from all ids (B, L)."""
        added = [self.contribution(ids, s) for s, ids in enumerate(ids_BL.split(self.lengths, 1))]
        return list(accumulate(added))

    def next_scale_input(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """What a next-scale generator reads for all scales but the first: (B, L - h_0 w_0, C), from all ids (B, L)."""
        inputs = [self.pool(f, s + 1) for s, f in enumerate(self.maps(ids_BL)[:-1])]
        return torch.cat([self.codebook.new_zeros(len(ids_BL), 0, self.codebook.shape[1]), *inputs], 1)


@config
class MSVQConfig(ConvConfig):
    """Sizes of a multi-scale VQ tokenizer; the defaults are VAR's."""

    kind: Literal["msvq"] = "msvq"
    channels: tuple[int, ...] = (160, 160, 320, 320, 640)
    """Width of each level; each but the last halves the resolution."""
    features: int = 32
    """Channels between the networks and the quantiser's own convolutions."""
    codes: int = 4096
    """Codebook size."""
    dim: int = 32
    """Channels of a code."""
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side of each map, coarse to fine."""
    phis: int = 4
    """How many smoothing convolutions the scales share; 0 leaves them out."""
    phi_ratio: float = 0.5
    """phi(x) = (1 - ratio) x + ratio conv(x)."""
    commitment: float = 0.25
    """Weight that pulls the encoder to its codes, beside 1 for codes to the encoder."""


class MSVQ(ConvTokenizer):
    """Images to maps of codebook ids, coarse to fine, one behind the other."""

    kind = "msvq"
    Config = MSVQConfig
    config: MSVQConfig

    def __init__(self, config: MSVQConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't fit together."""
        c = config
        if not c.scales or c.scales[-1] != c.side:
            raise ValueError(f"the last of scales {c.scales} must be the side of the whole map, {c.side}")
        pre, post = nn.Conv2d(c.features, c.dim, 3, padding=1), nn.Conv2d(c.dim, c.features, 3, padding=1)
        super().__init__(c, c.dim, pre, post)
        self.quantiser = MultiScaleQuantiser(
            codes=c.codes, dim=c.dim, scales=self.spec.scales, phis=c.phis, phi_ratio=c.phi_ratio
        )

    @property
    def spec(self) -> TokenSpec:
        """Maps of ids, coarse to fine."""
        c = self.config
        return TokenSpec(
            kind="discrete",
            grid=(c.side, c.side),
            order="scale",
            scales=tuple((s, s) for s in c.scales),
            vocab=c.codes,
            image_size=(c.image_size, c.image_size),
        )

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, L); the encoder is deterministic."""
        return Tokens(self.quantiser(self.analyse(self.check_images(images)))[0], self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]; the decoder is deterministic."""
        return self.synthesise(self.quantiser.maps(tokens.values)[-1]).clamp(-1, 1)

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Straight-through reconstruction; `prior` is codebook and commitment loss, the mean over the scales."""
        z = self.analyse(images)
        with torch.autocast(z.device.type, enabled=False):
            ids, maps = self.quantiser(z)
            terms = {
                "codebook": torch.stack([F.mse_loss(f, z.detach()) for f in maps]).mean(),
                "commitment": torch.stack([F.mse_loss(z, f.detach()) for f in maps]).mean(),
                "perplexity": perplexity(torch.bincount(ids.flatten(), minlength=self.config.codes)).float(),
            }
            terms["prior"] = terms["codebook"] + self.config.commitment * terms["commitment"]
        return self.synthesise(z + (maps[-1] - z).detach()), terms

    @torch.no_grad()
    def start_codes(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """K-means over the residuals that all scales are given; they move with the codes, hence eight rounds."""
        q = self.quantiser
        q.codebook.zero_()
        for i in range(8):
            rest, vectors, ids = z_BChw, [], []
            for s in range(len(q.scales)):
                vectors.append(q.pool(rest, s).flatten(0, 1))
                ids.append(nearest(vectors[-1], q.codebook))
                rest = rest - q.contribution(ids[-1].view(len(rest), -1), s)
            q.codebook.copy_(lloyd(torch.cat(vectors), torch.cat(ids), q.codebook, seed=i))
        return q(z_BChw)[1][-1]
