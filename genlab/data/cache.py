"""Tokens of a whole image set, computed once and kept on disk under a fingerprint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .images import ImageSet


def cache_folder() -> Path:
    """`$GENLAB_CACHE`, else `~/.cache/genlab`."""
    return Path(os.environ.get("GENLAB_CACHE") or Path.home() / ".cache" / "genlab")


def _fingerprint(tokenizer: Any, images: ImageSet, flip: bool) -> str:
    digest = hashlib.sha256(f"1 {tokenizer.kind} {tokenizer.config} {flip} {images.fingerprint}".encode())
    for name, value in tokenizer.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_tokens(tokenizer: Any, images: ImageSet, *, flip: bool = False, batch_size: int = 64) -> torch.Tensor:
    """Token values (N, *spec.shape) of every image; with `flip`, then of every mirrored image (2N in all).

    The file is mapped, not read, so a set larger than memory is fine; it is keyed by the tokenizer's weights
    and the images' fingerprint.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm import tqdm

    from genlab.pictures import to_float

    path = cache_folder() / "tokens" / f"{_fingerprint(tokenizer, images, flip)}.safetensors"
    if not path.exists():
        parts = []
        with torch.inference_mode():
            for mirrored in (False, True) if flip else (False,):
                starts = range(0, len(images), batch_size)
                for start in tqdm(starts, desc="encoding images", unit="batch", leave=False):
                    index = torch.arange(start, min(start + batch_size, len(images)))
                    x = to_float(images.batch(index)).to(tokenizer.device)
                    parts.append(tokenizer.encode(x.flip(-1) if mirrored else x).values.cpu())
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"tokens": torch.cat(parts)}, temporary)
        temporary.replace(path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("tokens")
