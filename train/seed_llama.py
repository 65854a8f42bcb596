"""Train a SEED-LLaMA: documents of captions and of a frozen tokenizer's cached codes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from genlab.data import open_images
from genlab.data.cache import cached_tokens
from genlab.data.images import ImageSet
from genlab.generators.seed_llama import CHAT_DESCRIBE, CHAT_DRAW, Part, SeedLlama
from genlab.memory import Looks
from genlab.noise import Noise

from .config import TrainConfig
from .documents import DocumentTask, start_model
from .seed import SIDED
from .tasks import Batch, example_numbers, fitting_tokenizer, training_device


class SeedLlamaTask(DocumentTask):
    """Predict the next id of documents, be it a word's or a picture's."""

    model: SeedLlama
    images: ImageSet

    def __init__(self, config: TrainConfig, model: SeedLlama, images: ImageSet, tokenizer: Any) -> None:
        """As `DocumentTask`; codes of any shape are read as one row, and a new LM begins with their codebook."""
        super().__init__(config, model, images, tokenizer)
        codebook = getattr(tokenizer, "codebook", None)
        if codebook is not None and not config.init and not config.model.base:
            model.start_codes(codebook)
        if config.model.code_noise:
            if codebook is None:
                raise ValueError(f"code_noise needs codes that lie near each other: a {tokenizer.kind} has no codebook")
            apart = torch.cdist(codebook.detach().float(), codebook.detach().float())
            self.near = apart.fill_diagonal_(torch.inf).topk(min(8, len(apart) - 1), largest=False).indices.cpu()
        self.tokens = self.tokens.flatten(1)
        self.looks: torch.Tensor | None = None
        if config.model.neighbours:
            looks = Looks(config.model.looks, images.size)
            self.looks = cached_tokens(looks, images, device=training_device())[:, 0]

    def load(self, start: int, n: int) -> Batch:
        """Documents as ids, padded, and (in place of labels) which of them are to be predicted."""
        c, index = self.model.config, self.order(start, n)
        noise = Noise(example_numbers(self.config, start, n))
        u = noise.at(purpose="document").uniform(8)
        v = noise.at(purpose="code noise").uniform(2, self.tokens.shape[1]) if c.code_noise else None
        documents, at = [], 0
        while at < n:
            pairs = min(1 + int(u[at, 0] * c.interleave), n - at)
            rows = range(at, at + pairs)
            chat, describe = bool(u[at, 1] < c.chat), bool(u[at, 2] < c.reverse)
            images = [(int(index[i]), u[i].tolist(), None if v is None else v[i]) for i in rows]
            documents.append(self._document(images, describe, chat))
            at += pairs
        ids = pad_sequence([d[0] for d in documents], batch_first=True, padding_value=self.model.eos)
        learn = pad_sequence([d[1] for d in documents], batch_first=True)
        return Batch(ids, learn, noise)

    def _document(
        self, images: list[tuple[int, list[float], torch.Tensor | None]], describe: bool, chat: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of image and text as ids, and which are learned.

        In a chat the answers are; otherwise all, but for noisy codes and the end of an image that shows only its first.
        """
        m, c = self.model, self.model.config
        ids, learn = m.ids_of([]), [False] * len(m.ids_of([]))

        def add(part: Part, learned: bool, whole: bool = True) -> None:
            more = m.ids_of([part])[len(m.ids_of([])) :]
            ids.extend(more)
            learn.extend([learned] * (len(more) - 1) + [learned and whole])

        for i, u, noise in images:
            words = self._caption(i, u[3], describe)
            mirrored = self.config.data.flip and u[4] < 0.5 and not SIDED.search(self.captions[i][0])
            codes = self.tokens[i + len(self.images) * mirrored]
            if describe:
                if noise is not None:
                    other = self.near[codes][torch.arange(len(codes)), (noise[1] * self.near.shape[1]).long()]
                    codes = torch.where(noise[0] < c.code_noise, other, codes)
                whole = u[5] >= c.visual_prefix
                shown = codes if whole else codes[: 1 + int(u[6] * len(codes))]
                for part, learned in ((CHAT_DESCRIBE[0], False),) if chat else ():
                    add(part, learned)
                add(shown, not chat and noise is None, whole)
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

    def before_export(self, model: Any) -> None:
        """Also remember the images, where the model is to."""
        super().before_export(model)
        if self.looks is not None:
            model.remember(self.looks.float(), self.images.captions)

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


def seed_llama_task(config: TrainConfig) -> SeedLlamaTask:
    """The task of a config whose model is a seed_llama.

    Raises:
        ValueError: without a tokenizer, or where its tokens don't fit the model.
    """
    if not config.tokenizer:
        raise ValueError("a seed_llama needs --tokenizer MODEL, any of discrete tokens (see `genlab list`)")
    model = start_model(SeedLlama, config)
    tokenizer, data = fitting_tokenizer(config, model), config.data
    images = open_images(data.source, split=data.split, size=tokenizer.spec.image_size[-1], on_error=data.on_error)
    return SeedLlamaTask(config, model, images, tokenizer)
