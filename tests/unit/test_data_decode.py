"""Every odd kind of image is decoded rightly, or refused by name and reason."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from genlab.data.decode import ImageError, decode, is_image


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, kind: int, rows: list[bytes], *extra: bytes) -> bytes:
    """Write a PNG by hand: Pillow can't write 16-bit colour or odd transparent colours."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + chunk(b"IEND", b"")


def test_exact_size_is_untouched():
    pixels = noise(16, 16)
    out = decode(save(Image.fromarray(pixels)), "x", 16)
    assert out.dtype == np.uint8
    assert np.array_equal(out, pixels)


def test_centre_crop_without_resize():
    pixels = noise(16, 21)
    assert np.array_equal(decode(save(Image.fromarray(pixels)), "x", 16), pixels[:, 2:18])
    assert np.array_equal(decode(save(Image.fromarray(pixels.transpose(1, 0, 2))), "x", 16)[0], pixels[:, 2])


def test_downsampling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # aliasing would make it black or white
    assert abs(decode(save(Image.fromarray(stripes)), "x", 16).astype(int) - 128).max() < 12


def test_transparency_is_composited_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3], rgba[2:, :, 3] = 200, 0, 128
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        out = decode(save(Image.fromarray(rgba), kind, **options), "x", 4)
        assert (out[:2] == 255).all()
        assert abs(out[2:].astype(int) - [227, 127, 127]).max() <= 1
    grey_alpha = Image.fromarray(np.dstack([np.zeros((4, 4)), rgba[..., 3]]).astype(np.uint8), "LA")
    out = decode(save(grey_alpha), "x", 4)
    assert (out[:2] == 255).all()
    assert abs(out[2:].astype(int) - 127).max() <= 1


def test_palette_with_alpha():
    data = png(2, 1, 8, 3, [b"\0\1"], chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 0])), chunk(b"tRNS", b"\0\x80"))
    wide = Image.open(io.BytesIO(data))
    assert wide.mode == "P"
    assert decode(data, "x", 1)[0, 0].tolist() == [255, 255, 255]
    flipped = png(2, 1, 8, 3, [b"\1\0"], chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 0])), chunk(b"tRNS", b"\0\x80"))
    assert abs(decode(flipped, "x", 1)[0, 0].astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    ("depth", "clear", "other", "shown"),
    [
        (1, 0, 1, 255),
        (1, 1, 0, 0),
        (2, 1, 2, 170),
        (4, 5, 10, 170),
        (8, 5, 16, 16),
        (16, 0x1234, 0x8080, 128),
    ],
)
def test_transparent_grey_at_every_depth(depth, clear, other, shown):
    def one_pixel(value: int) -> bytes:
        row = value.to_bytes(2, "big") if depth == 16 else bytes([value << (8 - depth)])
        return png(1, 1, depth, 0, [row], chunk(b"tRNS", struct.pack(">H", clear)))

    assert decode(one_pixel(clear), "x", 1)[0, 0].tolist() == [255] * 3
    assert decode(one_pixel(other), "x", 1)[0, 0].tolist() == [shown] * 3


def test_sixteen_bits():
    ramp = np.array([[0, 257 * 100, 65535]], np.uint16).repeat(3, 0)
    expected = [0, 100, 255]
    assert decode(save(Image.fromarray(ramp)), "x", 3)[0, :, 0].tolist() == expected
    assert decode(save(Image.fromarray(ramp), "TIFF"), "x", 3)[0, :, 1].tolist() == expected
    pgm = b"P5 3 3 65535\n" + ramp.astype(">u2").tobytes()
    assert decode(pgm, "x", 3)[0, :, 2].tolist() == expected
    colour = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    assert decode(png(1, 1, 16, 2, [colour]), "x", 1)[0, 0].tolist() == [0x12, 0x56, 0x9A]
    clear = png(1, 1, 16, 2, [colour], chunk(b"tRNS", colour))
    assert decode(clear, "x", 1)[0, 0].tolist() == [255, 255, 255]


def test_grey_one_bit_and_cmyk():
    grey = noise(8, 8, 1)[..., 0]
    assert np.array_equal(decode(save(Image.fromarray(grey)), "x", 8), np.dstack([grey] * 3))
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    assert np.array_equal(decode(save(bits), "x", 8)[..., 0], (grey > 127) * 255)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        out = decode(save(cmyk, kind, **options), "x", 8).astype(int)
        assert abs(out - [255, 0, 0]).max() <= 3, kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:] = (255, 0, 0), (0, 255, 0)  # red over black, green to the right
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    out = decode(save(stored, kind, exif=exif, **options), "x", 16).astype(int)
    assert abs(out[4, 4] - [255, 0, 0]).max() < 8
    assert abs(out[4, 12] - [0, 255, 0]).max() < 8
    assert abs(out[12, 4]).max() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_exif():
    pixels = noise()
    data = save(Image.fromarray(pixels), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff\0\0")
    assert np.array_equal(decode(data, "x", 8), pixels)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = save(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert (decode(data, "x", 8) == [255, 0, 0]).all()


def test_one_pixel_and_very_elongated():
    assert (decode(save(Image.new("RGB", (1, 1), (10, 20, 30))), "x", 64) == [10, 20, 30]).all()
    assert (decode(save(Image.new("RGB", (1, 1_000_000), (9, 8, 7))), "x", 64) == [9, 8, 7]).all()
    assert decode(save(Image.new("RGB", (30_000, 2))), "x", 256).shape == (256, 256, 3)


def test_more_formats():
    pixels = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    for kind in ("BMP", "PPM", "TIFF", "ICO") + (("AVIF",) if features.check("avif") else ()):
        options = {"sizes": [(8, 8)]} if kind == "ICO" else {}
        out = decode(save(Image.fromarray(pixels), kind, **options), "x", 8).astype(int)
        assert abs(out - pixels).max() <= (4 if kind == "AVIF" else 0), kind


REFUSED = {
    "zero bytes": (b"", "zero bytes"),
    "not an image": (b"<html>404 Not Found</html>", "not an image"),
    "truncated JPEG": (save(Image.fromarray(noise(64, 64)), "JPEG")[:-600], "truncated|damaged"),
    "truncated PNG": (save(Image.fromarray(noise(64, 64)))[:-3000], "truncated|damaged"),
    "truncated WebP": (save(Image.fromarray(noise(64, 64)), "WEBP")[:-300], "damaged|not an image"),
    "truncated GIF": (save(Image.fromarray(noise(64, 64)), "GIF")[:900], "truncated|damaged"),
    "damaged checksum": (save(Image.fromarray(noise()))[:40] + b"\xff" * 99, "damaged|not an image"),
    "floating point": (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "32-bit integer": (save(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit integer"),
    "bomb": (png(60_000, 60_000, 8, 2, [b"\0" * 9]), "bomb"),
    "smaller bomb": (png(10_000, 9_500, 8, 2, [b"\0" * 9]), "bomb"),
    "text bomb": (
        png(1, 1, 8, 0, [b"\0"], chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 90_000_000, 9))),
        "damaged",
    ),
    "program to run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data, "folder/cat.png", 64)
    assert str(caught.value).startswith("folder/cat.png: ")
    assert "--on-error skip" in str(caught.value)
    assert "on_error='skip'" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_bombs_are_refused_when_warnings_are_errors():
    with pytest.raises(ImageError, match="bomb"):
        decode(REFUSED["smaller bomb"][0], "x", 64)


def test_error_crosses_processes():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "empty")))
    assert (error.where, error.reason) == ("a.png", "empty")


def test_endings():
    assert all(map(is_image, ("jpg", "jpeg", "png", "apng", "webp", "tif", "tiff", "pgm", "avif")))
    assert not any(map(is_image, ("json", "txt", "jpgx", "xpng", "", "eps", "svg")))
