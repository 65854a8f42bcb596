"""Divot-LLM: a causal language model that reads clips and draws them in one pass (Ge et al., arXiv 2412.04432).

Any causal LM of transformers, SEED-LLaMA's words and adapters. A clip that is read stands in a document as its 64
continuous tokens, each through an MLP. A clip that is drawn stands there as 64 learned queries that see each other and
all before them; one pass, another MLP, and each query gives the distribution of its token: a mixture of Gaussians, or
for the ablation a diffusion chain, or the mean alone.

    model.read_captions(["a waving hand"])      # as `start` takes them: draw as with any generator
    model.describe(tokens)                      # clips to captions
    model.story("A hand says hello.", clips=3)  # text, clip, text, clip, …
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config
from genlab.distributions import Chain, GaussianMixture, TokenDistribution
from genlab.nn.diffusion_head import DiffusionChain, DiffusionHead
from genlab.nn.mixture import mixture_loss, mixture_of
from genlab.noise import Noise
from genlab.processes import batch_mean, mean_of_parts
from genlab.tokens import Tokens, TokenSpec, require_fit

from .base import Condition, Guidance, State
from .seed_llama import IGNORED, SeedLlama, SeedLlamaConfig

Head = Literal["mixture", "diffusion", "mse"]
WORD, SHOWN, QUERY = 0, 1, 2
"""What a position of a document is: a word piece or mark; a token of a clip that is read; a query of one to draw."""


@config
class DivotLMConfig(SeedLlamaConfig):
    """As `SeedLlamaConfig`, whose codes are the queries here; the defaults are the release's."""

    kind: Literal["divot_lm"] = "divot_lm"  # type: ignore[assignment]
    grid: tuple[int, ...] = (64,)
    """Tokens a clip."""
    order: Literal["raster"] = "raster"
    """Of the tokens: they have none."""
    vocab: int = 64
    """Queries, one a token."""
    lora_alpha: int = 32
    """LoRA's scale, over its rank (published: rank 32)."""
    dim: int = 256
    """Channels of a token."""
    head: Head = "mixture"
    """What is predicted of a token: a mixture of Gaussians, a diffusion chain, or (`mse`) its mean."""
    components: int = 16
    """Gaussians of the mixture."""
    head_hidden: int = 0
    """Width inside the MLP that makes the head's numbers; 0: as many as it makes (of the release 8208, behind 4096)."""
    temperature: float = 1.0
    """Of the mixture's weights in drawing; at 0 each token takes its likeliest component, so that neighbours agree."""
    head_depth: int = 3
    """Of the diffusion head."""
    head_steps: int = 50
    """Steps of its chain."""
    clip_weight: float = 1.0
    """What the clip's loss counts in training, the words' counting 1."""


@dataclass(eq=False)
class ClipState(State):
    """The captions, and the clip once it is committed."""

    captions: Any = None
    dist: TokenDistribution | None = None
    event_BNC: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Documents:
    """A batch of documents, padded on the right."""

    ids_BT: torch.Tensor
    """Word pieces and marks; at a clip's places its queries' ids."""
    what_BT: torch.Tensor
    """WORD, SHOWN or QUERY."""
    tokens_BTC: torch.Tensor
    """At a clip's places its tokens, elsewhere zeros."""
    learn_BT: torch.Tensor
    """Which word pieces are to be predicted."""
    length_B: torch.Tensor
    """Positions that count."""


class DivotLM(SeedLlama):
    """See the module's docstring."""

    kind = "divot_lm"
    Config = DivotLMConfig  # type: ignore[assignment]
    config: DivotLMConfig

    def __init__(self, config: DivotLMConfig, lm: Any = None) -> None:
        """As `SeedLlama`.

        Raises:
            ValueError: for settings of a SEED-LLaMA that mean nothing here, or not one query a token.
        """
        plain = SeedLlamaConfig()
        for name in ("visual_prefix", "code_noise", "text_weight", "chat"):
            if getattr(config, name) != getattr(plain, name):
                raise ValueError(f"{name} has no effect on a divot_lm")
        if config.vocab != math.prod(config.grid):
            raise ValueError(f"a divot_lm has one query a token: vocab {config.vocab}, {math.prod(config.grid)} tokens")
        super().__init__(config, lm)
        c, width = config, self.lm.config.hidden_size
        self.n_groups = 1
        out = {"mixture": (2 * c.dim + 1) * c.components, "mse": c.dim, "diffusion": width}[c.head]
        self.enter = nn.Sequential(nn.Linear(c.dim, width), nn.GELU(), nn.Linear(width, width))
        inner = c.head_hidden or out
        self.leave = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))
        if c.head == "mixture":
            self.spread_components()
        elif c.head == "diffusion":
            self.chain = DiffusionHead(c.dim, width, width, c.head_depth, clip=6.0)
        else:
            self.register_buffer("error", torch.ones(c.dim))
            self.error: torch.Tensor

    @torch.no_grad()
    def spread_components(self) -> None:
        """Start the mixture with means apart, so that its Gaussians have different things to learn."""
        c, last = self.config, self.leave[-1]
        assert isinstance(last, nn.Linear)
        assert last.bias is not None
        last.weight.mul_(0.3)
        last.bias[: c.components * c.dim].normal_(std=0.5)

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one clip."""
        return TokenSpec(kind="continuous", grid=self.config.grid, dim=self.config.dim)

    @property
    def predicts(self) -> type:  # type: ignore[override]
        """By the head: `GaussianMixture` (of one Gaussian for `mse`), or `Chain`."""
        return Chain if self.config.head == "diffusion" else GaussianMixture

    @property
    def default_guidance(self) -> Guidance:
        """None: a mixture has no classifier-free guidance here."""
        return Guidance(scale=1.0, schedule="constant")

    # -- documents ------------------------------------------------------------------------------------------------

    def document(
        self, parts: Sequence[str | torch.Tensor], draw_last: bool = False
    ) -> tuple[list[int], list[int], Any]:
        """A document of text and clips (N, C) as ids, what they are, and the clips' tokens in order (M, C).

        Args:
            parts: text and clips.
            draw_last: the last part is a clip to be drawn, not read.
        """
        c, clips = self.config, []
        ids = [] if self.bos is None else [self.bos]
        what = [WORD] * len(ids)
        for i, part in enumerate(parts):
            if isinstance(part, str):
                words = self.pieces.encode(part, add_special_tokens=False).ids
                ids, what = ids + words, what + [WORD] * len(words)
                continue
            kind = QUERY if draw_last and i == len(parts) - 1 else SHOWN
            ids += [self.boi, *range(c.text_vocab, c.text_vocab + c.vocab), self.eoi]
            what += [WORD, *[kind] * c.vocab, WORD]
            clips.append(part)
        return ids, what, torch.cat(clips) if clips else torch.zeros(0, c.dim)

    def batch_of(self, documents: Sequence[tuple[list[int], list[int], Any]]) -> Documents:
        """Documents as a batch; every word piece but the first is learned, and the end."""
        lengths = torch.tensor([len(d[0]) + 1 for d in documents])
        T = int(lengths.max())
        ids, what = torch.full((len(documents), T), self.eos), torch.zeros(len(documents), T, dtype=torch.long)
        tokens = torch.zeros(len(documents), T, self.config.dim)
        for b, (own, kinds, clips) in enumerate(documents):
            ids[b, : len(own)], what[b, : len(own)] = torch.tensor(own), torch.tensor(kinds)
            tokens[b][what[b] != WORD] = clips.to(tokens)
        inside = torch.arange(T) < lengths[:, None]
        learn = inside & (what == WORD) & (ids != self.eoi)
        learn[:, 0] = False
        return Documents(ids, what, tokens, learn, lengths)

    def hidden(self, x_BTD: torch.Tensor, what_BT: torch.Tensor, real_BT: torch.Tensor) -> Any:
        """Run the LM: causal, but the queries of a clip see each other. Returns last hidden states and logits.

        Args:
            x_BTD: embeddings.
            what_BT: WORD, SHOWN, QUERY; at most one clip a row is drawn.
            real_BT: False for padding, on either side.
        """
        T = x_BTD.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        query = what_BT == QUERY
        see = (causal | (query[:, :, None] & query[:, None])) & real_BT[:, None]
        see = see | torch.eye(T, dtype=torch.bool, device=x_BTD.device)  # padding sees itself, or softmax has nothing
        bias = torch.zeros(see.shape, dtype=x_BTD.dtype, device=x_BTD.device)
        bias = bias.masked_fill(~see, torch.finfo(x_BTD.dtype).min)[:, None]
        position = (real_BT.long().cumsum(1) - 1).clamp_min(0)
        out = self.lm(
            inputs_embeds=x_BTD,
            attention_mask=bias,
            position_ids=position,
            use_cache=False,
            output_hidden_states=True,
        )
        return out.hidden_states[-1], out.logits

    def embed_document(self, ids_BT: torch.Tensor, what_BT: torch.Tensor, tokens_BTC: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, D): of ids, or of a clip's tokens where it is read."""
        x = self.table(ids_BT)
        return torch.where((what_BT == SHOWN)[..., None], self.enter(tokens_BTC.to(x)), x)

    # -- learning -------------------------------------------------------------------------------------------------

    def multimodal_loss(self, d: Documents, noise: Noise) -> dict[str, torch.Tensor]:
        """Nats a word piece, plus the head's loss of the clips to be drawn: for the mixture, nats a channel."""
        c = self.config
        real = torch.arange(d.ids_BT.shape[1], device=d.ids_BT.device) < d.length_B[:, None]
        x = F.dropout(self.embed_document(d.ids_BT, d.what_BT, d.tokens_BTC), c.dropout, self.training)
        h, logits = self.hidden(x, d.what_BT, real)
        target = d.ids_BT[:, 1:].masked_fill(~d.learn_BT[:, 1:], IGNORED)
        nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
        text = batch_mean(nats, target != IGNORED)
        drawn = (d.what_BT == QUERY).any(1)
        if bool(drawn.any()):
            query = d.what_BT[drawn] == QUERY
            z = h[drawn][query].unflatten(0, (-1, c.vocab))
            own, its = d.tokens_BTC[drawn][query].unflatten(0, (-1, c.vocab)), noise.rows(drawn.nonzero()[:, 0])
        else:  # the head has a part all the same, that counts for nothing: processes add up gradients of all weights
            z, own, its = h[:1, :1].expand(-1, c.vocab, -1), h.new_zeros(1, c.vocab, c.dim), noise.rows(slice(0, 1))
        clips = drawn.sum().float()
        share = clips / mean_of_parts(clips).clamp_min(1e-9)
        terms = {name: share * value for name, value in self.head_loss(z, own, its, share).items()}
        clip = terms.pop("loss")
        if not bool(mean_of_parts(share)):  # no part has a clip
            terms = {}
        return {"loss": text + c.clip_weight * clip, "text": text.detach(), "clip": clip.detach(), **terms}

    def loss(self, tokens: torch.Tensor, labels: Condition, noise: Noise) -> dict[str, torch.Tensor]:
        """The head's loss alone, of clips' tokens (B, N, C) under captions."""
        captions = self.drop_condition(self.check_condition(labels), noise)
        x, real = self.embed_condition(captions)
        assert real is not None
        return self.head_loss(self.query_states(x, torch.zeros_like(real, dtype=torch.long), real), tokens, noise)

    def head_loss(
        self, z_BND: torch.Tensor, tokens_BNC: torch.Tensor, noise: Noise, share: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The head's own loss of tokens, given the queries' hidden states; `nats` a channel, where it has a density.

        `share`: how much these clips count beside those of a batch's other parts; None: as much.
        """
        c, out = self.config, self.leave(z_BND).float()
        if c.head == "diffusion":
            return self.chain.loss(tokens_BNC.float(), out, noise, repeats=2)
        if c.head == "mixture":
            loss = mixture_loss(out, tokens_BNC, c.components)
            return {"loss": loss, "nats": loss.detach()}
        square = (out - tokens_BNC).square()
        if self.training:
            with torch.no_grad():
                share = square.new_ones(()) if share is None else share
                self.error.lerp_(mean_of_parts(share * square.mean((0, 1))), 0.02 * mean_of_parts(share))
        nats = -self.mean_as_mixture(out.detach()).log_prob(tokens_BNC.float()).mean() / c.dim
        return {"loss": square.mean(), "nats": nats}

    def mean_as_mixture(self, mean_BNC: torch.Tensor) -> GaussianMixture:
        """A predicted mean as one Gaussian about it, as wide as the errors met in training: what it says of density."""
        mean = mean_BNC[:, :, None]
        zero = torch.zeros_like(mean[..., 0])
        return GaussianMixture(logits_BGM=zero, mean_BGMC=mean, std_BGMC=self.error.sqrt().expand_as(mean))

    def log_prob(self, captions: Condition, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """Log-density (B, N) of clips' tokens given captions, nats.

        Raises:
            ValueError: for a diffusion head, which has none.
        """
        dist = self.predict(self.start(captions))
        if not isinstance(dist, GaussianMixture):
            raise ValueError("a diffusion head has no density: compare it by its samples")
        return dist.log_prob(tokens_BNC.to(self.device).float())

    # -- drawing: one group, one pass ---------------------------------------------------------------------------------

    def where(self, group: int) -> torch.Tensor:
        """All positions."""
        return torch.arange(self.config.vocab, device=self.device)

    def start(self, labels: Condition, guidance: Guidance | None = None) -> ClipState:  # type: ignore[override]
        """An empty state for captions, as `read_captions` gives them.

        Raises:
            ValueError: for guidance, or another condition.
        """
        guidance = guidance or self.default_guidance
        if guidance.scale != 1:
            raise ValueError("a divot_lm predicts mixtures, which have no classifier-free guidance: leave it at 1")
        captions = self.check_condition(labels)
        return ClipState(labels, guidance, n=[0] * len(captions), captions=captions)  # type: ignore[arg-type]

    def predict(self, state: ClipState, where: torch.Tensor | None = None) -> TokenDistribution:  # type: ignore[override]
        """The distribution of all tokens, (B, N, C)."""
        if state.group != 0:
            raise ValueError("the clip is committed already: there is one group")
        if state.dist is None:
            x, real = self.embed_condition(state.captions)
            assert real is not None
            state.dist = self.distribution(x, torch.zeros_like(real, dtype=torch.long), real)
            state.calls, state.rows_computed = state.calls + 1, state.rows_computed + len(state.n)
        return state.dist

    def distribution(self, x_BTD: torch.Tensor, what_BT: torch.Tensor, real_BT: torch.Tensor) -> TokenDistribution:
        """What the queries say behind embeddings (B, T, D) that end with `<img>`."""
        c, out = self.config, self.leave(self.query_states(x_BTD, what_BT, real_BT)).float()
        if c.head == "mixture":
            return mixture_of(out, c.components)
        if c.head == "mse":
            return self.mean_as_mixture(out)
        one = torch.ones(out.shape[:2], device=self.device)
        return DiffusionChain(self.chain, self.chain.cond_embed(out)[None], one, c.head_steps)

    def query_states(self, x_BTD: torch.Tensor, what_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, N, D) of the queries behind embeddings that end with `<img>`."""
        c = self.config
        ids = torch.arange(c.text_vocab, c.text_vocab + c.vocab, device=self.device).expand(len(x_BTD), -1)
        what = torch.cat([what_BT, torch.full_like(ids, QUERY)], 1)
        real = torch.cat([real_BT, torch.ones_like(ids, dtype=torch.bool)], 1)
        h, _ = self.hidden(torch.cat([x_BTD, self.table(ids)], 1), what, real)
        return h[:, -c.vocab :]

    def predict_many(self, state: ClipState, drafts: list[torch.Tensor], where: Any = None) -> Any:  # type: ignore[override]
        """The one group's distribution; there is none behind it.

        Raises:
            ValueError: for drafts.
        """
        if drafts:
            raise ValueError("a divot_lm has one group: there is nothing to draft")
        return [self.predict(state)]

    def commit(self, state: ClipState, event: torch.Tensor, where: torch.Tensor | None = None) -> None:  # type: ignore[override]
        """Fix the clip's tokens (B, N, C)."""
        if tuple(event.shape) != (len(state.n), self.config.vocab, self.config.dim) or state.group != 0:
            raise ValueError(f"expected one clip a row, {(len(state.n), *self.spec.shape)}, got {tuple(event.shape)}")
        state.event_BNC, state.n, state.ticket = event.float(), [1] * len(state.n), state.ticket + 1

    def crop(self, state: ClipState, n: list[int]) -> None:  # type: ignore[override]
        """Keep the clip or forget it."""
        state.keep_first(n)

    def tokens(self, state: ClipState) -> Tokens:  # type: ignore[override]
        """The finished tokens."""
        self.require_complete(state)
        assert state.event_BNC is not None
        return Tokens(state.event_BNC, self.spec)

    # -- reading and telling ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def tell(
        self,
        documents: Sequence[Sequence[str | torch.Tensor]],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new: int = 64,
        beams: int = 1,
        stop_at_clip: bool = False,
    ) -> list[str]:
        """How documents of text and clips go on in words, by transformers' `generate`.

        Args:
            documents: each text and clips (N, C).
            temperature: 0 takes the likeliest piece (published: 0.7).
            top_p: with a temperature, the mass kept (published: 0.5).
            max_new: pieces at most.
            beams: beams of the search.
            stop_at_clip: `<img>` may come, and ends the text.

        Raises:
            ValueError: for more ids than the LM has positions.
        """
        from transformers import LogitsProcessorList

        rows = [self.document(parts) for parts in documents]
        longest = max(len(ids) for ids, _, _ in rows)
        self.require_room(longest, max_new)
        parts = []
        for ids, what, clips in rows:
            tokens = torch.zeros(len(ids), self.config.dim)
            tokens[torch.tensor(what) != WORD] = clips.to(tokens)
            own = [torch.tensor(ids)[None], torch.tensor(what)[None], tokens[None]]
            x = self.embed_document(*(v.to(self.device) for v in own))[0]
            parts.append(F.pad(x, (0, 0, longest - len(x), 0)))
        mask = torch.stack([torch.arange(longest) >= longest - len(ids) for ids, _, _ in rows]).long().to(self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        was_training = self.training
        self.eval()
        out = self.lm.generate(
            inputs_embeds=torch.stack(parts),
            attention_mask=mask,
            logits_processor=LogitsProcessorList([self._words_only(stop_at_clip)]),
            num_beams=beams,
            max_new_tokens=max_new,
            eos_token_id=[self.eos, self.boi],
            pad_token_id=self.eos,
            **sampling,
        )
        self.train(was_training)
        marks = (self.bos, self.eos, self.boi)
        return [self.pieces.decode([i for i in row if i not in marks]) for row in out.tolist()]

    def _words_only(self, stop_at_clip: bool) -> Any:
        """Grammar for `generate`: word pieces, the end, and perhaps `<img>`."""

        def only(ids_RT: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
            allowed = torch.arange(scores_RV.shape[1], device=scores_RV.device) < self.config.text_vocab
            allowed[self.boi] = stop_at_clip
            if stop_at_clip and ids_RT.shape[1] == 0:
                allowed[self.boi] = allowed[self.eos] = False  # a paragraph has words
            return scores_RV.masked_fill(~allowed, -torch.inf)

        return only

    def describe(self, tokens: Tokens, keep: int | None = None, *, ask: str = "", **options: Any) -> list[str]:
        """A caption for each clip.

        Args:
            tokens: B clips.
            keep: must be None: tokens have no order.
            ask: ask this of the clip.
            options: as `tell` takes them.

        Raises:
            ValueError: for tokens of another spec, or some of the tokens only.
        """
        require_fit("these tokens", tokens.spec, "this model", self.spec)
        if keep not in (None, self.spec.length):
            raise ValueError("a clip's tokens have no order: all of them are shown")
        return [
            text.strip() for text in self.tell([[clip, ask] if ask else [clip] for clip in tokens.values], **options)
        ]

    @torch.inference_mode()
    def story(
        self,
        prompt: str,
        *,
        clips: int = 3,
        seed: int = 0,
        variance: float = 0.1,
        temperature: float = 0.7,
        top_p: float = 0.5,
        max_new: int = 64,
    ) -> list[tuple[str, torch.Tensor]]:
        """Text and a clip, text and a clip, …: pairs of a paragraph and a clip's tokens (N, C).

        Each paragraph sees the prompt and all paragraphs and clips before it, each clip its paragraph too.

        Args:
            prompt: how it begins.
            clips: how many.
            seed: decides the words and the clips.
            variance: factor of the mixture's variances.
            temperature, top_p, max_new: of the words, as in `tell`.

        Raises:
            ValueError: for less than one clip, or more than the LM has positions for.
        """
        if clips < 1:
            raise ValueError(f"a story has at least one clip, got {clips}")
        torch.manual_seed(seed)
        noise = Noise(torch.tensor([seed], device=self.device), purpose="story")
        parts: list[str | torch.Tensor] = [prompt.strip() + "\n"]
        told = []
        for k in range(clips):
            options = {"temperature": temperature, "top_p": top_p, "max_new": max_new, "stop_at_clip": True}
            text = self.tell([parts], **options)[0].strip()  # type: ignore[arg-type]
            ids, what, own = self.document([*parts, text])
            self.require_room(len(ids) + 1, self.spec.length)
            batch = self.batch_of([([*ids, self.boi], [*what, WORD], own)])
            kinds = batch.what_BT[:, :-1].to(self.device)
            x = self.embed_document(
                batch.ids_BT[:, :-1].to(self.device), kinds, batch.tokens_BTC[:, :-1].to(self.device)
            )  # fmt: skip
            dist = self.distribution(x, kinds, torch.ones_like(kinds, dtype=torch.bool))
            if isinstance(dist, GaussianMixture):
                dist = dist.temperature(self.config.temperature).scale_variance(variance)
            clip = dist.sample(noise.at(position=self.where(0), step=k))[0].float()
            parts += [text, clip]
            told.append((text, clip))
        return told

    def merged(self) -> DivotLM:
        """The same model without adapters, LoRA added into the weights.

        Raises:
            ValueError: if it has none.
        """
        import copy

        if not self.config.lora_rank:
            raise ValueError("this divot_lm has no LoRA to merge")
        whole = dataclasses.replace(self.config, lora_rank=0, base="")
        model = DivotLM(whole, copy.deepcopy(self.lm).merge_and_unload())
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("lm.")}
        model.load_state_dict(own, strict=False)
        model.extra = dict(self.extra)
        return model.train(self.training)


__all__ = ["DivotLM", "DivotLMConfig", "Documents"]
