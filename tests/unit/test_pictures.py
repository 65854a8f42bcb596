"""Pictures: all 256 values come back, grids have the promised size, PNG files carry their metadata."""

import numpy as np
import pytest
import torch
from PIL import Image

from genlab.pictures import grid, save_png, to_float, to_pil, to_uint8


def test_all_256_values_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x.double()), values)
    nearest = (x + 0.9 / 255).clamp(max=1)  # just under half a step away
    assert torch.equal(to_uint8(nearest), values)


def test_out_of_range_is_clamped_and_nonsense_refused():
    assert to_uint8(torch.tensor([-3.0, 1.2, 1e30])).tolist() == [0, 255, 255]
    for bad in (torch.tensor([float("nan")]), torch.tensor([float("inf")]), torch.tensor([1])):
        with pytest.raises(ValueError, match="expected finite float images"):
            to_uint8(bad)
    for bad in (torch.zeros(2), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected uint8 images, got torch"):
            to_float(bad)


def some(n, h=10, w=12):
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_to_pil_keeps_pixels():
    image = some(1)[0]
    assert np.array_equal(np.asarray(to_pil(image)), image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(to_pil(to_float(image))), image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("zoom", [1, 3])
@pytest.mark.parametrize(("n", "columns"), [(1, 8), (6, 3), (7, 3)])
def test_grid(n, columns, zoom):
    images, gap = some(n), 2 * zoom
    picture = grid(images, columns=columns, zoom=zoom)
    rows = -(-n // columns)
    assert picture.size == (columns * (12 * zoom + gap) + gap, rows * (10 * zoom + gap) + gap)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    for i in range(n):
        x, y = gap + i % columns * (12 * zoom + gap), gap + i // columns * (10 * zoom + gap)
        tile = pixels[:, y : y + 10 * zoom, x : x + 12 * zoom]
        assert torch.equal(tile[:, ::zoom, ::zoom], images[i])
        assert torch.equal(tile[:, zoom - 1 :: zoom, zoom - 1 :: zoom], images[i])


def test_grid_with_words():
    images = some(4)
    plain, labelled = (
        grid(images, columns=2),
        grid(images, columns=2, row_labels=["cat", "a long class name"], title="t"),
    )
    assert labelled.height == plain.height + 24
    assert labelled.width > plain.width + 60
    pixels = np.asarray(labelled)
    left = labelled.width - plain.width
    assert np.array_equal(pixels[24:, left:], np.asarray(plain))  # the tiles are the same ones
    assert (pixels[24:, :left] < 100).any()  # and there is something written beside them


def test_a_long_caption_leaves_room_for_the_pictures():
    images = torch.zeros(1, 3, 8, 8)
    assert grid(images, row_labels=["word " * 2000]).width < grid(images, row_labels=["W" * 80]).width < 1500


def test_save_png(tmp_path):
    image = to_pil(some(1)[0])
    path = tmp_path / "deep" / "a.png"
    save_png(image, path, {"seed": 3, "class": "naïve 顔", "empty": ""})
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(again), np.asarray(image))
        assert again.text == {"seed": "3", "class": "naïve 顔", "empty": ""}
    save_png(image, tmp_path / "no_ending")
    with Image.open(tmp_path / "no_ending") as again:
        assert again.format == "PNG"


def test_a_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image, path = to_pil(some(1)[0]), tmp_path / "a.png"
    save_png(image, path)
    before = path.read_bytes()

    def half(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    for name in ("a.png", "new.png"):
        with pytest.raises(OSError, match="disk full"):
            save_png(image, tmp_path / name)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
