"""SEED-LLaMA: one causal language model that reads and writes words and pictures (Ge et al., arXiv 2310.01218).

Any causal LM of transformers; its vocabulary is followed by an id for each code of an image tokenizer, `<img>` and
`</img>`. Documents hold text and images in any order, and the next id is learned, whatever it is. Published: LoRA
(arXiv 2106.09685) on every projection, with embeddings, head and norms trained in full.

    model.read_captions(["a red apple"])        # as `start` takes them: draw as with any generator
    model.describe(tokens)                      # images to captions
    model.reply(["what is ", codes, "?"])       # a document goes on, in words and images
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from genlab.cider import Cider
from genlab.config import config, load_json
from genlab.hub import CONFIG, from_pretrained, shipped
from genlab.memory import Looks, Memory
from genlab.nn.attention import KVCache
from genlab.noise import Noise
from genlab.processes import batch_mean
from genlab.text import Text
from genlab.tokens import Tokens, TokenSpec

from .base import Condition, Guidance
from .causal import CausalLM

Part = str | torch.Tensor
"""A piece of a document: text, or the codes (L,) of an image or of its beginning."""
CHAT_DRAW = "USER: Please generate an image of {}.\nASSISTANT:"
CHAT_ANSWER = "\nASSISTANT:"
CHAT_DESCRIBE = ("USER: ", f"Please describe this image.{CHAT_ANSWER}")
"""The published turns, around a caption and around an image."""
IGNORED = -100
REMEMBERED = 128
"""Channels that remembered images are compared in, at most."""
ALIKE, FITS = 0.03, 0.05
"""Differences of cosines, of images' features and of caption and image, that make a caption count e times as much."""
OWN = 0.3
"""What the model's own caption counts beside that of the most similar image. All three were chosen on held-out images
that are not among those of `genlab bench seed`."""
MOST = 256
"""Remembered captions to choose among, at most: the work grows with the square."""


@config
class SeedLlamaConfig:
    """The language model, the images it knows, how it is trained; the defaults are the published 8B's."""

    kind: Literal["seed_llama"] = "seed_llama"
    grid: tuple[int, ...] = (32,)
    """Axes of the image tokens: (L,), or rows and columns."""
    order: Literal["raster", "coarse_to_fine"] = "coarse_to_fine"
    """Their order, as the tokenizer's spec says."""
    vocab: int = 8192
    """Codes of the image tokenizer."""
    lm: dict[str, Any] = dataclasses.field(default_factory=lambda: {"model_type": "llama"})
    """A config of transformers, without vocab_size; `model_type` says which causal LM."""
    base: str = ""
    """Where training starts: a causal LM of transformers, folder or Hub id, or a seed_llama, a MODEL. It brings its
    word pieces, and `lm` and `text_vocab` are read from there. Empty: from scratch, the pieces learned from the
    captions."""
    text_vocab: int = 32000
    """Ids in front of the image's: word pieces."""
    begin_image: int = -1
    """Id of `<img>`; -1: right behind the codes."""
    end_image: int = -1
    """Id of `</img>`; -1: behind `<img>`."""
    lora_rank: int = 0
    """LoRA on all linear layers of the blocks; embeddings, head and norms are trained too (published: 16). 0: all."""
    lora_alpha: int = 32
    """LoRA's scale, over its rank."""
    lora_dropout: float = 0.05
    """Dropout in front of LoRA."""
    text_length: int = 64
    """Positions in front of an image that is drawn: the caption's word pieces, what stands around them, `<img>`."""
    reverse: float = 0.5
    """Share of training documents with the image in front of its text."""
    chat: float = 0.0
    """Share of training documents in the form of a chat; from 0.5 on, prompts are put in that form."""
    interleave: int = 1
    """Pairs of image and text a training document, at most."""
    visual_prefix: float = 0.0
    """Share of the images to be described of which training shows only the first codes, a random number of them."""
    code_noise: float = 0.0
    """Training: share of the codes of images to be described for which one of their 8 nearest stands in; such an image
    is read and not predicted. Ours: few images are soon known by a code or two."""
    caption_drop: float = 0.0
    """Share of the images to be drawn without their caption; `reverse` too teaches images without one."""
    text_weight: float = 1.0
    """What a word piece counts in the training loss, a code counting 1."""
    dropout: float = 0.0
    """Of the input embeddings, in training."""
    neighbours: int = 0
    """How many captions of remembered images `caption` considers beside its own; training remembers its images where
    there are any. Ours: few images don't teach a language model to name what it has not seen."""
    looks: str = "efficientnet-lite0"
    """By whose features they are found: the packaged one's, or a timm model's."""
    memory: tuple[int, ...] = ()
    """Images remembered, their features, and the channels kept (128); training writes it."""


class _Held:
    """Our cache, as transformers' attention calls it."""

    def __init__(self, keep: Callable[[int], Callable[..., Any]]) -> None:
        self.keep = keep

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Put keys and values by; return all of them."""
        return self.keep(layer)(k, v)

    def get_seq_length(self, *_: Any) -> int:
        """Nothing: positions and mask are given."""
        return 0


class SeedLlama(CausalLM):
    """See the module's docstring."""

    kind = "seed_llama"
    Config = SeedLlamaConfig
    config: SeedLlamaConfig  # type: ignore[assignment]
    by_text = True

    def __init__(self, config: SeedLlamaConfig, lm: Any = None) -> None:
        """Make it.

        Args:
            config: sizes.
            lm: a causal LM of transformers of these sizes to extend, with its weights; None makes one afresh.

        Raises:
            ValueError: for ids that overlap, or an LM whose attention is too short.
        """
        super(CausalLM, self).__init__(config)
        c = config
        self.K, self.V = 1, c.vocab
        self.num_classes, self.n_groups = 0, self.spec.length
        self.prefix = self.text_length = c.text_length
        self.boi = c.begin_image if c.begin_image >= 0 else c.text_vocab + c.vocab
        self.eoi = c.end_image if c.end_image >= 0 else self.boi + 1
        if self.boi == self.eoi or any(c.text_vocab <= i < c.text_vocab + c.vocab for i in (self.boi, self.eoi)):
            raise ValueError(f"<img> {self.boi} and </img> {self.eoi} must be apart and outside the codes")
        self.total = max(c.text_vocab + c.vocab, self.boi + 1, self.eoi + 1)
        self.lm: Any = self._extended(lm)
        window = getattr(self.lm.config, "sliding_window", None)
        if window and getattr(self.lm.config, "use_sliding_window", True) and window < self.prefix + self.n_groups:
            raise ValueError(
                f"this LM attends within {window} positions, a caption and an image take "
                f"{self.prefix + self.n_groups}: shorten text_length, or choose another LM"
            )
        if c.lora_rank:
            self.lm = self._with_lora(self.lm)
        self.memory = Memory(*c.memory) if c.memory else None
        self._outside: dict[str, Any] = {}  # the frozen encoder, which comes by name
        self.bos = self.lm.config.bos_token_id
        eos = self.lm.config.eos_token_id
        self.eos = eos if isinstance(eos, int) else (eos or [0])[0]

    def _extended(self, lm: Any) -> Any:
        """The LM with `total` ids, input and output apart: new rows have different things to learn in each."""
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ImportError("a seed_llama needs the library transformers: pip install 'genlab[text]'") from error
        c = self.config
        if lm is None:
            fields = {k: v for k, v in c.lm.items() if k not in ("model_type", "transformers_version")}
            fields |= {"vocab_size": self.total, "tie_word_embeddings": False}
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(c.lm["model_type"], **fields))
        if lm.config.tie_word_embeddings:
            head = lm.get_output_embeddings()
            head.weight = torch.nn.Parameter(lm.get_input_embeddings().weight.detach().clone())
            lm.config.tie_word_embeddings = False
        lm.resize_token_embeddings(self.total, mean_resizing=False)
        return lm

    @torch.no_grad()
    def start_codes(self, codebook_VC: torch.Tensor) -> None:
        """Let codes that lie near each other begin alike, in and out: the codebook through a random map.

        Ours: with few images a code comes too seldom to learn alone what its neighbours have learned.

        Raises:
            ValueError: for another number of codes.
        """
        if len(codebook_VC) != self.config.vocab:
            raise ValueError(f"this {self.kind} has {self.config.vocab} codes, the codebook {len(codebook_VC)}")
        z = codebook_VC.detach().float().cpu()
        z = (z - z.mean(0)) / z.std(0).clamp_min(1e-6)
        for table in (self.lm.get_input_embeddings(), self.lm.get_output_embeddings()):
            rows = table.weight[self.config.text_vocab :][: self.config.vocab]
            generator = torch.Generator().manual_seed(0)
            through = torch.randn(z.shape[1], rows.shape[1], generator=generator) * z.shape[1] ** -0.5
            rows.copy_(float(rows.std()) * (z @ through))

    def _with_lora(self, lm: Any) -> Any:
        """Adapters on every linear layer but the head; embeddings, head and norms trained beside their originals."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("LoRA needs the library peft: pip install 'genlab[text]'") from error
        tables = (lm.get_input_embeddings(), lm.get_output_embeddings())
        saved = {n.rsplit(".", 1)[-1] for n, m in lm.named_modules() if m in tables or "Norm" in type(m).__name__}
        return get_peft_model(
            lm,
            LoraConfig(
                r=self.config.lora_rank,
                lora_alpha=self.config.lora_alpha,
                lora_dropout=self.config.lora_dropout,
                target_modules="all-linear",
                modules_to_save=sorted(saved),
                task_type="CAUSAL_LM",
            ),
        )

    @classmethod
    def from_base(cls, config: SeedLlamaConfig) -> SeedLlama:
        """A model around the LM that `config.base` names; its word pieces come with it.

        Raises:
            FileNotFoundError: if there is none.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if is_ours(config.base):
            own = from_pretrained(config.base)
            own = own.merged() if own.config.lora_rank else own
            same = {k: getattr(own.config, k) for k in ("lm", "text_vocab", "begin_image", "end_image")}
            model = cls(dataclasses.replace(config, **same), own.lm)
            model.extra["word_pieces"] = own.extra["word_pieces"]
            return model
        try:
            lm: Any = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
            pieces = AutoTokenizer.from_pretrained(config.base).backend_tokenizer.to_str()
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no causal LM at {config.base!r}: expected a folder or Hub id that transformers reads "
                f"({str(error).splitlines()[0]})"
            ) from error
        rows = lm.get_input_embeddings().weight.shape[0]
        model = cls(dataclasses.replace(config, lm=lm_config(lm.config), text_vocab=rows), lm)
        model.extra["word_pieces"] = pieces
        return model

    def merged(self) -> SeedLlama:
        """The same model without adapters, LoRA added into the weights.

        Raises:
            ValueError: if it has none.
        """
        import copy

        if not self.config.lora_rank:
            raise ValueError("this seed_llama has no LoRA to merge")
        model = SeedLlama(
            dataclasses.replace(self.config, lora_rank=0, base=""), copy.deepcopy(self.lm).merge_and_unload()
        )
        model.extra = dict(self.extra)
        if self.memory is not None:
            model.memory = copy.deepcopy(self.memory)
        return model.train(self.training)

    # -- what it remembers ---------------------------------------------------------------------------------------

    def remember(self, features_NF: torch.Tensor, captions: Sequence[str]) -> None:
        """Keep images to look up: their features, one row each, and what they show.

        Raises:
            ValueError: for another number of captions than images.
        """
        if len(features_NF) != len(captions) or not captions:
            raise ValueError(
                f"a memory takes one caption an image, got {len(captions)} and {len(features_NF)} images' features"
            )
        words = list(dict.fromkeys(captions))
        number = {w: i for i, w in enumerate(words)}
        dim = min(REMEMBERED, *features_NF.shape)
        self.memory = Memory.of(features_NF, torch.tensor([number[w] for w in captions]), dim).to(self.device)
        self.config = dataclasses.replace(self.config, memory=(len(captions), features_NF.shape[1], dim))
        self.extra["memory"] = words

    def recall(self, images: torch.Tensor, n: int | None = None) -> tuple[torch.Tensor, list[list[str]]]:
        """What the remembered images that look most like each of these are called, the nearest first.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            n: how many of each; None: `neighbours`.

        Returns:
            Cosines (B, n) of features, and the captions.

        Raises:
            ValueError: if it remembers none.
        """
        if self.memory is None:
            raise ValueError("this seed_llama remembers no images: train one with `--model.neighbours 24`")
        if "looks" not in self._outside:
            self._outside["looks"] = Looks(self.config.looks, images.shape[-1])
        features = self._outside["looks"].to(self.device)(images)
        likeness, found = self.memory.nearest(features, self.config.neighbours if n is None else n)
        return likeness, [[self.extra["memory"][i] for i in row] for row in found.tolist()]

    @cached_property
    def _in_common(self) -> Cider:
        """How much captions have in common, by the words of the remembered ones."""
        return Cider([w] for w in self.extra["memory"])

    def caption(
        self,
        images: torch.Tensor,
        tokenizer: Any,
        keep: int | None = None,
        *,
        neighbours: int | None = None,
        **options: Any,
    ) -> list[str]:
        """What images show: what it writes, or what remembered images like them are called.

        The caption with the least Bayes risk (Kumar and Byrne, HLT-NAACL 2004) is given, that which has most in common,
        by CIDEr, with all others and itself. Each counts by how alike its image looks and, where the tokenizer has a
        space of images and captions (a seed with its text side), how well it fits the image there.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            tokenizer: the model's.
            keep: show the model only the first so many codes.
            neighbours: captions to consider; None: the config's. 0: it writes all by itself, as `describe`.
            options: as `write` takes them.
        """
        with torch.inference_mode():
            tokens = tokenizer.encode(images.to(tokenizer.device))
        return self.vote(images, tokenizer, self.describe(tokens, keep, **options), neighbours)

    def vote(
        self, images: torch.Tensor, tokenizer: Any, written: list[str], neighbours: int | None = None
    ) -> list[str]:
        """`caption` of images for which captions are written already."""
        n = self.config.neighbours if neighbours is None else neighbours
        if not n or self.memory is None:
            return written
        if n > MOST:
            raise ValueError(f"neighbours must be at most {MOST}, got {n}: each is compared with each")
        likeness, others = self.recall(images, n)
        alike = torch.cat([likeness.amax(1, keepdim=True), likeness], 1)
        candidates = [[own or ".", *found] for own, found in zip(written, others, strict=True)]
        log_weight = alike / ALIKE
        log_weight[:, 0] += math.log(OWN)
        if getattr(tokenizer.config, "contrastive_dim", 0):
            with torch.inference_mode():
                words = tokenizer.embed_text([w for row in candidates for w in row]).unflatten(0, alike.shape)
                log_weight = log_weight + torch.einsum("bkd,bd->bk", words, tokenizer.embed_images(images)) / FITS
        weights = log_weight.softmax(1).tolist()
        gain = [
            [sum(w * self._in_common(mine, other) for w, other in zip(own, row, strict=True)) for mine in row]
            for own, row in zip(weights, candidates, strict=True)
        ]
        return [row[max(range(len(row)), key=g.__getitem__)] for row, g in zip(candidates, gain, strict=True)]

    # -- words and codes ----------------------------------------------------------------------------------------

    @property
    def spec(self) -> TokenSpec:
        """The ids of one image."""
        c = self.config
        return TokenSpec(kind="discrete", grid=c.grid, vocab=c.vocab, order=c.order)

    @property
    def default_guidance(self) -> Guidance:
        """Constant, 3."""
        return Guidance(scale=3.0, schedule="constant")

    @cached_property
    def pieces(self) -> Any:
        """Its word pieces, a `Tokenizer` of the library tokenizers.

        Raises:
            ValueError: if the model has none.
        """
        from tokenizers import Tokenizer

        if not (text := self.extra.get("word_pieces")):
            raise ValueError(
                "this seed_llama has no word pieces (`word_pieces` in its config.json): train it with `genlab train`, "
                "or set model.extra['word_pieces'] to the JSON of a tokenizer of the library tokenizers"
            )
        return Tokenizer.from_str(text)

    def ids_of(self, parts: Sequence[Part]) -> list[int]:
        """A document as ids, its beginning marked: text as word pieces, each image between `<img>` and `</img>`."""
        ids = [] if self.bos is None else [self.bos]
        for part in parts:
            if isinstance(part, str):
                ids += self.pieces.encode(part, add_special_tokens=False).ids
            else:
                ids += [self.boi, *(part.flatten() + self.config.text_vocab).tolist(), self.eoi]
        return ids

    def parts_of(self, ids: Sequence[int]) -> list[Part]:
        """The reverse of `ids_of`; an image that isn't ended is left out."""
        c = self.config
        parts: list[Part] = []
        words: list[int] = []
        codes: list[int] = []
        for i in [*ids, self.boi]:
            if i == self.boi:
                if words:
                    parts.append(self.pieces.decode(words, skip_special_tokens=True))
                words, codes = [], []
            elif i == self.eoi:
                parts.append(torch.tensor(codes, dtype=torch.long))
                codes = []
            elif c.text_vocab <= i < c.text_vocab + c.vocab:
                codes.append(i - c.text_vocab)
            elif i not in (self.bos, self.eos):
                words.append(i)
        return parts

    def read_captions(self, captions: Sequence[str]) -> Text:
        """Captions as `start` takes them: of each, the ids that stand in front of its image, one a channel.

        Captions that are too long are cut.
        """
        wrap = CHAT_DRAW if self.config.chat >= 0.5 else "{}"
        around = len(self.ids_of([wrap.format("")])) + 1
        rows = []
        for caption in captions:
            words = self.pieces.encode(caption, add_special_tokens=False).ids
            if len(words) > self.text_length - around - 2:
                caption = self.pieces.decode(words[: self.text_length - around - 2])
            rows.append(torch.tensor([*self.ids_of([wrap.format(caption)])[: self.text_length - 1], self.boi]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        return Text(ids[..., None].float(), mask)

    # -- the language model as `CausalLM` calls its network -------------------------------------------------------

    def gpt(
        self,
        x_RTD: torch.Tensor,
        at: torch.Tensor | slice | None = None,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = True,
        keep: Callable[[int], Callable[..., Any]] | None = None,
    ) -> torch.Tensor:
        """Embeddings to logits over all ids (R, T, total).

        A position's number is how many it sees: padding in front doesn't count, drafts beside it neither.
        """
        assert mask is not None  # captions come padded, so there is always one
        position = (mask.sum(-1) - 1)[:, 0].expand(len(x_RTD), -1)
        bias = torch.zeros(mask.shape, dtype=x_RTD.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(x_RTD.dtype).min
        )
        cache = {} if keep is None else {self._cache_name: _Held(keep)}
        return self.lm(
            inputs_embeds=x_RTD,
            position_ids=position,
            attention_mask=bias.expand(len(x_RTD), -1, -1, -1),
            use_cache=keep is not None,
            **cache,
        ).logits

    @cached_property
    def _cache_name(self) -> str:
        """What this LM's forward pass calls its cache: transformers renames it, model by model."""
        lm = self.lm.get_base_model() if self.config.lora_rank else self.lm
        return "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"

    def new_cache(self, rows: int, like: torch.Tensor) -> KVCache:
        """Room for the caption and all codes."""
        c = self.lm.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return KVCache(c.num_hidden_layers, rows, heads, self.prefix + self.n_groups, width, like=like)

    def table(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of ids."""
        return self.lm.get_input_embeddings()(ids)

    def embed(self, ids_BTK: torch.Tensor) -> torch.Tensor:
        """Codes to (B, T, D)."""
        return self.table(ids_BTK[..., 0] + self.config.text_vocab)

    def heads(self, h_RTD: torch.Tensor) -> torch.Tensor:
        """Logits of all ids to those of the codes (R, T, 1, V), float32: in an image, nothing else may come."""
        return h_RTD[..., self.config.text_vocab :][..., : self.V].float()[:, :, None]

    def check_condition(self, condition: Condition) -> Text:
        """What `read_captions` gave, padded on the left to `text_length`, on this device.

        Raises:
            ValueError: for classes, embeddings, or captions that are too long.
        """
        if not isinstance(condition, Text) or condition.embeds_BTD.shape[-1] != 1:
            raise ValueError(
                "a seed_llama draws by text and reads it itself: give `model.read_captions(captions)`, neither classes "
                "nor another encoder's embeddings"
            )
        return condition.to(self.device).padded(self.text_length, "left")

    def embed_condition(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A checked condition as a prefix (B, P, D), and which of its positions count (B, P)."""
        assert isinstance(condition, Text)
        return self.table(condition.embeds_BTD[..., 0].long()), condition.mask_BT

    def no_condition(self, condition: Condition) -> Text:
        """An image without a caption: a document that begins with it."""
        ids = torch.tensor([*([] if self.bos is None else [self.bos]), self.boi], device=self.device).float()
        free = Text(ids.expand(len(condition), -1)[..., None])
        return free.padded(self.text_length, "left")

    def drop_condition(self, condition: Condition, noise: Noise) -> Text:
        """Leave out `caption_drop` of the captions."""
        assert isinstance(condition, Text)
        free = self.no_condition(condition)
        drop = (noise.at(purpose="label drop").uniform(1) < self.config.caption_drop).to(self.device)
        assert condition.mask_BT is not None
        assert free.mask_BT is not None
        return Text(
            torch.where(drop[..., None], free.embeds_BTD, condition.embeds_BTD),
            torch.where(drop, free.mask_BT, condition.mask_BT),
        )

    # -- learning and writing ---------------------------------------------------------------------------------------

    def document_loss(self, ids_BT: torch.Tensor, learn_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of the next id in padded documents, nats a token; `text` and `image` are its two parts.

        Args:
            ids_BT: documents, padded on the right.
            learn_BT: which ids are to be predicted; padding isn't, nor the first.
        """
        c = self.config
        x = F.dropout(self.table(ids_BT), c.dropout, self.training)
        logits, learn_BT = self.lm(inputs_embeds=x, use_cache=False).logits[:, :-1], learn_BT[:, 1:]
        logits, target = logits[learn_BT].float(), ids_BT[:, 1:][learn_BT]  # what isn't learned costs no softmax
        nats = F.cross_entropy(logits, target, reduction="none")
        code = (target >= c.text_vocab) & (target < c.text_vocab + c.vocab)
        hit = (logits.detach().argmax(-1) == target).float()
        return {
            "loss": batch_mean(nats, torch.where(code, 1.0, c.text_weight)),
            "text": batch_mean(nats.detach(), ~code),
            "image": batch_mean(nats.detach(), code),
            "text_accuracy": batch_mean(hit, ~code),
            "image_accuracy": batch_mean(hit, code),
        }

    def text_log_prob(self, ids_BT: torch.Tensor, *, adapter: bool = True) -> torch.Tensor:
        """Log p (B, T - 1), nats, of each word piece given those before it, among word pieces.

        Args:
            ids_BT: word pieces, the beginning marked.
            adapter: False takes the base LM as it was before LoRA.
        """
        off = nullcontext() if adapter or not self.config.lora_rank else self.lm.disable_adapter()
        with off:
            logits = self.lm(input_ids=ids_BT, use_cache=False).logits[:, :-1, : self.config.text_vocab]
        return logits.float().log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]

    def _allowed(self, images: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Grammar for transformers' `generate`: codes only inside images, and exactly as many as an image has."""
        c, inside = self.config, torch.zeros(self.total, dtype=torch.bool)
        inside[c.text_vocab : c.text_vocab + c.vocab] = True

        def only(ids_RT: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
            V = scores_RV.shape[1]
            codes = F.pad(inside, (0, V - self.total)).to(scores_RV.device)
            words = ~codes
            words[self.eoi] = False
            words[self.boi] = images
            allowed = words.expand_as(scores_RV).clone()
            for r, row in enumerate(ids_RT.tolist()):
                since = len(row) - 1 - row[::-1].index(self.boi) if self.boi in row else None
                if since is not None and self.eoi not in row[since:]:
                    allowed[r] = codes if len(row) - since - 1 < self.n_groups else torch.arange(V) == self.eoi
            return scores_RV.masked_fill(~allowed.to(scores_RV.device), -torch.inf)

        return only

    def require_room(self, length: int, new: int) -> None:
        """Refuse what the LM can't read.

        Raises:
            ValueError: for more ids than it has positions.
        """
        room = getattr(self.lm.config, "max_position_embeddings", None)
        if room is not None and length + new > room:
            raise ValueError(
                f"a document of {length} ids and {new} new ones don't fit into the LM's {room} positions: shorten "
                "it, or max_new"
            )

    @torch.inference_mode()
    def write(
        self,
        documents: Sequence[Sequence[Part]],
        *,
        images: bool = True,
        beams: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new: int = 64,
    ) -> list[list[Part]]:
        """Go on with documents until the model ends them: by transformers' `generate`.

        Args:
            documents: each text and images.
            images: whether it may draw.
            beams: beams of the search.
            temperature: 0 takes the likeliest id.
            top_p: with a temperature, the mass kept (published: 1.0 and 0.5).
            max_new: ids a document at most.

        Raises:
            ValueError: for more ids than the LM has positions.
        """
        from transformers import LogitsProcessorList

        rows = [torch.tensor(self.ids_of(parts)) for parts in documents]
        longest = max(map(len, rows))
        self.require_room(longest, max_new)
        ids = torch.stack([F.pad(r, (longest - len(r), 0), value=self.eos) for r in rows]).to(self.device)
        mask = torch.stack([F.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rows]).to(self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        was_training = self.training
        self.eval()
        out = self.lm.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([self._allowed(images)]),
            num_beams=beams,
            max_new_tokens=max_new,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
            **sampling,
        )
        self.train(was_training)
        return [self.parts_of(row) for row in out[:, longest:].tolist()]

    def reply(self, document: Sequence[Part], **options: Any) -> list[Part]:
        """How the model goes on with one document; options as `write` takes them."""
        return self.write([document], **options)[0]

    def describe(
        self,
        tokens: Tokens,
        keep: int | None = None,
        *,
        ask: str = "",
        chat: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """A caption for each image.

        Args:
            tokens: B images; of each, the codes it keeps are shown.
            keep: show only the first so many of these; None shows all.
            ask: ask this in a chat, in place of a description.
            chat: ask in the form of a chat; None does where the model was trained so.
            options: as `write` takes them.

        Raises:
            ValueError: for tokens of another spec.
        """
        from genlab.tokens import require_fit

        require_fit("these tokens", tokens.spec, "this model", self.spec)
        codes = list(tokens.values.flatten(1)[:, :keep])
        if tokens.kept is not None:
            codes = [row[:k] for row, k in zip(codes, tokens.kept.tolist(), strict=True)]
        asks = bool(ask) or (self.config.chat >= 0.5 if chat is None else chat)
        turn = f"{ask}{CHAT_ANSWER}" if ask else CHAT_DESCRIBE[1]
        documents: list[list[Part]] = [[CHAT_DESCRIBE[0], row, turn] if asks else [row] for row in codes]
        written = self.write(documents, images=False, **options)
        return ["".join(part for part in parts if isinstance(part, str)).strip() for parts in written]


def is_ours(name: str) -> bool:
    """Whether a name is that of a checkpoint of this project's, not of transformers'."""
    if name in shipped():
        return True
    path = Path(name) / CONFIG
    return path.is_file() and "kind" in load_json(path)


def lm_config(config: Any) -> dict[str, Any]:
    """What differs from a transformers config's defaults, as `SeedLlamaConfig.lm` keeps it."""
    dropped = ("transformers_version", "vocab_size", "tie_word_embeddings", "architectures", "dtype", "torch_dtype")
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in dropped and not k.startswith("_")}
    return fields | {"model_type": config.model_type}
