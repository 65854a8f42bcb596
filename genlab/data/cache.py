"""Tokens and caption embeddings of a whole image set, computed once and kept on disk under a fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from genlab.noise import Noise
    from genlab.text import Text, TextEncoder

    from .images import ImageSet


def cache_folder() -> Path:
    """`$GENLAB_CACHE`, else `~/.cache/genlab`."""
    return Path(os.environ.get("GENLAB_CACHE") or Path.home() / ".cache" / "genlab")


def digest_of(head: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Hash of a text and of named tensors, as float32."""
    digest = hashlib.sha256(head.encode())
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, **tensors: torch.Tensor) -> None:
    """Write a file that is either whole or not there."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_tokens(tokenizer: Any, images: ImageSet, *, flip: bool = False, batch_size: int = 64) -> torch.Tensor:
    """Token values (N, *spec.shape) of every image; with `flip`, then of every mirrored image (2N in all).

    The file is mapped, not read, so a set larger than memory is fine; it is keyed by the tokenizer's weights
    and the images' fingerprint.
    """
    import torch
    from safetensors import safe_open
    from tqdm import tqdm

    from genlab.pictures import to_float

    head = f"1 {tokenizer.kind} {tokenizer.config} {flip} {images.fingerprint}"
    path = cache_folder() / "tokens" / f"{digest_of(head, tokenizer.state_dict())}.safetensors"
    if not path.exists():
        parts = []
        with torch.inference_mode():
            for mirrored in (False, True) if flip else (False,):
                starts = range(0, len(images), batch_size)
                for start in tqdm(starts, desc="encoding images", unit="batch", leave=False):
                    index = torch.arange(start, min(start + batch_size, len(images)))
                    x = to_float(images.batch(index)).to(tokenizer.device)
                    parts.append(tokenizer.encode(x.flip(-1) if mirrored else x).values.cpu())
        write_tensors(path, tokens=torch.cat(parts))
    with safe_open(path, "pt") as file:
        return file.get_tensor("tokens")


def captions_of(images: ImageSet) -> list[tuple[str, ...]]:
    """The distinct captions of each image: its own, `captions` (a list) and the `name` it begins with of its metadata.

    Raises:
        ValueError: if no image has one. An image without any, among others that have some, gets the empty caption.
    """
    found = []
    for caption, meta in zip(images.captions, images.meta, strict=True):
        more, name = meta.get("captions"), meta.get("name")
        words = [caption, *(more if isinstance(more, (list, tuple)) else ())]
        words += [name] if isinstance(name, str) and caption.startswith(name) else []
        found.append(tuple(dict.fromkeys(w.strip() for w in words if isinstance(w, str) and w.strip())))
    if not any(found):
        raise ValueError(
            f"{images.source} has no captions to draw by: put them beside the images (name.txt, or metadata.jsonl with "
            "file_name and caption), or train a generator by class"
        )
    return [words or ("",) for words in found]


@dataclass(frozen=True, eq=False)
class Captions:
    """Embeddings of every caption of a set, one behind the other."""

    embeds_SD: torch.Tensor
    """float16."""
    starts: torch.Tensor
    """Where each distinct caption begins, and the end, (M + 1,)."""
    of_image: list[list[int]]
    """Numbers of each image's captions."""

    def batch(self, index: torch.Tensor, noise: Noise) -> Text:
        """One caption an image, chosen by its noise among those it has."""
        from genlab.text import stack_captions

        u = noise.at(purpose="caption").uniform(1)[:, 0].tolist()
        picks = [(own := self.of_image[i])[int(x * len(own))] for i, x in zip(index.tolist(), u, strict=True)]
        spans = [(int(self.starts[p]), int(self.starts[p + 1])) for p in picks]
        return stack_captions([self.embeds_SD[a:b].float() for a, b in spans])


def cached_captions(encoder: TextEncoder, captions: Sequence[tuple[str, ...]]) -> Captions:
    """Embeddings of each image's captions, keyed by the encoder's weights, its length and the words."""
    import torch
    from safetensors import safe_open

    distinct = list(dict.fromkeys(words for own in captions for words in own))
    number = {words: i for i, words in enumerate(distinct)}
    head = f"1 {encoder.name} {encoder.length} {'padded ' * encoder.pad}{distinct}"
    path = cache_folder() / "captions" / f"{digest_of(head, encoder.model.state_dict())}.safetensors"
    if not path.exists():
        parts = encoder.encode_many(distinct, dtype=torch.float16, progress=True)
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        write_tensors(path, embeds=torch.cat(parts), starts=starts)
    with safe_open(path, "pt") as file:
        embeds, starts = file.get_tensor("embeds"), file.get_tensor("starts")
    return Captions(embeds, starts, [[number[words] for words in own] for own in captions])
