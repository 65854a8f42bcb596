"""SEED: an image as 32 causal codes, made to be read and written by a language model (Ge et al., arXiv 2310.01218).

A frozen image encoder → a causal Q-Former → a vector quantiser: code i knows of the queries up to i, as words do. The
codes serve two ends. Seeing: reconstructed into the Q-Former's embeddings, of which the last is compared with text.
Drawing: regressed onto the embedding that a frozen image generator takes (`unclip`, SEED-2: one image embedding;
`sd_text77`, SEED-1, arXiv 2307.08041: Stable Diffusion's text features), and drawn by it through diffusers; or, which
needs no foreign weights, by a generator of ours that was taught to read the codes in a caption's place.

Two stages: `contrastive` (Q-Former), `codes` (quantiser and what reads it). What draws is trained aside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.hub import from_pretrained
from genlab.nn.layers import number
from genlab.noise import Noise
from genlab.processes import batch_mean, rows_of_all_parts
from genlab.registry import SAMPLERS
from genlab.text import Text, TextEncoder
from genlab.tokens import Tokens, TokenSpec

from .base import Tokenizer
from .codebook import lloyd, nearest
from .qformer import LITE0, FrozenEncoder, QFormer, vit_blocks
from .usage import perplexity


@config
class SEEDConfig:
    """Sizes of a SEED and how it is trained; the defaults are the published SEED-2's."""

    kind: Literal["seed"] = "seed"
    image_size: int = 768
    """Side of the images it takes and gives; the encoder is shown them at `encoder_size`."""
    encoder: str = "eva_giant_patch14_224"
    """The frozen image encoder: the packaged `efficientnet-lite0`, a timm model, or (with a slash) a folder or Hub id
    of a vision model of transformers."""
    encoder_args: dict[str, Any] = dataclasses.field(default_factory=lambda: {"depth": 39})
    """Of timm's `create_model`, where the sizes are not the name's."""
    encoder_size: int = 224
    """Side of the image that the encoder sees."""
    encoder_dim: int = 1408
    """Channels of its features."""
    encoder_saved: bool = False
    """Whether its weights are part of the checkpoint, as in the published one, or come by its name."""
    queries: int = 32
    """Codes an image."""
    dim: int = 768
    """Width of the Q-Former and of what reads the codes."""
    depth: int = 12
    """Layers of the Q-Former."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 3072
    """Width of the Q-Former's feed-forward networks."""
    cross_every: int = 2
    """The Q-Former looks at the image in every so many layers, from the first on."""
    dropout: float = 0.1
    """Of the Q-Former, in stage 1."""
    contrastive_dim: int = 256
    """Channels of the space that images and captions share; 0: none (the published file holds no text side). With
    `text_dim` channels it starts as the text encoder's own space, where `--freeze text_head` keeps it (ours: few
    captions don't teach a space that holds for others)."""
    text_encoder: str = "minilm"
    """Whose embeddings of a caption, averaged, go into that space."""
    text_dim: int = 384
    """Their channels."""
    text_length: int = 32
    """Word pieces a caption at most."""
    codes: int = 8192
    """Codebook size."""
    code_dim: int = 32
    """Channels of a code."""
    blocks: int = 4
    """Vision-transformer blocks that restore the embeddings from codes, and as many towards the generator; 0 of the
    first where the published file has left them out, see `restores`."""
    restores: bool = True
    """Whether the blocks that restore the Q-Former's embeddings are there; `embed_codes` needs them."""
    target: Literal["unclip", "sd_text77"] = "unclip"
    """What the generator takes: one image embedding, or a sequence of text features."""
    target_dim: int = 1024
    """Its channels."""
    target_tokens: int = 77
    """Of `sd_text77`: its length."""
    reverse: Literal["qformer", "down"] = "down"
    """What turns 32 vectors into the target: a second Q-Former, or (`unclip` only) narrow layers and a projection."""
    target_from: str = ""
    """Who gives the target in stage 2: a folder or Hub id of transformers (a CLIP); empty: a stand-in, the mean of the
    encoder's features, normalised (`unclip`), or the text encoder's embeddings (`sd_text77`)."""
    diffusion: str = ""
    """A diffusers pipeline that draws the target, a folder or Hub id: a StableUnCLIPImg2ImgPipeline (`unclip`) or a
    StableDiffusionPipeline (`sd_text77`)."""
    generator: str = ""
    """A generator of ours that draws from the codes, a MODEL trained by `xar-seed-emoji64`'s recipe."""
    diffusion_steps: int = 20
    """Its steps."""
    diffusion_guidance: float = 10.0
    """Its guidance scale."""
    own_down: bool = False
    """Whether each query has a linear map of its own to its code, in place of one network for all. Ours: a narrow
    Q-Former's queries say much the same, and so would their codes."""
    keep: float = 0.0
    """Stage 1: weight of the mean square error to the generation target, from the encodings before they are quantised.
    Ours; 0: none, and all queries but the last are what they happen to be."""
    weights: tuple[float, float, float] = (5.0, 2.0, 0.5)
    """Stage 2: of the VQ term, of the cosine to the Q-Former's embeddings, and of the generation target."""
    contrast: float = 0.0
    """Stage 2: weight of stage 1's loss on the last embedding that the codes restore, heads frozen. Ours; 0: none."""
    stage: Literal["contrastive", "codes"] = "contrastive"
    """What training trains."""


PARTS: dict[str, tuple[str, ...]] = {
    "contrastive": ("encoder", "norm", "qformer", "image_head", "text_head", "temperature"),
    "codes": (
        "down", "codebook", "up", "positions", "blocks", "target_positions", "target_blocks", "reverse", "to_target",
    ),
}  # fmt: skip
"""What each stage trains (but for the encoder, which is frozen), by the first part of the parameters' names."""
KEEPERS = ("down", "up", "target_positions", "target_blocks", "reverse", "to_target")
"""What stage 1 trains beside, where it is to `keep` the generation target."""


class OwnLinear(nn.Module):
    """A linear map for each query: (B, N, D) to (B, N, C)."""

    def __init__(self, queries: int, dim: int, channels: int) -> None:
        """Args: queries: N. dim: D. channels: C."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(queries, dim, channels) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(queries, channels))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """All queries' maps."""
        return torch.einsum("bnd,ndc->bnc", x_BND, self.weight.to(x_BND)) + self.bias.to(x_BND)


class SEED(Tokenizer):
    """See the module's docstring."""

    kind = "seed"
    Config = SEEDConfig
    config: SEEDConfig

    def __init__(self, config: SEEDConfig) -> None:
        """Args: config: sizes. Raises: ValueError: for sizes that don't go together."""
        super().__init__(config)
        c = config
        if c.reverse == "down" and c.target != "unclip":
            raise ValueError("reverse `down` gives one embedding; for `sd_text77` take reverse `qformer`")
        sizes: dict[str, Any] = {
            "dim": c.dim,
            "depth": c.depth,
            "heads": c.heads,
            "hidden": c.hidden,
            "cross_every": c.cross_every,
        }
        self.encoder = self._make_encoder(pretrained=False) if c.encoder_saved else None
        self._outside: dict[str, Any] = {}  # frozen networks that come by name: not part of the checkpoint
        self.norm = nn.LayerNorm(c.encoder_dim)
        self.qformer = QFormer(queries=c.queries, context_dim=c.encoder_dim, causal=True, dropout=c.dropout, **sizes)
        if c.contrastive_dim:
            self.image_head = nn.Linear(c.dim, c.contrastive_dim)
            self.text_head = nn.Linear(c.text_dim, c.contrastive_dim)
            if c.contrastive_dim == c.text_dim:
                nn.init.eye_(self.text_head.weight)
                nn.init.zeros_(self.text_head.bias)
            self.temperature: nn.Parameter
            number(self, "temperature", 0.07)
        self.down: nn.Module
        if c.own_down:
            self.down = OwnLinear(c.queries, c.dim, c.code_dim)
        else:
            self.down = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, c.code_dim))
        self.codebook = nn.Parameter(torch.empty(c.codes, c.code_dim).uniform_(-1 / c.codes, 1 / c.codes))
        self.up = nn.Sequential(nn.Linear(c.code_dim, c.code_dim), nn.Tanh(), nn.Linear(c.code_dim, c.dim))
        if c.restores:
            self.positions = nn.Parameter(torch.zeros(c.queries, c.dim))
            self.blocks = vit_blocks(c.dim, c.blocks, c.heads)
        self.target_positions = nn.Parameter(torch.zeros(c.queries, c.dim))
        self.target_blocks = vit_blocks(c.dim, c.blocks, c.heads)
        if c.reverse == "qformer":
            n = c.target_tokens if c.target == "sd_text77" else 1
            self.reverse: nn.Module = QFormer(queries=n, context_dim=c.dim, causal=False, **sizes)
            self.to_target = nn.Linear(c.dim, c.target_dim)
        else:
            widths = (c.dim, 256, 128, 32)
            layers: list[nn.Module] = []
            for a, b in zip(widths, widths[1:], strict=False):
                layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
            self.reverse = nn.Sequential(*layers[:-1])
            self.to_target = nn.Linear(32 * c.queries, c.target_dim)

    @property
    def spec(self) -> TokenSpec:
        """Ids in one dimension, in the order a language model reads them."""
        c = self.config
        size = (c.image_size, c.image_size)
        return TokenSpec(kind="discrete", grid=(c.queries,), order="coarse_to_fine", vocab=c.codes, image_size=size)

    # -- frozen networks ----------------------------------------------------------------------------------------

    def _make_encoder(self, pretrained: bool) -> FrozenEncoder:
        c = self.config
        return FrozenEncoder(
            c.encoder, size=c.encoder_size, image_size=c.image_size, args=c.encoder_args, pretrained=pretrained
        )

    def image_encoder(self) -> FrozenEncoder:
        """The frozen image encoder, loaded on its first use.

        Raises:
            FileNotFoundError: if its weights are not to be had.
        """
        if self.encoder is not None:
            return self.encoder
        if "encoder" not in self._outside:
            self._outside["encoder"] = self._make_encoder(pretrained=True)
        return self._outside["encoder"].to(self.device)

    def reader(self) -> TextEncoder:
        """The frozen text encoder, loaded on its first use."""
        if "text" not in self._outside:
            self._outside["text"] = TextEncoder(self.config.text_encoder, self.config.text_length)
        return self._outside["text"]

    # -- images and codes ---------------------------------------------------------------------------------------

    def causal(self, features_BMF: torch.Tensor) -> torch.Tensor:
        """The Q-Former's causal embeddings (B, N, D) of the encoder's features."""
        return self.qformer(self.norm(features_BMF.to(self.norm.weight)))

    def quantise(self, z_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, N) of the nearest codes, and those codes (B, N, C)."""
        ids = nearest(z_BNC.flatten(0, 1), self.codebook).view(z_BNC.shape[:2])
        return ids, self.codebook[ids]

    def encode(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> Tokens:
        """Ids (B, N); the encoder is deterministic."""
        features = self.image_encoder().features(self.check_images(images))
        return self.encode_features(features)

    def encode_features(self, features_BMF: torch.Tensor) -> Tokens:
        """Ids (B, N) of the frozen encoder's features."""
        return Tokens(self.quantise(self.down(self.causal(features_BMF)))[0], self.spec)

    def restore(self, codes_BNC: torch.Tensor) -> torch.Tensor:
        """The Q-Former's embeddings (B, N, D) as far as the codes hold them.

        Raises:
            ValueError: where the checkpoint lacks the blocks that do it.
        """
        if not self.config.restores:
            raise ValueError("this checkpoint lacks the blocks that restore embeddings from codes")
        return self.blocks(self.up(codes_BNC) + self.positions)

    def target(self, codes_BNC: torch.Tensor) -> torch.Tensor:
        """What the generator is to draw: (B, target_dim), or with `sd_text77` (B, target_tokens, target_dim)."""
        x = self.target_blocks(self.up(codes_BNC) + self.target_positions)
        if self.config.reverse == "down":
            return self.to_target(self.reverse(x).flatten(1))
        y = self.to_target(self.reverse(x))
        return y if self.config.target == "sd_text77" else y[:, 0]

    # -- the space of images and captions ------------------------------------------------------------------------

    def _in_space(self, embeddings_BND: torch.Tensor) -> torch.Tensor:
        self._need_space()
        return F.normalize(self.image_head(embeddings_BND[:, -1]).float(), dim=-1)

    def _need_space(self) -> None:
        if not self.config.contrastive_dim:
            raise ValueError(
                "this checkpoint has no contrastive space (the published file holds no text side): train one, "
                "`genlab train seed-contrastive-emoji64`"
            )

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, E) of images, not quantised: of the last causal embedding.

        Raises:
            ValueError: where there is no such space, or for wrong images.
        """
        return self.embed_features(self.image_encoder().features(self.check_images(images)))

    def embed_features(self, features_BMF: torch.Tensor) -> torch.Tensor:
        """The same of the frozen encoder's features."""
        return self._in_space(self.causal(features_BMF))

    def embed_codes(self, tokens: Tokens) -> torch.Tensor:
        """Unit vectors (B, E) of codes: of the last embedding that they restore.

        Raises:
            ValueError: where there is no such space, the codes can't be restored, or some are left out.
        """
        self._need_all(tokens, "the embedding of an image is that of all its codes")
        return self._in_space(self.restore(self.codebook[tokens.values.to(self.device)]))

    def embed_text(self, captions: Sequence[str] | Text) -> torch.Tensor:
        """Unit vectors (B, E) of captions, given as words or as the text encoder gives them.

        Raises:
            ValueError: where there is no such space.
        """
        self._need_space()
        text = captions if isinstance(captions, Text) else self.reader()(captions)
        text = text.to(self.device)
        e = text.embeds_BTD.to(self.text_head.weight)
        if text.mask_BT is not None:
            m = text.mask_BT.to(e)[..., None]
            e = (e * m).sum(1) / m.sum(1).clamp_min(1)
        else:
            e = e.mean(1)
        return F.normalize(self.text_head(e).float(), dim=-1)

    def _need_all(self, tokens: Tokens, why: str) -> None:
        if tokens.kept is not None and bool((tokens.kept < self.config.queries).any()):
            raise ValueError(f"{why}: all {self.config.queries}, not the first {int(tokens.kept.min())}")

    # -- codes to pictures ----------------------------------------------------------------------------------------

    def decode(
        self,
        tokens: Tokens,
        seeds: torch.Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1].

        Args:
            tokens: ids; a generator of ours also draws from each row's first `tokens.kept`.
            seeds: (B,), decide what the codes leave open; None: the same noise for every row.
            steps: of what draws, a group of tokens where it is ours; None: its own.
            guidance: its scale; None: its own.

        Raises:
            ValueError: if the config names neither a generator nor a pipeline, or a pipeline lacks codes.
        """
        ids = tokens.values.to(self.device)
        if self.config.generator:
            return self._paint(tokens, seeds, steps, guidance)
        self._need_all(tokens, "the pipeline draws from an embedding of all codes")
        noise = Noise(self.check_seeds(seeds, len(ids)), purpose="decoder")
        return self._diffuse(self.target(self.codebook[ids]), noise, steps, guidance)

    def as_text(self, tokens: Tokens) -> Text:
        """The generation target, of each row's first codes where some are left out, as a caption of one embedding.

        Raises:
            ValueError: where the target is a sequence of text features.
        """
        if self.config.target != "unclip":
            raise ValueError("a generator of ours draws from one embedding an image: target `unclip`")
        codes = self.codebook[tokens.values.to(self.device)]
        if tokens.kept is not None:
            there = torch.arange(self.config.queries, device=self.device) < tokens.kept.to(self.device)[:, None]
            codes = codes * there[..., None]
        return Text(self.target(codes)[:, None])

    def painter(self) -> tuple[Any, Any]:
        """The generator and the autoencoder it draws with, loaded on their first use.

        Raises:
            FileNotFoundError: if there is none by that name.
            ValueError: if it draws images of another size.
        """
        if "painter" not in self._outside:
            generator = from_pretrained(self.config.generator)
            vae = from_pretrained(generator.extra["tokenizer"])
            if (size := vae.spec.image_size[0]) != self.config.image_size:
                raise ValueError(f"{self.config.generator} draws {size} pixels, not {self.config.image_size}")
            self._outside["painter"] = generator, vae
        generator, vae = self._outside["painter"]
        return generator.to(self.device), vae.to(self.device)

    def _paint(
        self, tokens: Tokens, seeds: torch.Tensor | None, steps: int | None, guidance: float | None
    ) -> torch.Tensor:
        """Images of codes, drawn by the generator's plain sampler."""
        generator, vae = self.painter()
        plain = SAMPLERS["flow"]
        scale = generator.default_guidance
        scale = scale if guidance is None else dataclasses.replace(scale, scale=guidance)
        seeds = self.check_seeds(seeds, len(tokens))
        sampler = plain(plain.Config(steps=steps, guidance=scale))
        return vae.decode(sampler.sample(generator, self.as_text(tokens), seeds).tokens)

    def pipeline(self) -> Any:
        """The diffusers pipeline, loaded on its first use.

        Raises:
            ValueError: if the config names none.
            FileNotFoundError: if there is none by that name.
        """
        name = self.config.diffusion
        if not name:
            raise ValueError(
                f"this {self.kind} checkpoint can't draw: its config names no generator (train one, `genlab train "
                "xar-seed-emoji64 --codes-of` this one) and no diffusion pipeline (a folder or Hub id of diffusers)"
            )
        if "pipeline" not in self._outside:
            from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline

            kind: Any = StableUnCLIPImg2ImgPipeline if self.config.target == "unclip" else StableDiffusionPipeline
            try:
                pipe = kind.from_pretrained(name).to(self.codebook.dtype)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(f"no {kind.__name__} at {name!r} ({str(error).splitlines()[0]})") from error
            pipe.set_progress_bar_config(disable=True)
            self._outside["pipeline"] = pipe
        return self._outside["pipeline"].to(self.device)

    def _diffuse(self, target: torch.Tensor, noise: Noise, steps: int | None, guidance: float | None) -> torch.Tensor:
        """Images of targets, drawn by the pipeline."""
        c, pipe = self.config, self.pipeline()
        side = c.image_size // pipe.vae_scale_factor
        shared: dict[str, Any] = {
            "height": c.image_size,
            "width": c.image_size,
            "latents": noise.normal(pipe.vae.config.latent_channels, side, side).to(target),
            "num_inference_steps": c.diffusion_steps if steps is None else steps,
            "guidance_scale": c.diffusion_guidance if guidance is None else guidance,
            "output_type": "pt",
        }
        if c.target == "sd_text77":
            empty = ["" for _ in target]
            none = pipe.encode_prompt(empty, self.device, 1, False)[0]
            images = pipe(prompt_embeds=target, negative_prompt_embeds=none, **shared).images
        else:
            images = pipe(prompt=["" for _ in target], image_embeds=target, noise_level=0, **shared).images
        return (images.float() * 2 - 1).clamp(-1, 1)

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SEED:
        """Training mode, where only the stage's own parts drop out: the Q-Former is frozen behind the first."""
        super().train(mode)
        self.qformer.train(mode and self.config.stage == "contrastive")
        return self

    def trained(self, stage: str) -> tuple[str, ...]:
        """What a stage trains, by the first part of the parameters' names."""
        return PARTS[stage] + (KEEPERS if stage == "contrastive" and self.config.keep else ())

    def parts(self) -> tuple[str, ...]:
        """What training up to this stage has given, by the first part of the parameters' names."""
        stages = list(PARTS)
        done = (self.trained(stage) for stage in stages[: stages.index(self.config.stage) + 1])
        return tuple(dict.fromkeys(part for parts in done for part in parts))

    def freeze_others(self) -> None:
        """Exclude what this stage doesn't train."""
        trained = self.trained(self.config.stage)
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            p.requires_grad_(part in trained and part != "encoder")

    def contrastive_loss(
        self,
        features_BMF: torch.Tensor,
        text: Text,
        says_B: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Stage 1: the last embedding and its caption, against the batch's others; label smoothing 0.1.

        In training over several processes the others are those of all. With `keep`, the generation target beside.

        Args:
            features_BMF: of the frozen encoder.
            text: one caption an image.
            says_B: a number of what each row says; rows that say the same are no counter-examples to each other.
            target: what the generator takes, where the config has `keep`.
            mask_BT: which of a sequence count; None: all.

        Raises:
            ValueError: if a target is wanted and not given.
        """
        h = self.causal(features_BMF)
        terms = self._against_captions(h, text, says_B)
        if self.config.keep:
            if target is None:
                raise ValueError("a config with `keep` holds the generation target: give target")
            error = self._target_error(self.down(h), target, mask_BT)
            terms |= {"loss": terms["loss"] + self.config.keep * error, "target": error.detach()}
        return terms

    def _target_error(
        self, codes_BNC: torch.Tensor, target: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean square error to the generation target."""
        square = (self.target(codes_BNC).float() - target.float()).square().mean(-1)
        return square.mean() if mask_BT is None else batch_mean(square, mask_BT)

    def _against_captions(
        self, embeddings_BND: torch.Tensor, text: Text, says_B: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        image, words = self._in_space(embeddings_BND), self.embed_text(text)
        image, words = rows_of_all_parts(torch.stack([image, words], 1)).unbind(1)
        with torch.autocast(image.device.type, enabled=False):
            logits = image @ words.T / self.temperature.clamp(1e-3, 0.5)
            own = torch.arange(len(logits), device=logits.device)
            rank = (logits > logits.diag()[:, None]).sum(1)
            if says_B is not None:
                says_B = rows_of_all_parts(says_B)
                same = says_B[:, None] == says_B
                logits = logits.masked_fill(same & (own[:, None] != own), -1e4)
            loss = (smooth_cross_entropy(logits, 0.1) + smooth_cross_entropy(logits.T, 0.1)) / 2
        return {"loss": loss, "top5": (rank < 5).float().mean(), "temperature": self.temperature.detach()}

    def codes_loss(
        self,
        features_BMF: torch.Tensor,
        target: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        text: Text | None = None,
        says_B: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Stage 2: 5 VQ + 2 (1 - cosine to the causal embeddings) + 0.5 MSE to the generation target (`weights`), and
        with `contrast` stage 1's loss behind the codes.

        VQ as published: 1 for the encodings' way to their codes, 0.25 for the codes' to their encodings.

        Args:
            features_BMF: of the frozen encoder.
            target: what the generator takes, (B, E) or (B, T, E).
            mask_BT: which of a sequence count; None: all.
            text: captions, where the config has `contrast`.
            says_B: as in `contrastive_loss`.

        Raises:
            ValueError: if captions are wanted and not given.
        """
        with torch.no_grad():
            h = self.causal(features_BMF)
        z = self.down(h)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            ids, codes = self.quantise(z)
            vq = F.mse_loss(z, codes.detach()) + 0.25 * F.mse_loss(codes, z.detach())
        through = z + (codes - z).detach()
        restored = self.restore(through).float()
        cosine = torch.cosine_similarity(restored, h.float(), dim=-1)
        mse = self._target_error(through, target, mask_BT)
        of_vq, of_cosine, of_target = self.config.weights
        used = torch.bincount(ids.flatten(), minlength=self.config.codes)
        terms = {
            "loss": of_vq * vq + of_cosine * (1 - cosine.mean()) + of_target * mse,
            "vq": vq,
            "cosine": cosine.mean(),
            "cosine_last": cosine[:, -1].mean(),
            "target": mse,
            "perplexity": perplexity(used).float(),
        }
        if self.config.contrast:
            if text is None:
                raise ValueError("a config with `contrast` compares with captions: give text")
            captions = self._against_captions(restored, text, says_B)
            terms["loss"] = terms["loss"] + self.config.contrast * captions["loss"]
            terms |= {"contrast": captions["loss"], "top5": captions["top5"]}
        return {k: v if k == "loss" else v.detach() for k, v in terms.items()}

    @torch.no_grad()
    def start_target(self, target: torch.Tensor) -> None:
        """Let the generation target begin at its mean over some (N, …, E), so that training learns what differs."""
        self.to_target.bias.copy_(target.flatten(0, -2).float().mean(0))

    @torch.no_grad()
    def start_codes(self, features_BMF: torch.Tensor) -> None:
        """Put the codebook where the encodings are: five rounds of k-means, and no code left unused.

        Ours: with the published start, uniform and narrow, and few images, most codes would never be chosen.
        """
        z = torch.cat([self.down(self.causal(part)) for part in features_BMF.split(128)]).flatten(0, 1)
        codes: torch.Tensor = self.codebook
        for i in range(6):
            ids = nearest(z, codes) if i else torch.zeros(len(z), dtype=torch.long, device=z.device)
            codes = lloyd(z, ids, codes, seed=i)
        self.codebook.copy_(codes)


def smooth_cross_entropy(logits_BB: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy to the diagonal, labels smoothed over the pairs that are not masked (far below the others)."""
    log_p = logits_BB.log_softmax(1)
    there = logits_BB > -1e3
    spread = (log_p * there).sum(1) / there.sum(1)
    return -((1 - smoothing) * log_p.diag() + smoothing * spread).mean()


__all__ = ["LITE0", "SEED", "SEEDConfig"]
