"""Images and their classes and captions, from wherever they lie: `open_images(source, split=...)`.

Importing this package loads neither torch nor Pillow; its names do, when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genlab.data.images import Example, ImageSet, open_images

_HOME = {
    "Example": "genlab.data.images",
    "ImageSet": "genlab.data.images",
    "open_images": "genlab.data.images",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'genlab.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
