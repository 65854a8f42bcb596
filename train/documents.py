"""What training on documents of words and tokens needs, whichever the tokens: word pieces, captions, a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from genlab.data.cache import cached_tokens, captions_of
from genlab.generators.seed_llama import CHAT_DESCRIBE, CHAT_DRAW
from genlab.hub import from_pretrained

from .config import TrainConfig
from .tasks import Task, freeze, load_initial, note_tokenizer, training_device

Model = TypeVar("Model")


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


class DocumentTask(Task):
    """Captions beside a frozen tokenizer's cached tokens; subclasses make documents of them."""

    tokenizer: Any

    def __init__(self, config: TrainConfig, model: Any, images: Any, tokenizer: Any, batch_size: int = 64) -> None:
        """As `Task`; tokenizer: whose tokens of the whole set are computed once, in batches, and cached on disk."""
        super().__init__(config, model, images)
        self.captions = captions_of(images)
        if "word_pieces" not in model.extra:
            words = list(dict.fromkeys(c for own in self.captions for c in own))
            model.extra["word_pieces"] = learn_pieces(words, model.config.text_vocab)
        self.tokens = cached_tokens(
            tokenizer, images, flip=config.data.flip, batch_size=batch_size, device=training_device()
        )
        object.__setattr__(self, "tokenizer", tokenizer)  # not a submodule: it isn't trained, moved or saved

    def before_export(self, model: Any) -> None:
        """Note the tokenizer and the classes."""
        super().before_export(model)
        note_tokenizer(model, self.config.tokenizer)


def start_model(kind: type[Model], config: TrainConfig) -> Model:
    """The language model of a config: new or around its base, with `--init`'s weights and word pieces."""
    torch.manual_seed(config.seed)
    made: Any = kind
    model = made.from_base(config.model) if config.model.base else made(config.model)
    if config.init:
        load_initial(model, config.init)
        model.extra["word_pieces"] = from_pretrained(config.init).extra["word_pieces"]
    freeze(model, config.freeze)
    return model
