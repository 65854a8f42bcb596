"""FlexTok: an image as 1 to 256 ordered tokens (Bachmann et al., arXiv 2502.13967).

A transformer reads the latents of a frozen KL autoencoder into registers, of which each becomes one FSQ id. The
decoder is a rectified flow on the latents, conditioned on the first k registers; in training k is drawn anew for every
image (nested dropout, Rippel et al., arXiv 1402.0915), so the first tokens learn to say most. Any first k of them
decode to a whole image: few tokens to a plausible one, many to this one.

Written from the paper and from recorded outputs, not from Apple's code, whose licence allows neither.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from genlab.config import config
from genlab.hub import load_strict
from genlab.nn.apg import APGConfig
from genlab.noise import Noise
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer
from .flextok_nets import Decoder, Encoder
from .fsq import FSQ, fsq_usage
from .kl_vae import KLVAE, KLVAEConfig

Nested = Literal["uniform", "pow2", "uniform_pow2"]
Times = Literal["logit_normal", "stratified", "mode"]


@config
class FlexTokConfig:
    """Sizes of a FlexTok and how it is trained; the defaults are d18-d28 at 256x256."""

    kind: Literal["flextok"] = "flextok"
    vae: KLVAEConfig = KLVAEConfig(channels=(128, 256, 512, 512), kl_weight=1e-6)
    """The frozen autoencoder, which is part of the checkpoint. Training takes its sizes from `--tokenizer`'s."""
    patch: int = 2
    """Side of a patch of latents, one position of the transformers."""
    head_dim: int = 64
    """Channels of an attention head."""
    kinds: Literal[1, 2] = 2
    """Modulations a block of the decoder: one, or one for patches and one for registers."""
    draft: int = 0
    """Width of an MLP that reads all kept codes at once; 0: none. What it makes of them joins the time that modulates
    the decoder (as unCLIP adds an image's embedding), and a draft of the latents, learned by its own squared error,
    joins the noisy patches. Ours: codes so learn what to say before the flow has learned to listen."""
    precondition: bool = False
    """Whether the network predicts only what a linear guess from the noisy latents leaves of the velocity, at unit
    variance: EDM's idea (arXiv 2206.00364) for this flow. Ours: a narrow decoder need not carry the noise through."""
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
    registers: int = 256
    """Tokens an image."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """FSQ levels of each channel of a code; the vocabulary is their product."""
    encoder_dim: int = 1152
    """Width of the encoder (the paper: 64 times the depth)."""
    encoder_depth: int = 18
    """Blocks of the encoder."""
    decoder_dim: int = 1792
    """Width of the decoder."""
    decoder_depth: int = 28
    """Blocks of the decoder."""
    learned_null: bool = True
    """What stands for no condition: a learned vector, or zeros."""
    nested: Nested = "pow2"
    """Nested dropout, how many registers stay: any number; a power of two; any number, rounded up to a power of two."""
    times: Times = "logit_normal"
    """Law of the training times: sigmoid of a normal; evenly spread over a batch; SD3's `mode` (arXiv 2403.03206)."""
    mode_scale: float = 1.29
    """Of `mode`: positive favours the middle."""
    code_noise: float = 0.0
    """Share of the code's values that get noise in place of rounding, in training: see `fsq`."""
    spread: float = 0.0
    """Weight of the entropy that spreads each channel over its levels."""
    repa: str = ""
    """Align the decoder's patches with features of a frozen network in training (REPA, arXiv 2410.06940): the packaged
    `efficientnet-lite0`, or a timm model, e.g. `vit_large_patch14_reg4_dinov2` (the paper's); empty: don't."""
    repa_weight: float = 1.0
    """Weight of that term."""
    repa_block: int = 1
    """Number of the decoder's block whose output is aligned; the first is 0."""

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.vae.image_size


class FlexTok(Tokenizer):
    """See the module's docstring."""

    kind = "flextok"
    Config = FlexTokConfig
    config: FlexTokConfig

    def __init__(self, config: FlexTokConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        latent_side = c.vae.image_size // c.vae.downsampling
        if c.patch < 1 or latent_side % c.patch:
            raise ValueError(f"latents of {latent_side}x{latent_side} can't be cut into patches of side {c.patch}")
        if c.encoder_dim % c.head_dim or c.decoder_dim % c.head_dim:
            raise ValueError(f"widths {c.encoder_dim}, {c.decoder_dim} are not multiples of head_dim {c.head_dim}")
        if c.registers < 1:
            raise ValueError(f"registers must be at least 1, got {c.registers}")
        if c.repa and not 0 <= c.repa_block < c.decoder_depth:
            raise ValueError(f"repa_block {c.repa_block} is none of the decoder's {c.decoder_depth} blocks")
        self.vae = KLVAE(c.vae).requires_grad_(False)
        self.fsq = FSQ(c.levels)
        self.encoder = Encoder(
            channels=c.vae.latent_channels,
            side=latent_side // c.patch,
            patch=c.patch,
            registers=c.registers,
            dim=c.encoder_dim,
            depth=c.encoder_depth,
            head_dim=c.head_dim,
            out=len(c.levels),
        )
        self.decoder = Decoder(
            channels=c.vae.latent_channels,
            side=latent_side // c.patch,
            patch=c.patch,
            registers=c.registers,
            dim=c.decoder_dim,
            depth=c.decoder_depth,
            head_dim=c.head_dim,
            code_dim=len(c.levels),
            kinds=c.kinds,
            learned_null=c.learned_null,
            draft=c.draft,
            precondition=c.precondition,
        )

    @property
    def spec(self) -> TokenSpec:
        """Ids in one dimension, coarse to fine."""
        c = self.config
        return TokenSpec(
            kind="discrete",
            grid=(c.registers,),
            order="coarse_to_fine",
            vocab=self.fsq.vocab,
            image_size=(c.image_size, c.image_size),
        )

    # -- images and tokens ------------------------------------------------------------------------------------

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, registers), of the latents' mean, or with seeds of a sample of them."""
        latents = self.vae.encode(images, seeds)
        return Tokens(self.fsq(self.encoder(self._map(latents.values)))[1], self.spec)

    def decode(
        self,
        tokens: Tokens,
        seeds: torch.Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of each row's first `tokens.kept` tokens.

        Args:
            tokens: ids; rows may keep different numbers of them.
            seeds: (B,), decide what the tokens leave open; None: the same noise for every row.
            steps: Euler steps; None: the config's.
            guidance: its scale; None: the config's.
        """
        ids, (h, w) = tokens.values.to(self.device), self.vae.spec.grid
        noise = Noise(self.check_seeds(seeds, len(ids)), purpose="decoder")
        start = noise.normal(self.config.vae.latent_channels, h, w)
        z = self.draw_latents(ids, tokens.kept, start, steps=steps, guidance=guidance)
        return self.vae.decode(Tokens(rearrange(z, "b c h w -> b (h w) c"), self.vae.spec))

    def draw_latents(
        self,
        ids_Bn: torch.Tensor,
        kept_B: torch.Tensor | None,
        start_BChw: torch.Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Latents (B, C, h, w), normalised, that the flow carries its start to: t = 1 to 0 in even Euler steps.

        Raises:
            ValueError: for fewer than one step.
        """
        c = self.config
        return self.decoder.draw(
            self.fsq.codes(ids_Bn),
            kept_B,
            start_BChw,
            steps=c.steps if steps is None else steps,
            guidance=c.guidance if guidance is None else guidance,
            apg=c.apg,
        )

    def usage(self, batches: list[Tokens]) -> dict[str, Any]:
        """How much of the codebook these tokens use, by code, by channel and level, and by position."""
        return fsq_usage(self.fsq, batches)

    def _map(self, latents_BLC: torch.Tensor) -> torch.Tensor:
        """Raster tokens of the autoencoder as a map (B, C, h, w)."""
        return rearrange(latents_BLC, "b (h w) c -> b c h w", h=self.vae.spec.grid[0])

    # -- training ---------------------------------------------------------------------------------------------

    def adopt(self, vae: KLVAE) -> None:
        """Take over the weights of a trained autoencoder, which then stay as they are.

        Raises:
            ValueError: if its sizes aren't those of the config.
        """
        load_strict(self.vae, vae.state_dict(), where="the autoencoder under the flextok")

    def keep(self, noise: Noise) -> torch.Tensor:
        """How many registers stay, (B,) in 1 … n."""
        n, u = self.config.registers, noise.at(purpose="nested dropout").uniform(1)[:, 0]
        powers = torch.tensor(sorted({min(2**i, n) for i in range(n.bit_length() + 1)}), device=u.device)
        if self.config.nested == "pow2":
            return powers[(u * len(powers)).long()]
        k = (u * n).long() + 1
        return k if self.config.nested == "uniform" else powers[torch.searchsorted(powers, k)]

    def draw_times(self, noise: Noise) -> torch.Tensor:
        """Training times (B,) in (0, 1)."""
        c, noise = self.config, noise.at(purpose="time")
        if c.times == "logit_normal":
            return (noise.normal(1)[:, 0] + c.time_mean).sigmoid()
        u = noise.uniform(1)[:, 0]
        if c.times == "stratified":
            return (u.argsort().argsort() + noise.at(step=1).uniform(1)[:, 0]) / len(u)
        return 1 - u - c.mode_scale * ((torch.pi / 2 * u).cos() ** 2 - 1 + u)

    def loss(
        self, latents_BLC: torch.Tensor, noise: Noise, target_BPF: torch.Tensor | None = None, project: object = None
    ) -> dict[str, torch.Tensor]:
        """Flow matching, x_t = (1 - t) z + t eps, target eps - z; the draft's error, the quantiser's spread and REPA;
        `loss` is minimised.

        Args:
            latents_BLC: tokens of the frozen autoencoder.
            noise: one seed an image.
            target_BPF: REPA's features of each patch of latents; None leaves the term out.
            project: REPA's projector, (B, P, D) to (B, P, F).
        """
        c, z = self.config, self._map(latents_BLC)
        before = self.encoder(z)
        dither = noise.at(purpose="code noise").uniform(*before.shape[1:], 2) if c.code_noise else None
        codes, ids = self.fsq(before, dither, c.code_noise)
        kept = self.keep(noise)
        free = noise.at(purpose="null").uniform(1)[:, 0] < c.null
        given = self.decoder.condition(codes, kept, free)
        tap = -1 if target_BPF is None else c.repa_block
        t = self.draw_times(noise).to(z)
        eps = noise.at(purpose="noise").normal(*z.shape[1:]).to(z)
        x_t = torch.lerp(z, eps, t[:, None, None, None])
        v, hidden = self.decoder(x_t, given, self.decoder.modulations(t, given.vector_BD), tap)
        each = (v.float() - (eps - z)).square().mean((1, 2, 3))
        with torch.autocast(z.device.type, enabled=False):
            terms = {"loss": each.mean(), "spread": self.fsq.spread(before)}
            if given.draft_BChw is not None:
                draft = F.mse_loss(given.draft_BChw.float(), z)
                terms |= {"loss": terms["loss"] + draft, "draft": draft.detach()}
        terms["flow"] = each.mean().detach()
        few = kept * 8 <= c.registers
        terms["flow_few"] = (each * few).sum().detach() / few.sum().clamp_min(1)
        terms["distinct"] = torch.tensor(float(len(ids.unique())), device=z.device)
        if c.spread:
            terms["loss"] = terms["loss"] - c.spread * terms["spread"]
        terms["spread"] = terms["spread"].detach()
        if target_BPF is not None:
            assert callable(project)
            cosine = torch.cosine_similarity(project(hidden).float(), target_BPF.float(), dim=-1).mean()
            terms["alignment"] = cosine.detach()
            terms["loss"] = terms["loss"] - c.repa_weight * cosine
        return terms
