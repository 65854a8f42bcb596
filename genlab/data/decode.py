"""Bytes of an image file -> a square of RGB pixels, or an `ImageError` that names the file and the reason."""

from __future__ import annotations

import functools
import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

PREPROCESSING = "genlab-1: first frame, EXIF orientation, on white, bicubic shorter side, centre crop"
"""What `decode` does, in one line; part of a set's fingerprint. Change it when the pixels change."""

MAX_PIXELS = 89_478_485
"""Images that unpack to more pixels than this (about 268 MB as RGB) are refused as decompression bombs."""

# Pillow's readers of plain raster files. Left out on purpose: those that start other programs (EPS), and
# formats whose signature is so weak that damaged files are taken for them.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "QOI")
_SUFFIX = re.compile("jpe?g|jpe|jfif|a?png|webp|gif|bmp|dib|tiff?|p[pgbn]m|jp2|j2k|avif|ico|qoi")


def is_image(suffix: str) -> bool:
    """Tell whether a file name's ending (lower case, no dot) is taken for that of an image."""
    return _SUFFIX.fullmatch(suffix) is not None


class ImageError(ValueError):
    """An image that can't be used: `where` says which one, `reason` why."""

    def __init__(self, where: str, reason: str):
        super().__init__(
            f"{where}: {reason}. Mend or remove the file; where many are read, --on-error skip (`genlab train`: "
            "--data.on-error skip; in Python: on_error='skip') leaves such images out"
        )
        self.where, self.reason = where, reason

    def __reduce__(self):  # so that it crosses process borders (DataLoader workers)
        return (type(self), (self.where, self.reason))


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(data: bytes, where: str, size: int) -> np.ndarray:
    """Decode one image file into an RGB square.

    The first frame of an animation; EXIF orientation applied (unreadable EXIF counts as none); transparency
    composited on white; 16-bit grey scaled to 8 bits; CMYK, palettes, grey and 1-bit converted. ICC profiles
    are ignored, as in torchvision's and the usual FID pipelines. Then the largest centred square is brought
    to `size` with Pillow's antialiased bicubic filter, which is the shorter side to `size` and a centre crop
    without ever holding the resized long side; a square that already has that size is left untouched.

    Args:
        data: the file's bytes.
        where: path or key, for the error message.
        size: side of the result in pixels.

    Returns:
        uint8, (size, size, 3), C-contiguous.

    Raises:
        ImageError: empty, truncated, damaged, not an image, too large, or pixels without a fixed white
            (32-bit integer, floating point).
    """
    from PIL import Image

    if not data:
        raise ImageError(where, "the file is empty (zero bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    where,
                    f"{width}x{height} pixels, more than the limit of {MAX_PIXELS} (decompression bomb?)",
                )
            if image.format == "JPEG2000" and not _ends(data):
                raise ImageError(where, "truncated JPEG 2000")  # its reader would make up the rest
            image.load()
            _mend_colour_key(image, data)
            rgb = _upright(on_white(image, where), image)
        return square(rgb, size)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(where, f"decompression bomb: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(where, f"not an image of a known format ({', '.join(formats())})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise ImageError(where, f"damaged image: {type(error).__name__}: {error}") from error


def square(rgb: Image.Image, size: int) -> np.ndarray:
    """The largest centred square of an RGB picture, brought to `size`: uint8 (size, size, 3)."""
    from PIL import Image

    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    box = (left, top, left + side, top + side)
    rgb = rgb.crop(box) if side == size else rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.array(rgb)


def _ends(data: bytes) -> bool:
    """Whether a JPEG 2000's codestream, bare or in a box of a file (ISO 15444-1, annex I), has its end mark."""
    mark, at = b"\xff\xd9", 0
    if data.startswith(b"\xff\x4f\xff\x51"):
        return data.endswith(mark)
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:  # the size follows, in eight bytes
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + size if size else len(data)
        if kind == b"jp2c":
            return data[end - 2 : end] == mark
        at = max(end, at + 8)
    return False


def _mend_colour_key(image: Image.Image, data: bytes) -> None:
    """Scale a PNG's transparent colour as Pillow scaled the pixels (which it forgets at 2, 4 and 16 bits)."""
    key, depth = image.info.get("transparency"), data[24] if image.format == "PNG" else 8
    if image.mode == "L" and isinstance(key, int) and depth in (2, 4):
        image.info["transparency"] = key * (255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def on_white(image: Image.Image, where: str) -> Image.Image:
    """Convert a loaded image of any mode to RGB, transparency composited on white."""
    from PIL import Image

    if (image.mode == "I" and image.format in ("PNG", "PPM")) or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        grey = (np.clip(values, 0, 65535) + 128) // 257
        clear = image.info.get("transparency")  # one grey value of a PNG, in 16 bits
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ImageError(where, f"{kind} pixels have no fixed white; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Turn or mirror the picture as the EXIF orientation of `source` says."""
    from PIL import ExifTags, Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
        return rgb.transpose(turns[orientation]) if orientation in turns else rgb
    except Exception:  # damaged EXIF beside sound pixels: every viewer shows such an image as it is
        return rgb
