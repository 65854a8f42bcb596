"""Images and their classes and captions, from wherever they lie: `open_images(source, split=...)`.

Importing this package loads neither torch nor Pillow; its names do, when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genlab.data.decode import ImageError
    from genlab.data.export import write_folder
    from genlab.data.images import Example, ImageSet, open_images

_HOME = {
    "Example": "genlab.data.images",
    "ImageError": "genlab.data.decode",
    "ImageSet": "genlab.data.images",
    "open_images": "genlab.data.images",
    "write_folder": "genlab.data.export",
}
__all__ = ["Example", "ImageError", "ImageSet", "open_images", "write_folder"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'genlab.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
