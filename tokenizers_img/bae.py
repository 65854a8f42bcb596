"""BAE: images to a raster of binary codes (ELM, Liu et al., arXiv 2410.16257, after Wang et al., arXiv 2304.04820).

Each token is k sub-tokens of d bits. The encoder gives a probability a bit; the bit is drawn (Bernoulli) or
rounded, and gradients pass straight through. A token's vector is the sum of the embeddings of the bits that
are 1; bits that are 0 add nothing, so this is not binary spherical quantisation. Images are in [0, 1] inside.
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

from .conv import ConvConfig, ConvTokenizer
from .usage import perplexity, whole_codes


@config
class BAEConfig(ConvConfig):
    """Sizes of a binary autoencoder; the defaults are ELM's with 2 sub-tokens of 12 bits."""

    kind: Literal["bae"] = "bae"
    decoder_layers: int = 2
    """Residual blocks a level of the decoder."""
    sub_tokens: int = 2
    """k, sub-tokens a token."""
    bits: int = 12
    """d, bits a sub-token; its vocabulary is 2^d."""
    deterministic: bool = False
    """Round the bits, also in training and where seeds are given; otherwise draw them."""
    norm_first: bool = True
    """Normalise a token's vector before the decoder."""
    entropy: float = 0.0
    """Weight of the entropy term: certain of its bits a token, spread over the codes a batch."""

    @property
    def all_bits(self) -> int:
        """Bits a token, k d."""
        return self.sub_tokens * self.bits


class BAE(ConvTokenizer):
    """Images to a raster of binary codes, k ids a place."""

    kind = "bae"
    Config = BAEConfig
    config: BAEConfig

    def __init__(self, config: BAEConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't fit together."""
        c, n = config, config.all_bits
        norm = nn.GroupNorm(c.norm_groups, c.features, eps=1e-6) if c.norm_first else nn.Identity()
        post = nn.Sequential(nn.Conv2d(n, c.features, 1, bias=False), norm)
        super().__init__(c, n, nn.Conv2d(c.features, n, 1), post)
        # ELM's networks have no activation between the last normalisation and the last convolution
        for net in (self.encoder, self.decoder):
            net.add_module("conv_act", nn.Identity())

    @property
    def spec(self) -> TokenSpec:
        """A raster of k ids of d bits."""
        c = self.config
        return TokenSpec(
            kind="binary",
            grid=(c.side, c.side),
            vocab=2**c.bits,
            depth=c.sub_tokens,
            image_size=(c.image_size, c.image_size),
        )

    def probabilities(self, unit_images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] to the probability of each bit, (B, k d, h, w)."""
        return self.analyse(unit_images).sigmoid()

    def draw(self, p_BNhw: torch.Tensor, noise: Noise | None) -> torch.Tensor:
        """Bits in {0, 1}, drawn, or rounded where the config says so or there is no noise; like p in shape."""
        if noise is None or self.config.deterministic:
            return (p_BNhw > 0.5).to(p_BNhw)
        u = noise.at(purpose="bits").uniform(*p_BNhw.shape[1:])
        return (u < p_BNhw).to(p_BNhw)

    def to_ids(self, bits_BNhw: torch.Tensor) -> torch.Tensor:
        """Bits to ids (B, h*w, k): consecutive runs of d bits, most significant first."""
        bits = rearrange(bits_BNhw, "b (k d) h w -> b (h w) k d", k=self.config.sub_tokens)
        return whole_codes(bits, 2)

    def to_bits(self, ids_BLK: torch.Tensor) -> torch.Tensor:
        """Ids (B, h*w, k) to bits in {0, 1}, (B, k d, h, w)."""
        c = self.config
        shifts = torch.arange(c.bits - 1, -1, -1, device=ids_BLK.device)
        bits = (ids_BLK[..., None] >> shifts) & 1
        return rearrange(bits, "b (h w) k d -> b (k d) h w", h=c.side).to(self.encoder.conv_in.weight.dtype)

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, h*w, k): the likelier bits, or with seeds bits drawn by their probabilities."""
        p = self.probabilities((self.check_images(images) + 1) / 2)
        noise = None if seeds is None else Noise(self.check_seeds(seeds, len(images)))
        return Tokens(self.to_ids(self.draw(p, noise)), self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]; the decoder is deterministic."""
        return (self.synthesise(self.to_bits(tokens.values)) * 2 - 1).clamp(-1, 1)

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Straight-through reconstruction; `prior` is the entropy term (published runs have no loss on codes)."""
        p = self.probabilities((images + 1) / 2)
        bits = self.draw(p.detach(), noise)
        recon = self.synthesise(bits + p - p.detach()) * 2 - 1
        codes = whole_codes(self.to_ids(bits), 2**self.config.bits)
        terms = {
            "uncertainty": (p * (1 - p)).mean(),  # 1/4 where all bits are coin tosses
            "perplexity": perplexity(codes.unique(return_counts=True)[1]).float(),
            "prior": p.new_zeros(()),
        }
        if self.config.entropy:
            terms["entropy"] = entropy_loss(rearrange(p, "b n h w -> (b h w) n"))
            terms["prior"] = self.config.entropy * terms["entropy"]
        return recon, terms

    @torch.no_grad()
    def before_training(self, images: torch.Tensor) -> None:
        """As `ConvTokenizer`, on images in [0, 1]."""
        super().before_training((images + 1) / 2)

    @torch.no_grad()
    def start_map(self, patches_ND: torch.Tensor) -> None:
        """Iterative quantisation (Gong and Lazebnik, CVPR 2011) of the distinct patches, bits nearly certain.

        The rotation of the principal components whose signs lie nearest to it. Components are first brought
        half way to one scale: else the strong ones take several bits each, and most codes are never used. Codes
        fitted to rebuild the patches are no better at that, and use a third of the codes.
        """
        x, bits = patches_ND.unique(dim=0), self.config.all_bits
        draw = torch.Generator(x.device).manual_seed(0)
        x = x[torch.randperm(len(x), generator=draw, device=x.device)[:32_768]]
        mean = x.mean(0)
        _, scale, basis = torch.linalg.svd(x - mean, full_matrices=False)
        pick = torch.arange(bits, device=x.device) % len(scale)
        basis = basis[pick] / scale[pick, None].clamp_min(1e-6 * scale[0]).sqrt()
        v = (x - mean) @ basis.T
        rotation = torch.linalg.qr(torch.randn(bits, bits, generator=draw, device=x.device).to(x)).Q
        for _ in range(50):
            left, _, right = torch.linalg.svd(v.T @ (v @ rotation).sign())
            rotation = left @ right
        weight = rotation.T @ basis
        weight *= 4 / F.linear(patches_ND, weight).std(0).clamp_min(1e-6)[:, None]
        self.to_map.weight.copy_(weight.view_as(self.to_map.weight))
        self.to_map.bias.copy_(-(weight @ mean))  # type: ignore[union-attr]

    def start_codes(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Nothing to choose: bits are the signs of the map."""
        return (z_BChw > 0).to(z_BChw)


def entropy_loss(p_TN: torch.Tensor) -> torch.Tensor:
    """Mean entropy a token less the entropy of the codes over all tokens (nats), from bits' probabilities (T, N).

    The term of lookup-free quantisation (MAGVIT-v2, Yu et al., arXiv 2310.05737). Bits are independent given the
    image, so both are exact: a code's share is the mean of products, gathered from the two halves of the bits.
    """
    p = p_TN.float()
    first, second = (_joint(half) for half in p.tensor_split(2, 1))
    share = mean_of_parts((first.T @ second).flatten() / len(p))
    token = (torch.special.entr(p.clamp_min(1e-9)) + torch.special.entr((1 - p).clamp_min(1e-9))).sum(1).mean()
    return token - torch.special.entr(share.clamp_min(1e-9)).sum()


def _joint(p_TN: torch.Tensor) -> torch.Tensor:
    """Probabilities (T, 2^N) of all values of N independent bits, the first bit most significant."""
    joint = p_TN.new_ones(len(p_TN), 1)
    for bit in p_TN.unbind(1):
        joint = torch.stack([joint * (1 - bit)[:, None], joint * bit[:, None]], 2).flatten(1)
    return joint
