"""CLIP score (arXiv 2104.08718): how well images match their captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

CLIP = "openai/clip-vit-base-patch16"


def clip_scores(
    pairs: Iterable[tuple[torch.Tensor, Sequence[str]]], *, model: str | Path = CLIP, device: str = "cpu"
) -> np.ndarray:
    """100 max(0, cos) between the embeddings of images and captions, one value an image.

    Args:
        pairs: batches of (uint8 images (B, 3, H, W), captions).
        model: a CLIP of transformers: Hub id or folder.
        device: where it runs.

    Raises:
        ValueError: another number of captions than images.
        FileNotFoundError: the model is neither in the cache nor to be downloaded.
    """
    import torch

    network, processor = load_clip(model, device), _processor(model)
    scores = []
    for images, captions in pairs:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, but {len(captions)} captions")
        inputs: Any = processor(
            text=list(captions), images=list(images), return_tensors="pt", padding=True, truncation=True
        )
        with torch.inference_mode():
            out = network(**{k: v.to(device) for k, v in inputs.items()})
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
        scores.append(100.0 * cosine.clamp(min=0.0).cpu().numpy())
    return np.concatenate(scores) if scores else np.empty(0)


def clip_name(model: str | Path) -> str:
    """How a result names a CLIP: the Hub id, or a folder's name and the hash of its weights."""
    from .features import file_hash

    files = [path for path in (Path(model) / "model.safetensors", Path(model) / "pytorch_model.bin") if path.is_file()]
    return f"{Path(model).name}/{file_hash(files[0])[:16]}" if files else str(model)


def load_clip(model: str | Path, device: str) -> Any:
    """A CLIP model of transformers, or an error with the command that fetches it."""
    transformers = _transformers()
    try:
        network, info = transformers.CLIPModel.from_pretrained(str(model), output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"no CLIP at {model}, and the download failed ({str(error).splitlines()[0]}). Fetch it with\n"
            f"  hf download {model}\nor name a folder that holds it (`--weights clip-vit-l14-336 FOLDER`, "
            "`--weights clip_score FOLDER`)"
        ) from error
    broken = [*info["missing_keys"], *info["mismatched_keys"]]
    if broken:  # transformers would fill these in at random and only warn
        raise ValueError(f"{model} does not hold a whole CLIP: {len(broken)} weights missing, first {broken[0]}")
    return network.eval().requires_grad_(False).to(device)


def _processor(model: str | Path) -> Any:
    return _transformers().CLIPProcessor.from_pretrained(str(model))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("CLIP needs transformers: `pip install 'genlab[hf]'`") from error
    return transformers
