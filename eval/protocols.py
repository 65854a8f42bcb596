"""Evaluation protocols by name: what turns an image into Inception features, and how scores are cut.

Each is one published tool's way. The same images give different numbers under different protocols; a result
carries its protocol's name, and `eval.result.tabulate` refuses to mix them.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.error
import urllib.request
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the Inception metrics are measured."""

    name: str
    """As on the command line."""
    resize: str
    """How images reach 299 pixels (`eval.resize.RESIZES`)."""
    isc_shuffle: bool = True
    """Inception score over splits of shuffled images, or of consecutive ones."""
    isc_split: int | None = None
    """Images in a split; None means 10 splits."""
    description: str = ""
    """What it stands for."""
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    """Statistics that its authors hand out, by data set: `--reference published:NAME`."""


_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_CLEAN = "https://www.cs.cmu.edu/~clean-fid/stats"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="torch-fidelity",
            resize="tf1-bilinear",
            description="torch-fidelity 0.4: TensorFlow 1's bilinear resize, no antialiasing",
        ),
        Protocol(
            name="clean-fid",
            resize="pil-bicubic",
            description="clean-fid's `clean` mode: antialiased bicubic on float channels, not rounded",
            references={
                "cifar10": f"{_CLEAN}/cifar10_clean_train_32.npz",
                "ffhq256": f"{_CLEAN}/ffhq_clean_trainval70k_256.npz",
                "ffhq1024": f"{_CLEAN}/ffhq_clean_trainval70k_1024.npz",
            },
        ),
        Protocol(
            name="adm",
            resize="tf1-bilinear",
            isc_shuffle=False,
            isc_split=5000,
            description="ADM's evaluator: TensorFlow 1's resize; Inception score on consecutive 5,000 images",
            references={
                "imagenet64": f"{_ADM}/imagenet/64/VIRTUAL_imagenet64_labeled.npz",
                "imagenet128": f"{_ADM}/imagenet/128/VIRTUAL_imagenet128_labeled.npz",
                "imagenet256": f"{_ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
                "imagenet512": f"{_ADM}/imagenet/512/VIRTUAL_imagenet512.npz",
            },
        ),
        Protocol(
            name="pytorch-fid",
            resize="torch-bilinear",
            description="pytorch-fid: bilinear on the half-pixel grid, no antialiasing, scaled to [-1, 1]",
        ),
    )
}
"""All protocols read 8-bit RGB images and share the weights of Inception-2015."""

EMBEDDED = "genlab"
"""Named by results without an Inception metric: each extractor fixes its own resize."""


def protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def published_reference(rules: Protocol, name: str, cache: Path) -> Path:
    """The file of a reference that a protocol's authors hand out: from the cache, else from the network.

    Args:
        rules: the protocol.
        name: out of its `references`.
        cache: files lie in its folder `references`.

    Raises:
        ValueError: the protocol has no such reference.
        FileNotFoundError: it is not in the cache and cannot be fetched, with the command that does.
    """
    if name not in rules.references:
        there = ", ".join(f"{p.name}: {' '.join(p.references)}" for p in PROTOCOLS.values() if p.references)
        raise ValueError(f"protocol {rules.name} has no published reference {name!r}; there are {there}")
    url = rules.references[name]
    path = cache / "references" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    problem = "offline mode is set (HF_HUB_OFFLINE)"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            urllib.request.urlretrieve(url, temporary)
            os.replace(temporary, path)
            return path
        except (OSError, urllib.error.ContentTooShortError) as error:
            problem = f"the download failed ({error})"
        finally:
            temporary.unlink(missing_ok=True)
    raise FileNotFoundError(
        f"the reference {name} of {rules.name} is not at {path}, and {problem}. Fetch it with\n"
        f"  curl -L --create-dirs -o {path} {url}"
    )
