"""genlab: image tokenizers, autoregressive generators, accelerated samplers, and an FID harness.

Importing this package is cheap: torch and the parts below load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Tokens": "genlab.tokens",
    "TokenSpec": "genlab.tokens",
    "Noise": "genlab.noise",
    "from_pretrained": "genlab.hub",
    "open_images": "genlab.data",
}

if TYPE_CHECKING:
    from genlab.data import open_images
    from genlab.hub import from_pretrained
    from genlab.noise import Noise
    from genlab.tokens import Tokens, TokenSpec

__all__ = ["Noise", "TokenSpec", "Tokens", "__version__", "from_pretrained", "open_images"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'genlab' has no attribute {name!r}")
