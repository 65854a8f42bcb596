"""Train a Divot-LLM: documents of captions and of a frozen Divot's cached tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from genlab.data.cache import captions_of
from genlab.data.clips import ClipSet, open_clips
from genlab.generators.divot_lm import DivotLM, Documents
from genlab.hub import from_pretrained
from genlab.noise import Noise, permutation
from genlab.tokens import require_fit
from samplers import default_sampler

from .config import TrainConfig
from .documents import DocumentTask, start_model
from .tasks import Batch, example_numbers, fitting_tokenizer


@dataclass(frozen=True, eq=False)
class DocumentBatch(Batch):
    """Documents of words and clips; `x` are their ids."""

    documents: Documents | None = None

    def to(self, device: torch.device) -> DocumentBatch:
        """The same batch on another device."""
        batch, d = super().to(device), self.documents
        assert d is not None
        moved = Documents(**{name: value.to(device) for name, value in vars(d).items()})
        return DocumentBatch(batch.x, batch.labels, batch.noise, moved)


class DivotLMTask(DocumentTask):
    """Words given clips, clips given words; several pairs in a row where `interleave` says so."""

    model: DivotLM
    images: ClipSet

    def __init__(self, config: TrainConfig, model: DivotLM, images: ClipSet, tokenizer: Any) -> None:
        """As `DocumentTask`."""
        super().__init__(config, model, images, tokenizer, batch_size=16)

    def load(self, start: int, n: int) -> Batch:
        """As many documents, each of one clip or of several pairs of words and clip."""
        c, index = self.model.config, self.order(start, n)
        noise = Noise(example_numbers(self.config, start, n))
        u = noise.at(purpose="document").uniform(4).tolist()
        documents = []
        for b, i in enumerate(index.tolist()):
            if u[b][0] < c.reverse:  # a clip in front of its words
                parts: list[Any] = [self._clip(i, u[b][1]), self._caption(i, u[b][2])]
                documents.append(self.model.document(parts))
                continue
            first = i if u[b][3] >= c.caption_drop or c.interleave > 1 else None
            others = permutation(len(self.images), int(noise.seeds_B[b]), "story")[: c.interleave - 1].tolist()
            pairs = [*others[: int(u[b][1] * c.interleave)], i]
            parts = []
            for k in pairs:
                words = self._caption(k, u[b][2]) if first is not None or k != i else ""
                parts += [words, self._clip(k, u[b][1])]
            documents.append(self.model.document(parts, draw_last=True))
        batch = self.model.batch_of(documents)
        return DocumentBatch(batch.ids_BT, self.images.labels[index], noise, batch)

    def _clip(self, i: int, u: float) -> torch.Tensor:
        return self.tokens[i + len(self.images) * (self.config.data.flip and u * 8 % 1 < 0.5)]

    def _caption(self, i: int, u: float) -> str:
        own = self.captions[i]
        return own[int(u * len(own))]

    def forward(self, batch: Batch, images_seen: int) -> dict[str, torch.Tensor]:
        """Both losses."""
        assert isinstance(batch, DocumentBatch)
        assert batch.documents is not None
        return self.model.multimodal_loss(batch.documents, batch.noise)

    def preview(self, model: Any) -> torch.Tensor:
        """One row a prompt: the frames of a clip."""
        some = [self.captions[i][0] for i in torch.linspace(0, len(self.images) - 1, 8).long().tolist()]
        labels = model.read_captions(list(self.config.prompts) or some)
        out = default_sampler(model).sample(model, labels.to(model.device), seeds=torch.arange(len(labels)))
        with torch.no_grad():
            clips = self.tokenizer.to(model.device).decode(out.tokens, torch.arange(len(labels))).cpu()
        return clips[:, torch.linspace(0, clips.shape[1] - 1, 8).long()].flatten(0, 1)


def divot_lm_task(config: TrainConfig) -> DivotLMTask:
    """The task of a config whose model is a divot_lm.

    Raises:
        ValueError: without a tokenizer, or where its tokens don't fit the model.
    """
    if not config.tokenizer:
        raise ValueError("a divot_lm needs --tokenizer MODEL: a trained divot (see `genlab list`)")
    model = start_model(DivotLM, config)
    tokenizer, data = fitting_tokenizer(config, model), config.data
    t = tokenizer.config
    clips = open_clips(data.source, data.split, t.image_size, t.frames, t.fps, data.on_error, takes=data.takes)
    return DivotLMTask(config, model, clips, tokenizer)


def drawn_tokens(teacher: str, tokenizer: Any, clips: ClipSet) -> torch.Tensor:
    """Tokens (N, queries, C) that a divot_lm draws for each clip's first caption: what stage `adapt` learns from.

    Raises:
        ValueError: if `teacher` is no divot_lm over such tokens.
    """
    lm = from_pretrained(teacher)
    if not isinstance(lm, DivotLM):
        raise ValueError(f"--teacher {teacher} holds a {lm.kind}: tokens are drawn by a divot_lm")
    require_fit("this divot", tokenizer.spec, teacher, lm.spec)
    captions = [own[0] for own in captions_of(clips)]
    out = default_sampler(lm).sample(lm, lm.read_captions(captions), torch.arange(len(captions)), batch_size=16)
    return out.tokens.values
