"""Of several drawings of a caption the one that fits it best, as DALL·E chose by CLIP (arXiv 2102.12092, sec. 2.6).

The judge is any model with a space of images and captions: a seed's (`genlab train seed-contrastive-emoji64`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from genlab.data.cache import digest_of
from genlab.pictures import to_float

NEXT = 1 << 32
"""What lies between the seeds of an image's candidates: the first is the image's own."""


def candidate_seeds(seeds_B: torch.Tensor, n: int) -> torch.Tensor:
    """Seeds (B n,) of n candidates for each image, side by side: more candidates hold the fewer ones."""
    return (seeds_B.long()[:, None] + NEXT * torch.arange(n, device=seeds_B.device)).flatten()


class Judge:
    """How well images fit captions, by a model's own space of both."""

    def __init__(self, model: Any, name: str) -> None:
        """Args: model: has `embed_images`, `embed_text`. name: what messages call it. Raises: ValueError: if not."""
        if not hasattr(model, "embed_images") or not model.config.contrastive_dim:
            raise ValueError(
                f"{name} (a {model.kind}) has no space of images and captions to judge by: name a seed, as seed-emoji64"
            )
        self.model = model
        self.about = {"judge": name, "weights_sha256": digest_of("", model.state_dict())}

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, captions: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Cosines (N,) of uint8 images (N, 3, H, W) and their captions."""
        distinct = list(dict.fromkeys(captions))
        words = torch.cat([
            self.model.embed_text(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)
        ])  # fmt: skip
        number, side = {caption: i for i, caption in enumerate(distinct)}, self.model.config.image_size
        seen = []
        for part in images.split(batch_size):
            x = to_float(part).to(self.model.device)
            if x.shape[-2:] != (side, side):
                x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
            seen.append(self.model.embed_images(x))
        return (torch.cat(seen) * words[[number[caption] for caption in captions]]).sum(1).cpu()

    def best(self, images: torch.Tensor, captions: Sequence[str], n: int) -> torch.Tensor:
        """Indices (B,) of the best of each n images in a row; captions: one for each n."""
        each = self(images, [caption for caption in captions for _ in range(n)]).view(-1, n)
        return each.argmax(1) + n * torch.arange(len(each))
