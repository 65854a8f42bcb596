"""Divot: a clip as 64 continuous tokens, learned by denoising (Ge et al., arXiv 2412.04432).

A frozen image network reads frames; attention over time at each place, then over space and time, and a Perceiver
resampler give the tokens. A video diffusion model on the latents of a frozen autoencoder, conditioned on the tokens,
trains them, and afterwards is the de-tokenizer: tokens that let it denoise a clip must say what moves how.

The release has no training code; the stages here are the paper's: `joint` (all of it, always conditioned),
`detokenizer` (tokens frozen, the condition dropped now and then, for guidance), `adapt` (tokens drawn by a language
model in place of the clip's own).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from genlab.config import config
from genlab.hub import load_strict
from genlab.nn.zero_snr import STEPS, ddim, rescale_guidance, signal_levels
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer
from .divot_nets import Resampler, SpatialTemporalResampler, TemporalEncoder, VideoDiT
from .frame_features import FrameFeatures
from .kl_vae import KLVAE, KLVAEConfig
from .video_unet import VideoUNet, VideoUNetConfig


@config
class DivotConfig:
    """Sizes of a Divot and how it is trained; the defaults are the release's, but for the denoiser."""

    kind: Literal["divot"] = "divot"
    frames: int = 16
    """Frames a clip."""
    fps: float = 8.0
    """Frames a second."""
    read: int = 5
    """Of these, how many the encoder reads, evenly spread, first and last among them."""
    vae: KLVAEConfig = KLVAEConfig(channels=(128, 256, 512, 512), latent_channels=4, kl_weight=1e-6)
    """The frozen autoencoder of frames, which is part of the checkpoint. Training takes its sizes from there."""
    network: str = "vit_huge_patch14_clip_224.laion2b"
    """The frozen image network: a timm model, or the packaged `efficientnet-lite0`. No part of the checkpoint."""
    network_size: int = 224
    """Side of the frames it is given."""
    levels: tuple[int, ...] = ()
    """Which of its feature maps; none: the last. Finer maps are folded into channels."""
    places: int = 16
    """Side of the grid of places at which the temporal encoder works."""
    channels: int = 1280
    """Channels of the features there."""
    pool: int = 5
    """Side of the grid it is pooled to afterwards."""
    width: int = 768
    """Of the temporal encoder."""
    temporal_layers: int = 6
    """Of the temporal encoder."""
    temporal_heads: int = 12
    """Of the temporal encoder."""
    tube: int = 1
    """Frames that follow one another and share a position, in the encoder (of those read) and in the denoiser."""
    dim: int = 1024
    """Of the spatial-temporal blocks and both resamplers."""
    depth: int = 4
    """Spatial-temporal blocks."""
    heads: int = 8
    """Of these blocks."""
    resampler_depth: int = 6
    """Layers of both resamplers."""
    resampler_heads: int = 16
    """Of both resamplers."""
    dim_head: int = 64
    """Channels a head of both resamplers."""
    queries: int = 64
    """Tokens a clip."""
    token_dim: int = 256
    """Channels of a token."""
    context: int = 125
    """Vectors that the de-tokenizer's resampler makes of the tokens."""
    patch: int = 2
    """Side of a patch of latents, one position of the denoiser."""
    denoiser_dim: int = 1024
    """Width of the denoiser."""
    denoiser_depth: int = 24
    """Its blocks; 0: a tokenizer that only encodes, as the release's file of the encoder is."""
    denoiser_heads: int = 16
    """Its heads."""
    unet: VideoUNetConfig | None = None
    """The release's denoiser, DynamiCrafter's U-Net, in place of ours."""
    local: bool = False
    """For small machines, ours: each vector of the condition is also added to one patch of the denoiser (there must be
    as many), and all queries start where they read what lies at their own place of the clip."""
    stage: Literal["joint", "detokenizer", "adapt"] = "joint"
    """What is trained: see the module's docstring."""
    drop: float = 0.05
    """In the later stages, the share of rows whose condition is that of the all-zeros clip."""
    time_bias: float = 1.0
    """Training times are 999 u^(1 / bias), u uniform: above 1 favours noise, where the tokens are all there is."""
    steps: int = 50
    """DDIM steps of the de-tokenizer."""
    eta: float = 1.0
    """Of DDIM: share of DDPM's noise."""
    guidance: float = 7.5
    """Against the all-zeros clip; 1 is unguided."""
    rescale: float = 0.7
    """Of the guided prediction, to the conditional one's spread."""

    @property
    def image_size(self) -> int:
        """Side of the square frames, in pixels."""
        return self.vae.image_size

    @property
    def draws(self) -> bool:
        """Whether there is a de-tokenizer."""
        return self.denoiser_depth > 0 or self.unet is not None


class Divot(Tokenizer):
    """See the module's docstring."""

    kind = "divot"
    Config = DivotConfig
    config: DivotConfig
    seen_mean: torch.Tensor
    seen_std: torch.Tensor

    def __init__(self, config: DivotConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        if not 1 <= c.read <= c.frames:
            raise ValueError(f"the encoder can read 1 to {c.frames} of {c.frames} frames, got {c.read}")
        if not 1 <= c.pool <= c.places:
            raise ValueError(f"{c.places}x{c.places} places can't be pooled to {c.pool}x{c.pool}")
        if c.tube < 1 or c.read % c.tube or c.frames % c.tube:
            raise ValueError(f"{c.frames} frames, of which {c.read} are read, can't be cut into tubes of {c.tube}")
        steps = c.read // c.tube
        self.temporal = TemporalEncoder(
            c.channels * c.tube, c.dim, width=c.width, layers=c.temporal_layers, heads=c.temporal_heads, frames=steps
        )
        self.norm = nn.LayerNorm(c.dim)
        self.register_buffer("seen_mean", torch.zeros(c.channels))
        self.register_buffer("seen_std", torch.ones(c.channels))
        resampler = {"depth": c.resampler_depth, "heads": c.resampler_heads, "dim_head": c.dim_head}
        self.spatial = SpatialTemporalResampler(
            c.dim,
            frames=steps,
            places=c.pool**2,
            depth=c.depth,
            heads=c.heads,
            resampler_depth=c.resampler_depth,
            resampler_heads=c.resampler_heads,
            dim_head=c.dim_head,
            queries=c.queries,
            output_dim=c.token_dim,
        )
        self.features = FrameFeatures(c.network, size=c.network_size, levels=c.levels, side=c.places)
        if not c.draws:
            return
        side = c.image_size // c.vae.downsampling
        patches = c.frames // c.tube * (side // c.patch) ** 2
        if c.local and c.unet is not None:
            raise ValueError("local is the transformer's: the U-Net (unet) has no patches that vectors belong to")
        if c.local and (c.context, c.pool, c.read) != (patches, side // c.patch, c.frames):
            raise ValueError(
                f"local needs a vector of the condition a patch of the denoiser: context {patches}, pool "
                f"{side // c.patch}, read {c.frames}; got {c.context}, {c.pool}, {c.read}"
            )
        self.vae = KLVAE(c.vae).requires_grad_(False)
        self.unpack = Resampler(c.token_dim, c.dim, dim=c.dim, queries=c.context, **resampler)
        self.denoiser: nn.Module
        if c.unet is not None:
            self.denoiser = VideoUNet(c.unet, channels=c.vae.latent_channels, side=side, context=c.dim)
            return
        self.denoiser = VideoDiT(
            channels=c.vae.latent_channels,
            side=side,
            patch=c.patch,
            frames=c.frames,
            dim=c.denoiser_dim,
            depth=c.denoiser_depth,
            heads=c.denoiser_heads,
            context=c.dim,
            tube=c.tube,
            aligned=c.local,
        )

    @property
    def spec(self) -> TokenSpec:
        """Continuous tokens in one dimension, of a clip."""
        c = self.config
        size = (c.frames, c.image_size, c.image_size)
        return TokenSpec(kind="continuous", grid=(c.queries,), dim=c.token_dim, image_size=size)

    # -- clips to tokens ----------------------------------------------------------------------------------------

    def see(self, clips: torch.Tensor) -> torch.Tensor:
        """What the frozen network sees in the frames that are read: (B, T, 3, H, W) to (B, read, places^2, F)."""
        picks = torch.linspace(0, self.config.frames - 1, self.config.read).round().long()
        return self.features(clips[:, picks].flatten(0, 1)).unflatten(0, (len(clips), -1))

    def tokens_of(self, seen_BTPF: torch.Tensor) -> torch.Tensor:
        """Tokens (B, queries, token_dim) of what `see` gives."""
        c, B = self.config, len(seen_BTPF)
        seen = ((seen_BTPF - self.seen_mean) / self.seen_std).to(self.norm.weight.dtype)
        x = self.temporal(rearrange(seen, "b (t k) p f -> (b p) t (k f)", k=c.tube))
        if c.pool < c.places:
            x = rearrange(x, "(b h w) t d -> (b t) d h w", b=B, h=c.places)
            x = rearrange(F.adaptive_avg_pool2d(x, c.pool), "(b t) d h w -> b (t h w) d", b=B)
        else:
            x = rearrange(x, "(b p) t d -> b (t p) d", b=B)
        return self.spatial(self.norm(x))

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Tokens (B, queries, token_dim) of clips (B, T, 3, H, W); there is nothing to draw."""
        return Tokens(self.tokens_of(self.see(self.check_images(images))).float(), self.spec)

    def no_tokens(self) -> torch.Tensor:
        """Tokens (1, queries, token_dim) of the all-zeros clip: what stands for no condition."""
        c = self.config
        blank = torch.zeros(1, c.frames, 3, c.image_size, c.image_size, device=self.norm.weight.device)
        return self.tokens_of(self.see(blank))

    # -- tokens to clips ----------------------------------------------------------------------------------------

    def decode(
        self,
        tokens: Tokens,
        seeds: torch.Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Clips (B, T, 3, H, W) of tokens, clamped to [-1, 1].

        Args:
            tokens: of clips.
            seeds: (B,), decide what the tokens leave open; None: the same noise for every row.
            steps: DDIM steps; None: the config's.
            guidance: its scale; None: the config's.

        Raises:
            ValueError: if this tokenizer only encodes.
        """
        c = self.config
        if not c.draws:
            raise ValueError(
                "this divot only encodes: it has no de-tokenizer (denoiser_depth 0). Train one with `genlab train`"
            )
        z_BTChw = self.draw_latents(tokens.values.to(self.device), seeds, steps=steps, guidance=guidance)
        raster = rearrange(z_BTChw, "b t c h w -> (b t) (h w) c")
        frames = torch.cat([self.vae.decode(Tokens(part, self.vae.spec)) for part in raster.split(64)])
        return frames.unflatten(0, (len(tokens), c.frames))

    def draw_latents(
        self,
        tokens_BQC: torch.Tensor,
        seeds: torch.Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Normalised latents (B, T, C, h, w) that the denoiser draws."""
        c, B = self.config, len(tokens_BQC)
        scale = c.guidance if guidance is None else guidance
        noise = Noise(self.check_seeds(seeds, B), purpose="decoder")
        dtype = self.norm.weight.dtype
        context = self.unpack(tokens_BQC.to(dtype))
        if scale != 1:
            context = torch.cat([context, self.unpack(self.no_tokens()).expand(B, -1, -1)])

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = x.to(dtype)
            if scale == 1:
                return self.denoiser(x, t, context)
            v, free = self.denoiser(x.repeat(2, 1, 1, 1, 1), t.repeat(2), context).float().chunk(2)
            return rescale_guidance(free + scale * (v - free), v, c.rescale)

        side = c.image_size // c.vae.downsampling
        shape = (c.frames, c.vae.latent_channels, side, side)
        return ddim(velocity, noise, shape, steps=c.steps if steps is None else steps, eta=c.eta)

    def latents_of(self, clips: torch.Tensor) -> torch.Tensor:
        """The autoencoder's tokens of every frame: (B, T, 3, H, W) to (B, T, h w, C)."""
        return self.vae.encode(clips.flatten(0, 1)).values.unflatten(0, (len(clips), -1))

    # -- training -----------------------------------------------------------------------------------------------

    def adopt(self, vae: KLVAE) -> None:
        """Take over the weights of a trained autoencoder, which then stay as they are.

        Raises:
            ValueError: if its sizes aren't those of the config.
        """
        load_strict(self.vae, vae.state_dict(), where="the autoencoder under the divot")

    @torch.no_grad()
    def before_training(self, seen_BTPF: torch.Tensor) -> None:
        """Measure the features' mean and deviation a channel; start queries at their places where `local`."""
        flat = seen_BTPF.flatten(0, -2).float()
        self.seen_mean.copy_(flat.mean(0))
        self.seen_std.copy_(flat.std(0).clamp_min(1e-3))
        if self.config.local:
            seen = (seen_BTPF - self.seen_mean) / self.seen_std
            self._start_narrow(rearrange(seen, "b (t k) p f -> (b t p) (k f)", k=self.config.tube))
            self._start_local()

    @torch.no_grad()
    def _start_narrow(self, seen_NF: torch.Tensor) -> None:
        """Start the first projection at the features' principal components, whitened: a random one keeps less."""
        proj = self.temporal.input_proj
        seen = seen_NF[torch.linspace(0, len(seen_NF) - 1, min(len(seen_NF), 4096)).long()]
        q = min(len(proj.weight), *seen.shape)
        _, sizes, basis = torch.svd_lowrank(seen, q=q, niter=2)
        proj.weight[:q] = basis.T / (sizes / len(seen) ** 0.5).clamp_min(1e-3)[:, None]
        nn.init.zeros_(proj.bias)

    @torch.no_grad()
    def _start_local(self) -> None:
        """Let every query begin near what lies at its own place of the clip, so that training need not find it.

        Positions outweigh what they are added to; queries and keys begin with one projection, and each
        query as the projection of the positions that it is to read; what is read passes on as it is.
        """
        sharpness, share = 4.0, 0.35
        for module in (self.spatial.resampler, self.unpack):
            layer: Any = module.layers[0]
            attn = layer.attn
            inner, dim = attn.q.weight.shape
            attn.kv.weight[:inner] = attn.q.weight
            layer.norm1.weight.fill_(sharpness)  # of the input alone: the queries see themselves too
            attn.kv.weight[inner:] = torch.eye(inner, dim)
            attn.proj.weight.copy_(share * torch.eye(dim, inner))
        nn.init.normal_(self.spatial.space, std=1.5)
        nn.init.normal_(self.spatial.time, std=1.5)
        own = (self.spatial.time[:, None] + self.spatial.space).flatten(0, 1)
        n, q = len(own), self.config.queries
        # every query is given a run of positions that follow one another
        of = torch.arange(n) * q // n
        mean = torch.stack([own[of == i].mean(0) if bool((of == i).any()) else own[i % n] for i in range(q)])
        latents = self.spatial.resampler.proj_in(F.layer_norm(mean, mean.shape[-1:]))
        self.spatial.resampler.latents.copy_(latents)
        tokens = self.spatial.resampler.norm_out(self.spatial.resampler.proj_out(latents))
        self.unpack.latents.copy_(self.unpack.proj_in(tokens)[of])

    def draw_times(self, noise: Noise) -> torch.Tensor:
        """Training times (B,) in 0 … 999."""
        u = noise.at(purpose="time").uniform(1)[:, 0]
        return (u ** (1 / self.config.time_bias) * STEPS).long().clamp(max=STEPS - 1)

    def loss(
        self,
        latents_BTPC: torch.Tensor,
        seen_BTPF: torch.Tensor,
        noise: Noise,
        tokens_BQC: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Mean squared error of v; `blind` is that of the noisier half of times.

        Args:
            latents_BTPC: of the frames, by `latents_of`.
            seen_BTPF: by `see`.
            noise: one seed a clip.
            tokens_BQC: given in place of the clip's own (stage `adapt`).
        """
        c = self.config
        side = c.image_size // c.vae.downsampling
        z = rearrange(latents_BTPC, "b t (h w) c -> b t c h w", h=side).float()
        if tokens_BQC is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and c.stage == "joint"):
                tokens_BQC = self.tokens_of(seen_BTPF)
        if c.stage != "joint":
            with torch.no_grad():
                none = self.no_tokens().to(tokens_BQC)
            free = noise.at(purpose="null").uniform(1)[:, 0] < c.drop
            tokens_BQC = torch.where(free[:, None, None], none, tokens_BQC)
        t = self.draw_times(noise)
        a = signal_levels().to(z.device)[t].float()[:, None, None, None, None]
        s = (1 - a.square()).sqrt()
        eps = noise.at(purpose="noise").normal(*z.shape[1:]).to(z)
        v = self.denoiser(a * z + s * eps, t, self.unpack(tokens_BQC)).float()
        each = (v - (a * eps - s * z)).square().mean((1, 2, 3, 4))
        late = t >= STEPS // 2
        blind = (each * late).sum().detach() / late.sum().clamp_min(1)
        return {"loss": each.mean(), "blind": blind}
