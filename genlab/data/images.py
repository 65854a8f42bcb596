"""Image sets with classes and captions (first version: the embedded set `emoji`)."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image (uint8, (3, H, W)) with its class index, caption and key."""

    image: torch.Tensor
    label: int
    caption: str
    key: str


class ImageSet:
    """A split of a set of images; see `open_images`."""

    def __init__(self, records: list[tuple[str, bytes, dict[str, Any]]], classes: tuple[str, ...], size: int):
        self._records, self.classes, self.size = records, classes, size
        self.skipped: list[tuple[str, str]] = []
        self.keys = [key for key, _, _ in records]
        self.meta = [meta for _, _, meta in records]
        self.captions = [meta["caption"] for meta in self.meta]

    def __len__(self) -> int:
        return len(self._records)

    @cached_property
    def labels(self) -> torch.Tensor:
        import torch

        return torch.tensor([self.classes.index(m["class"]) for m in self.meta])

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"size={self.size}".encode())
        for key, data, _ in self._records:
            digest.update(key.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def __getitem__(self, i: int) -> Example:
        return Example(
            image=self.batch([i])[0], label=int(self.labels[i]), caption=self.captions[i], key=self.keys[i]
        )

    @cached_property
    def _decoded(self) -> torch.Tensor:
        import numpy as np
        import torch
        from PIL import Image

        images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data, _ in self._records]
        if self.size != 64:
            side = (self.size, self.size)
            images = [image.resize(side, Image.Resampling.BICUBIC) for image in images]
        stacked = np.stack([np.asarray(image) for image in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    def batch(self, indices: Any) -> torch.Tensor:
        return self._decoded[indices]

    def report(self) -> str:
        return f"{len(self)} images, {len(self.skipped)} skipped"


def open_images(source: str, split: str = "train", size: int = 64, on_error: str = "raise") -> ImageSet:
    """Open a split of an image set: `open_images("emoji", split="train")`."""
    if source != "emoji":
        raise ValueError(f"unknown source {source!r}; expected 'emoji'")
    index = json.loads((HERE / "emoji" / "index.json").read_text())
    records: dict[str, dict[str, bytes]] = {}
    for shard in index["splits"][split]["shards"]:
        with tarfile.open(HERE / "emoji" / shard["file"]) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                assert file is not None
                records.setdefault(key, {})[suffix] = file.read()
    found = [(key, files["webp"], json.loads(files["json"])) for key, files in records.items()]
    return ImageSet(found, tuple(index["classes"]), size)
