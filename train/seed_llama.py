"""Train a SEED-LLaMA: documents of captions and of a frozen tokenizer's cached codes, and a caption's word pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from genlab.data import open_images
from genlab.data.cache import cached_tokens, captions_of
from genlab.data.images import ImageSet
from genlab.generators.seed_llama import CHAT_DESCRIBE, CHAT_DRAW, Part, SeedLlama
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import require_fit

from .config import TrainConfig
from .seed import SIDED
from .tasks import Batch, Task, example_numbers, freeze, load_initial


def learn_pieces(captions: Sequence[str], size: int) -> str:
    """Word pieces of these captions, a byte-level BPE as the JSON of the library tokenizers; ids 0 and 1 begin and end
    a document. Any other text can be written in them too, byte by byte.

    Raises:
        ValueError: if `size` has no room for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < 258:
        raise ValueError(f"word pieces need text_vocab of at least 258 (the bytes, begin and end), got {size}")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator([*captions, CHAT_DRAW, *CHAT_DESCRIBE], trainer)
    return pieces.to_str()


class SeedLlamaTask(Task):
    """Predict the next id of documents, be it a word's or a picture's."""

    model: SeedLlama
    tokenizer: Any

    def __init__(self, config: TrainConfig, model: SeedLlama, images: ImageSet, tokenizer: Any) -> None:
        """As `Task`; the set's tokens are computed once and cached on disk."""
        super().__init__(config, model, images)
        self.captions = captions_of(images)
        if "word_pieces" not in model.extra:
            words = list(dict.fromkeys(c for own in self.captions for c in own))
            model.extra["word_pieces"] = learn_pieces(words, model.config.text_vocab)
        self.tokens = cached_tokens(tokenizer, images, flip=config.data.flip).flatten(1)
        object.__setattr__(self, "tokenizer", tokenizer)  # not a submodule: it isn't trained, moved or saved

    def load(self, start: int, n: int) -> Batch:
        """Documents as ids, padded, and (in place of labels) which of them are to be predicted."""
        c, index = self.model.config, self.order(start, n)
        noise = Noise(example_numbers(self.config, start, n))
        u = noise.at(purpose="document").uniform(8)
        documents, at = [], 0
        while at < n:
            pairs = min(1 + int(u[at, 0] * c.interleave), n - at)
            rows = range(at, at + pairs)
            chat, describe = bool(u[at, 1] < c.chat), bool(u[at, 2] < c.reverse)
            documents.append(self._document([(int(index[i]), u[i].tolist()) for i in rows], describe, chat))
            at += pairs
        ids = pad_sequence([d[0] for d in documents], batch_first=True, padding_value=self.model.eos)
        learn = pad_sequence([d[1] for d in documents], batch_first=True)
        return Batch(ids, learn, noise)

    def _document(
        self, images: list[tuple[int, list[float]]], describe: bool, chat: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of image and text as ids, and which are learned.

        In a chat the answers are; otherwise all, but for the end of an image that shows only its first codes.
        """
        m, c = self.model, self.model.config
        ids, learn = m.ids_of([]), [False] * len(m.ids_of([]))

        def add(part: Part, learned: bool, whole: bool = True) -> None:
            more = m.ids_of([part])[len(m.ids_of([])) :]
            ids.extend(more)
            learn.extend([learned] * (len(more) - 1) + [learned and whole])

        for i, u in images:
            words = self._caption(i, u[3], describe)
            mirrored = self.config.data.flip and u[4] < 0.5 and not SIDED.search(self.captions[i][0])
            codes = self.tokens[i + len(self.images) * mirrored]
            if describe:
                whole = u[5] >= c.visual_prefix
                shown = codes if whole else codes[: 1 + int(u[6] * len(codes))]
                for part, learned in ((CHAT_DESCRIBE[0], False),) if chat else ():
                    add(part, learned)
                add(shown, not chat, whole)
                if chat:
                    add(CHAT_DESCRIBE[1], False)
                add(words, True)
            else:
                if u[7] < c.caption_drop and len(images) == 1:
                    words = ""
                add(CHAT_DRAW.format(words) if chat else words, not chat) if words else None
                add(codes, True)
        room = getattr(m.lm.config, "max_position_embeddings", None) or len(ids) + 1
        ids, learn = [*ids, m.eos][:room], [*learn, True][:room]
        return torch.tensor(ids), torch.tensor(learn)

    def _caption(self, i: int, u: float, describe: bool) -> str:
        """One of the image's captions; a description says more than the bare name, where there is more."""
        own, name = self.captions[i], self.images.meta[i].get("name")
        if describe:
            own = tuple(words for words in own if words != name) or own
        return own[int(u * len(own))]

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """Cross-entropy of the next id."""
        assert isinstance(batch.labels, torch.Tensor)
        return self.model.document_loss(batch.x, batch.labels)

    def preview(self, model: Any) -> torch.Tensor:
        """One row a prompt, fixed seeds, the plain sampler."""
        from samplers import default_sampler

        some = [self.captions[i][0] for i in torch.linspace(0, len(self.images) - 1, 8).long().tolist()]
        shown = model.read_captions(list(self.config.prompts) or some)
        labels = shown[torch.arange(len(shown)).repeat_interleave(8)].to(model.device)
        out = default_sampler(model).sample(model, labels, seeds=torch.arange(len(labels)))
        with torch.no_grad():
            return self.tokenizer.to(model.device).decode(out.tokens).cpu()

    def before_export(self, model: Any) -> None:
        """Note the tokenizer and the classes."""
        model.extra["tokenizer"] = self.config.tokenizer
        model.extra["data"] = {"source": self.config.data.source, "classes": list(self.images.classes)}


def seed_llama_task(config: TrainConfig) -> SeedLlamaTask:
    """The task of a config whose model is a seed_llama.

    Raises:
        ValueError: without a tokenizer, or where its tokens don't fit the model.
    """
    if not config.tokenizer:
        raise ValueError("a seed_llama needs --tokenizer MODEL, any of discrete tokens (see `genlab list`)")
    torch.manual_seed(config.seed)
    model = SeedLlama.from_base(config.model) if config.model.base else SeedLlama(config.model)
    if config.init:
        load_initial(model, config.init)
        model.extra["word_pieces"] = from_pretrained(config.init).extra["word_pieces"]
    freeze(model, config.freeze)
    tokenizer, data = from_pretrained(config.tokenizer), config.data
    require_fit(config.tokenizer, tokenizer.spec, config.name, model.spec)
    images = open_images(data.source, split=data.split, size=tokenizer.spec.image_size[-1], on_error=data.on_error)
    return SeedLlamaTask(config, model, images, tokenizer)
