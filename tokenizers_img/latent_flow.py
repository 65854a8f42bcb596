"""What FlexTok and SEED share: a rectified flow over the latents of a frozen autoencoder, given codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange

from genlab.config import config
from genlab.nn.apg import APGConfig
from genlab.noise import Noise
from genlab.tokens import Tokens

from .flextok_nets import Decoder, Given
from .kl_vae import KLVAE, KLVAEConfig


@config
class LatentFlowConfig:
    """The decoder's part of a tokenizer's config."""

    vae: KLVAEConfig = KLVAEConfig(channels=(128, 256, 512, 512), kl_weight=1e-6)
    """The frozen autoencoder, which is part of the checkpoint. Training takes its sizes from `--tokenizer`'s."""
    patch: int = 2
    """Side of a patch of latents, one position of the transformers."""
    head_dim: int = 64
    """Channels of an attention head."""
    kinds: Literal[1, 2] = 2
    """Modulations a block of the decoder: one, or one for patches and one for registers."""
    vector: bool = False
    """Whether all codes together, as one vector, join the time that modulates the decoder: ours, as unCLIP adds
    an image's embedding. Few steps of training then suffice to heed the codes; the published models have none."""
    null: float = 0.1
    """Share of training rows without condition, for guidance."""
    time_mean: float = 0.0
    """Training times are the sigmoid of a normal of this mean; positive favours noise, where the tokens decide."""
    steps: int = 25
    """Euler steps of the decoder, each two evaluations where guided."""
    guidance: float = 7.5
    """Guidance scale of the decoder; 1 is unguided."""
    apg: APGConfig = APGConfig()
    """How guidance is applied; momentum 0, threshold 0 and eta 1 make it plain classifier-free guidance."""

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.vae.image_size

    def make_decoder(self, **sizes: Any) -> Decoder:
        """A decoder of latents; `sizes` are those that aren't told here."""
        c = self
        side = c.image_size // c.vae.downsampling // c.patch
        shared: dict[str, Any] = {"channels": c.vae.latent_channels, "side": side, "patch": c.patch}
        return Decoder(**shared, head_dim=c.head_dim, kinds=c.kinds, vector=c.vector, **sizes)


def draw_latents(
    c: LatentFlowConfig,
    decoder: Decoder,
    codes_BnC: torch.Tensor,
    kept_B: torch.Tensor | None,
    start_BChw: torch.Tensor,
    steps: int | None,
    guidance: float | None,
) -> torch.Tensor:
    """Latents (B, C, h, w), normalised, as `Decoder.draw` gives them; None: the config's steps or guidance."""
    return decoder.draw(
        codes_BnC,
        kept_B,
        start_BChw,
        steps=c.steps if steps is None else steps,
        guidance=c.guidance if guidance is None else guidance,
        apg=c.apg,
    )


def draw_images(
    c: LatentFlowConfig,
    decoder: Decoder,
    vae: KLVAE,
    codes_BnC: torch.Tensor,
    kept_B: torch.Tensor | None,
    seeds_B: torch.Tensor | None,
    steps: int | None,
    guidance: float | None,
) -> torch.Tensor:
    """Images (B, 3, H, W), clamped to [-1, 1], of each row's first kept_B codes; no seeds: the same noise for all."""
    seeds = torch.zeros(len(codes_BnC), dtype=torch.long) if seeds_B is None else seeds_B
    side = vae.spec.grid[0]
    start = Noise(seeds.to(codes_BnC.device), purpose="decoder").normal(c.vae.latent_channels, side, side)
    z = draw_latents(c, decoder, codes_BnC, kept_B, start, steps, guidance)
    return vae.decode(Tokens(rearrange(z, "b c h w -> b (h w) c"), vae.spec))


def flow_errors(
    decoder: Decoder,
    z_BChw: torch.Tensor,
    given: Given,
    t_B: torch.Tensor,
    noise: Noise,
    hidden: int = -1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row's flow matching error, x_t = (1 - t) z + t eps, target eps - z; and what the decoder's `hidden` taps."""
    t = t_B.to(z_BChw)
    eps = noise.at(purpose="noise").normal(*z_BChw.shape[1:]).to(z_BChw)
    x_t = torch.lerp(z_BChw, eps, t[:, None, None, None])
    v, tapped = decoder(x_t, given, decoder.modulations(t, given.vector_BD), hidden)
    return (v.float() - (eps - z_BChw)).square().mean((1, 2, 3)), tapped
