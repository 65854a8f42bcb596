"""Whatever the bytes: an image of the right shape, or `ImageError`; never another exception.

GENLAB_FUZZ=7000 python -m pytest -n 0 tests/property/test_data_bytes.py       21,000 inputs and every cut
"""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from genlab.data.decode import ImageError, decode

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much of what it then raises on
MANY = int(os.environ.get("GENLAB_FUZZ", "150"))
FEW = settings(max_examples=MANY, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def samples() -> dict[str, bytes]:
    """One small file of each kind and mode."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 17, 3), np.uint8))
    clear = Image.fromarray(rng.integers(0, 256, (12, 17, 4), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 17), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "jpeg": (colour, "JPEG", {"exif": exif}),
        "progressive": (colour, "JPEG", {"progressive": True}),
        "cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "png": (clear, "PNG", {"exif": exif}),
        "palette": (clear.quantize(16), "PNG", {}),
        "deep": (deep, "PNG", {}),
        "apng": (clear, "PNG", {"save_all": True, "append_images": [colour.convert("RGBA")]}),
        "webp": (clear, "WEBP", {"lossless": True}),
        "lossy webp": (colour, "WEBP", {}),
        "gif": (colour, "GIF", {"save_all": True, "append_images": [clear]}),
        "tiff": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "bmp": (colour, "BMP", {}),
        "ppm": (colour, "PPM", {}),
        "ico": (clear, "ICO", {"sizes": [(12, 12)]}),
        "jp2": (colour, "JPEG2000", {}),
    }
    files = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


SAMPLES = samples()


def check(data: bytes) -> None:
    try:
        pixels = decode(data, "some/file", 8)
    except ImageError as refused:
        error = refused
    else:
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        return
    assert str(error).startswith("some/file: ")
    assert error.reason


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_files_decode(name):
    assert decode(SAMPLES[name], name, 8).shape == (8, 8, 3)


@FEW
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_changed_bytes(name, data):
    damaged = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 8))):
        # Half of the changes go to the first 64 bytes, where the headers are.
        end = len(damaged) - 1
        place = data.draw(st.integers(0, min(63, end)) | st.integers(0, end))
        damaged[place] = data.draw(st.integers(0, 255))
    check(bytes(damaged))


@FEW
@given(st.sampled_from(sorted(SAMPLES)), st.floats(0, 1), st.binary(max_size=40))
def test_cut_and_continued(name, share, tail):
    whole = SAMPLES[name]
    check(whole[: int(len(whole) * share)] + tail)


@FEW
@given(st.binary(max_size=200), st.sampled_from([b"", *(data[:16] for data in SAMPLES.values())]))
def test_any_bytes(data, head):
    check(head + data)


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_short_it_is_refused_or_the_same_picture(name):
    """Never a picture with a part made up."""
    data = SAMPLES[name]
    whole = decode(data, name, 8)
    for end in range(0, len(data), 1 if MANY > 1000 else max(1, len(data) // 20)):
        try:
            pixels = decode(data[:end], name, 8)
        except ImageError:
            continue
        assert np.array_equal(pixels, whole), end
