"""KL autoencoder: images to a map of continuous tokens (Rombach et al., arXiv 2112.10752; KL-16 of MAR and xAR).

diffusers' `AutoencoderKL` behind our `Tokenizer`. Training can add scale equivariance (EQ-VAE, Kouzelis et al.,
arXiv 2502.09509): some rows decode their latent map at half resolution into the half-size image. Generators
learn such latents faster, and coarse-to-fine ones (xAR's scales, ECAR) get coarse maps that mean something.

For small machines there is `shortcut`: a linear map between a token and its patch of pixels beside the network
(in the spirit of DC-AE's residual autoencoding, Chen et al., arXiv 2410.10733; the choice of one linear layer and of
its start, the principal components of the training patches, is ours). The network then only learns what is not
linear, and half an hour on one core gives what otherwise takes many.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer
from .conv import Refine, check_refine


@config
class KLVAEConfig:
    """Sizes of a KL autoencoder."""

    kind: Literal["kl_vae"] = "kl_vae"
    image_size: int = 256
    """Side of the square image, in pixels."""
    patch: int = 1
    """Pixels folded into channels before the first layer (space to depth): cheaper, for small machines."""
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Width of each level; each but the last halves the resolution."""
    layers: int = 2
    """Residual blocks a level."""
    latent_channels: int = 16
    """Channels of a token."""
    norm_groups: int = 32
    """Groups of the normalisations."""
    attention_levels: tuple[int, ...] = ()
    """Encoder levels with self-attention (KL-16: the last); the middle block always has it."""
    kl_weight: float = 1e-3
    """Weight of the KL divergence, in nats a pixel value."""
    shortcut: bool = False
    """Add a linear map of patches beside encoder and decoder."""
    equivariance: float = 0.0
    """Share of the batch that is decoded at half resolution while training."""
    refine: int = 0
    """Width of a small residual network over the decoded pixels (at half resolution, two blocks); 0: none. With a large
    `patch` the decoder's last layer writes whole patches, whose seams it can't see; this can."""
    decoder_noise: float = 0.0
    """In training, the decoder sees latents with Gaussian noise of a standard deviation drawn a row from |N(0, this)|,
    in units of the latents' own as last measured: it learns to forgive a generator's small errors (RAE, arXiv
    2510.11690, section 4). They are measured when training ends (before that the unit is 1), so this is meant for a
    second training, with the encoder frozen."""

    @property
    def downsampling(self) -> int:
        """Pixels a token covers, each way."""
        return self.patch * 2 ** (len(self.channels) - 1)


class KLVAE(Tokenizer):
    """Images to a raster of continuous tokens, normalised a channel to mean 0 and standard deviation 1."""

    kind = "kl_vae"
    Config = KLVAEConfig
    config: KLVAEConfig
    latent_mean: torch.Tensor
    latent_std: torch.Tensor

    def __init__(self, config: KLVAEConfig) -> None:
        """Args: config: sizes. Raises: ValueError: if they don't go together."""
        import diffusers

        super().__init__(config)
        c = config
        if not c.channels or not set(c.attention_levels) <= set(range(len(c.channels))):
            raise ValueError(
                f"channels {c.channels} needs at least one level, and attention_levels {c.attention_levels} be of them"
            )
        if c.image_size < 1 or c.image_size % c.downsampling:
            raise ValueError(f"image_size {c.image_size} is not a multiple of the downsampling {c.downsampling}")
        if not 0 <= c.equivariance <= 1:
            raise ValueError(f"equivariance is a share of the batch, in [0, 1], got {c.equivariance}")
        if c.equivariance and (side := c.image_size // c.downsampling) % 2:
            raise ValueError(f"equivariance halves the map of tokens, whose side must be even, got {side}x{side}")
        check_refine(c.refine, c.image_size // 2 if c.equivariance else c.image_size)
        down = [f"{'Attn' * (i in c.attention_levels)}DownEncoderBlock2D" for i in range(len(c.channels))]
        vae: Any = diffusers.AutoencoderKL  # its lazy import hides from the type checker that it is a Module
        self.vae = vae(
            in_channels=3 * c.patch**2,
            out_channels=3 * c.patch**2,
            down_block_types=tuple(down),
            up_block_types=("UpDecoderBlock2D",) * len(c.channels),
            block_out_channels=c.channels,
            layers_per_block=c.layers,
            latent_channels=c.latent_channels,
            norm_num_groups=c.norm_groups,
        ).to(memory_format=torch.channels_last)
        if c.shortcut:
            f = c.downsampling
            self.to_latent = nn.Conv2d(3, c.latent_channels, f, f)
            self.to_pixels = nn.ConvTranspose2d(c.latent_channels, 3, f, f)
        if c.refine:
            self.refine = Refine(c.refine).to(memory_format=torch.channels_last)
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))

    @property
    def spec(self) -> TokenSpec:
        """A raster of continuous tokens."""
        c = self.config
        side = c.image_size // c.downsampling
        return TokenSpec(
            kind="continuous",
            grid=(side, side),
            dim=c.latent_channels,
            image_size=(c.image_size, c.image_size),
        )

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the raw latents, both (B, C, h, w), as the published encoder gives them."""
        images = images.to(self.latent_mean.dtype)
        x = F.pixel_unshuffle(images, self.config.patch).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        mean = posterior.mean + self.to_latent(images) if self.config.shortcut else posterior.mean
        return mean.float(), posterior.logvar.float()

    def decode_latents(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Images of raw latents; any resolution."""
        z = z_BChw.contiguous(memory_format=torch.channels_last)
        x = F.pixel_shuffle(self.vae.decode(z).sample, self.config.patch)
        x = x + self.to_pixels(z) if self.config.shortcut else x
        return self.refine(x) if self.config.refine else x

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Tokens (B, h*w, C): the posterior's mean, or with seeds a sample of it."""
        mean, logvar = self.posterior(self.check_images(images))
        if seeds is not None:
            eps = Noise(self.check_seeds(seeds, len(mean)), purpose="posterior").normal(*mean.shape[1:])
            mean = mean + (0.5 * logvar).exp() * eps.to(mean)
        tokens = (rearrange(mean, "b c h w -> b (h w) c") - self.latent_mean) / self.latent_std
        return Tokens(tokens, self.spec)

    def decode(self, tokens: Tokens, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]; the decoder is deterministic."""
        h, w = self.spec.grid
        z = tokens.values.to(self.latent_mean.dtype) * self.latent_std + self.latent_mean
        return self.decode_latents(rearrange(z, "b (h w) c -> b c h w", h=h, w=w)).float().clamp(-1, 1)

    def reconstruct(self, images: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Decode a sample of the posterior; `prior` is the weighted KL divergence."""
        c = self.config
        mean, logvar = self.posterior(images)
        z = mean + (0.5 * logvar).exp() * noise.at(purpose="posterior").normal(*mean.shape[1:]).to(mean)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / images.numel()
        terms = {"kl": kl, "prior": c.kl_weight * kl}
        if c.decoder_noise:
            level = noise.at(purpose="decoder noise").normal(1)[:, :, None, None].abs() * c.decoder_noise
            eps = noise.at(purpose="decoder noise", step=1).normal(*mean.shape[1:])
            z = z + (level * eps).to(z) * self.latent_std[:, None, None]
        recon = self.decode_latents(z)
        n = round(len(images) * c.equivariance)
        if n:
            half = self.decode_latents(F.avg_pool2d(z[-n:], 2)).float()
            terms["half"] = F.l1_loss(half, F.avg_pool2d(images[-n:], 2))
            terms["prior"] = terms["prior"] + 0.25 * terms["half"]
        return recon, terms

    @torch.no_grad()
    def before_training(self, images: torch.Tensor) -> None:
        """Start the shortcut at the principal components of patches of images (N, 3, H, W), whitened."""
        if not self.config.shortcut:
            return
        f, C = self.config.downsampling, self.config.latent_channels
        patches = F.unfold(images, f, stride=f).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        rounding = (2 / 255) ** 2 / 12  # variance of 8-bit pixels' rounding: flat pictures vary less in most directions
        std, basis = values[-C:].clamp_min(rounding).sqrt(), vectors[:, -C:].T
        self.to_latent.weight.copy_((basis / std[:, None]).view(C, 3, f, f))
        self.to_latent.bias.copy_(-(basis @ mean) / std)  # type: ignore[union-attr]
        self.to_pixels.weight.copy_((basis * std[:, None]).view(C, 3, f, f))
        # one bias a channel: the mean patch's average; what varies inside a patch is left to the network
        self.to_pixels.bias.copy_(mean.view(3, -1).mean(1))  # type: ignore[union-attr]
        for last in (self.vae.quant_conv, self.vae.decoder.conv_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.vae.quant_conv.bias[C:] = -4.0  # log-variance

    @torch.no_grad()
    def fit_normalisation(self, images: torch.Tensor, batch_size: int = 64) -> None:
        """Measure the latents' mean and standard deviation a channel over images (N, 3, H, W)."""
        means = torch.cat([self.posterior(b)[0] for b in images.split(batch_size)])
        self.latent_mean.copy_(means.mean((0, 2, 3)))
        self.latent_std.copy_(means.std((0, 2, 3)).clamp_min(1e-5))
