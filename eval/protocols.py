"""Evaluation protocols by name: what turns an image into Inception features, and how scores are cut.

Each is one published tool's way. The same images give different numbers under different protocols; a result
carries its protocol's name, and `eval.result.tabulate` refuses to mix them.
"""

from __future__ import annotations

import dataclasses


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
        ),
        Protocol(
            name="adm",
            resize="tf1-bilinear",
            isc_shuffle=False,
            isc_split=5000,
            description="ADM's evaluator: TensorFlow 1's resize; Inception score on consecutive 5,000 images",
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
