"""The loss that the convolutional autoencoders share: pixels, a perceptual distance, and an optional PatchGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from genlab.config import config
from genlab.nn.perceptual import PerceptualDistance
from genlab.noise import Noise

from .base import Tokenizer


@config
class AutoencoderLossConfig:
    """Weights of the terms that train an autoencoder."""

    l1: float = 1.0
    """Mean absolute error over pixels in [-1, 1]."""
    l2: float = 0.0
    """Mean squared error over pixels in [-1, 1]."""
    perceptual: float = 0.5
    """Shift-tolerant LPIPS; 0 leaves it out."""
    perceptual_fraction: float = 1.0
    """Share of each batch that the perceptual term looks at (it is the costliest one on a CPU)."""
    prior: float = 1.0
    """Multiplies the tokenizer's own terms (KL divergence, commitment, …), which carry weights of their own."""
    adversarial: float = 0.0
    """PatchGAN (Isola et al., arXiv 1611.07004), hinge loss; 0 leaves it out."""
    adversarial_start: int = 50_000
    """Images seen before the PatchGAN joins in."""


class PatchGAN(nn.Module):
    """Discriminator over overlapping patches: (B, 3, H, W) to a map of scores."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        """Args: width: channels of the first layer. layers: how often the resolution is halved."""
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            c_in, c_out = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False),
                nn.GroupNorm(8, c_out),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(width * min(2**layers, 8), 1, 4, 1, 1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Scores, high for real patches."""
        return self.net(x_BCHW)


class AutoencoderLoss(nn.Module):
    """Trains a tokenizer that has `reconstruct`; holds the frozen perceptual net and the discriminator."""

    def __init__(self, config: AutoencoderLossConfig) -> None:
        """Args: config: the terms' weights."""
        super().__init__()
        self.config = config
        self.perceptual = PerceptualDistance() if config.perceptual > 0 else None
        self.discriminator = PatchGAN() if config.adversarial > 0 else None

    def forward(
        self, tokenizer: Tokenizer, images: torch.Tensor, noise: Noise, images_seen: int
    ) -> dict[str, torch.Tensor]:
        """The loss terms of one batch; `loss` is the one to minimise.

        One backward pass serves both players: the generator's term sees the discriminator's parameters
        detached, the discriminator's term sees the reconstruction detached.
        """
        c = self.config
        recon, terms = tokenizer.reconstruct(images, noise)
        recon = recon.float()
        terms["l1"] = F.l1_loss(recon, images)
        terms["mse"] = F.mse_loss(recon, images)
        loss = c.l1 * terms["l1"] + c.l2 * terms["mse"] + c.prior * terms.pop("prior")
        if self.perceptual is not None:
            n = max(1, round(len(images) * c.perceptual_fraction))
            terms["perceptual"] = self.perceptual(recon[:n], images[:n]).mean()
            loss = loss + c.perceptual * terms["perceptual"]
        if self.discriminator is not None and images_seen >= c.adversarial_start:
            frozen = {k: v.detach() for k, v in self.discriminator.named_parameters()}
            terms["adversarial"] = -functional_call(self.discriminator, frozen, (recon,)).mean()
            real, fake = self.discriminator(torch.cat([images, recon.detach()])).chunk(2)
            terms["discriminator"] = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            loss = loss + c.adversarial * terms["adversarial"] + terms["discriminator"]
        elif self.discriminator is not None:  # its parameters take part in every step (DDP)
            loss = loss + 0.0 * sum(p.sum() for p in self.discriminator.parameters())
        return {"loss": loss, **{k: v.detach() for k, v in terms.items()}}
