"""Folders, shards and Hugging Face data sets give the same kind of set, and name what is wrong with them."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genlab.data import Example, ImageError, open_images, shards, write_folder
from genlab.data.images import named_split

SIZE = 8


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def tar(path: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shown(images, index: int) -> np.ndarray:
    return images[index].image.permute(1, 2, 0).numpy()


# ---- folders


def test_folder_with_splits_classes_and_captions(tmp_path):
    put(
        tmp_path,
        {
            "train/cat/a.png": encoded(0),
            "train/dog/b.JPG": encoded(1),
            "train/dog/b.txt": "a dog\n",
            "train/metadata.jsonl": '{"file_name": "cat/a.png", "text": "a cat", "age": 3}\n\n',
            "val/bird/c.png": encoded(2),
            "test/cat/d.png": encoded(3),
            "readme.md": "hello",
            ".DS_Store": b"\0",
        },
    )
    train = open_images(tmp_path, size=SIZE)
    assert train.classes == ("bird", "cat", "dog")  # of all splits
    assert train.keys == ["cat/a", "dog/b"]
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [1, 2]
    assert train.captions == ["a cat", "a dog"]
    assert train.meta[0] == {"age": 3}
    assert np.array_equal(shown(train, 0), picture(0))
    assert "1 hidden, 1 md" in train.report()
    held = open_images(tmp_path, split="heldout", size=SIZE)
    assert held.keys == ["bird/c"]
    assert "'test' (1 images) is left out" in held.report()
    assert open_images(tmp_path, split="test", size=SIZE).keys == ["cat/d"]
    assert len(open_images(tmp_path, split="all", size=SIZE)) == 4


def test_the_same_names_in_both_splits(tmp_path):
    put(tmp_path, {"train/a/1.png": encoded(0), "heldout/a/1.png": encoded(1)})
    assert open_images(tmp_path, size=SIZE).keys == ["a/1"]
    assert open_images(tmp_path, split="all", size=SIZE).keys == ["heldout/a/1", "train/a/1"]


def test_folder_without_splits_is_split_by_key(tmp_path):
    put(tmp_path, {f"{c}/{i}.png": encoded(i) for c in ("x", "y") for i in range(60)})
    train, held = (open_images(tmp_path, split=s, size=SIZE) for s in ("train", "heldout"))
    assert not set(train.keys) & set(held.keys)
    assert len(train) + len(held) == 120
    assert 3 <= len(held) <= 25
    assert "no splits in the source" in held.report()
    for path in tmp_path.rglob("1*.png"):  # the others stay where they were
        path.unlink()
    assert set(open_images(tmp_path, split="heldout", size=SIZE).keys) <= set(held.keys)


def test_a_class_called_train(tmp_path):
    put(tmp_path, {"train/1.png": encoded(0), "bus/1.png": encoded(1)})
    images = open_images(tmp_path, split="all", size=SIZE)
    assert images.classes == ("bus", "train")
    assert "taken for classes" in images.report()


def test_flat_folder_and_same_stems(tmp_path):
    put(tmp_path, {"a.png": encoded(0), "a.webp": encoded(1), "b.png": encoded(2)})
    images = open_images(str(tmp_path), split="all", size=SIZE)
    assert images.keys == ["a.png", "a.webp", "b"]
    assert images.labels.tolist() == [-1, -1, -1]
    assert images.classes == ()
    assert "3 images unlabelled" in images.report()


def test_stated_classes_fix_the_order(tmp_path):
    put(tmp_path, {"b/1.png": encoded(0), "classes.txt": "c\nb\na\n"})
    images = open_images(tmp_path, split="all", size=SIZE)
    assert (images.classes, images.labels.tolist()) == (("c", "b", "a"), [1])
    put(tmp_path, {"z/1.png": encoded(0)})
    with pytest.raises(ValueError, match="class 'z', not one of its 3 classes"):
        open_images(tmp_path, split="all")


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such source; expected 'emoji', 'emoji-anim', a folder"):
        open_images(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no images found"):
        open_images(put(tmp_path / "empty", {"x.txt": "x"}))
    put(tmp_path / "one", {"train/1.png": encoded(0)})
    with pytest.raises(ValueError, match=r"no images in split 'heldout' \(there are 1 train\)"):
        open_images(tmp_path / "one", split="heldout")
    with pytest.raises(ValueError, match="no images in split 'tain'"):
        open_images(tmp_path / "one", split="tain")
    put(tmp_path / "bad", {"1.png": encoded(0), "metadata.jsonl": '{"file_name": "1.png"}\n{"file": 1}\n'})
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: expected a JSON object with file_name"):
        open_images(tmp_path / "bad")
    put(tmp_path / "twins", {"1.png": encoded(0), "2.png": encoded(0)})
    put(
        tmp_path / "twins",
        {"captions.jsonl": "".join(f'{{"file_name": "{i}.png", "key": "k"}}\n' for i in (1, 2))},
    )
    with pytest.raises(ValueError, match="two images have the key 'k'"):
        open_images(tmp_path / "twins", split="all")
    for wrong in ({"on_error": "ignore"}, {"size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            open_images(tmp_path / "one", **wrong)


def test_metadata_that_names_no_image_is_reported(tmp_path):
    put(tmp_path, {"1.png": encoded(0), "metadata.jsonl": '{"file_name": "gone.png", "text": "x"}\n'})
    assert "1 metadata lines name no image, first gone.png" in open_images(tmp_path, split="all").report()


def test_links_in_circles(tmp_path):
    put(tmp_path, {"a/1.png": encoded(0)})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(open_images(tmp_path, split="all")) == 1


# ---- broken images


def broken(root: Path) -> Path:
    return put(
        root,
        {
            "a/good.png": encoded(0),
            "a/empty.png": b"",
            "a/page.jpg": b"<html>",
            "b/cut.png": encoded(1)[:90],
            "b/also good.png": encoded(2),
        },
    )


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_skip_counts_and_reports(tmp_path, cache_bytes):
    with pytest.warns(UserWarning, match="skipped 3 of 5 images that can't be read, first .*empty.png: the file is"):
        images = open_images(broken(tmp_path), split="all", size=SIZE, on_error="skip", cache_bytes=cache_bytes)
    assert images.keys == ["a/good", "b/also good"]
    assert images.labels.tolist() == [0, 1]
    assert len(images.labels) == len(images.captions) == len(images.meta) == len(images) == 2
    assert [key for key, _ in images.skipped] == ["a/empty", "a/page", "b/cut"]
    report = images.report()
    for part in ("2 images", "3 skipped", "zero bytes", "not an image", "cut.png"):
        assert part in report
    assert np.array_equal(shown(images, 1), picture(2))
    assert images.batch([0, 1]).shape == (2, 3, SIZE, SIZE)


def test_raise_names_the_file(tmp_path):
    images = open_images(broken(tmp_path), split="all", size=SIZE)
    assert len(images) == 5
    with pytest.raises(ImageError, match=r"empty.png: the file is empty \(zero bytes\)"):
        images.batch(range(5))
    assert np.array_equal(shown(images, images.keys.index("a/good")), picture(0))
    (tmp_path / "a" / "good.png").unlink()
    with pytest.raises(ImageError, match=r"good.png: can't be read"):
        _ = images.fingerprint


def test_nothing_to_skip_is_silent_and_all_broken_is_an_error(tmp_path):
    put(tmp_path / "good", {"1.png": encoded(0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_images(tmp_path / "good", split="all", on_error="skip").skipped == []
    put(tmp_path / "bad", {"1.png": b"", "2.png": b"x"})
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        open_images(tmp_path / "bad", split="all", on_error="skip")


# ---- indexing, cache, fingerprint


def test_batch_takes_every_kind_of_index(tmp_path):
    put(tmp_path, {f"{i:02d}.png": encoded(i) for i in range(20)})
    for cache_bytes in (0, 1 << 20):
        images = open_images(tmp_path, split="all", size=SIZE, cache_bytes=cache_bytes)
        want = torch.from_numpy(np.stack([picture(i) for i in (3, 1, 3)])).permute(0, 3, 1, 2)
        for index in ([3, 1, 3], (3, 1, -17), torch.tensor([3, 1, 3]), np.array([3, 1, 3])):
            assert torch.equal(images.batch(index), want)
        assert images.batch(slice(2, 5)).shape == images.batch(range(2, 5)).shape == (3, 3, SIZE, SIZE)
        assert torch.equal(images.batch(torch.arange(20) < 3), images.batch([0, 1, 2]))
        assert images.batch([]).shape == (0, 3, SIZE, SIZE)
        assert images.batch(range(20)).dtype == torch.uint8
        batch = images.batch([0])
        batch.zero_()  # a caller's change must not reach the cache
        assert np.array_equal(shown(images, 0), picture(0))
        with pytest.raises(IndexError):
            images.batch([20])
        with pytest.raises(IndexError):
            images[20]
        example = images[-1]
        assert isinstance(example, Example)
        assert (example.key, example.label, example.caption) == ("19", -1, "")
        assert len(list(images)) == 20


def test_sets_can_be_pickled(tmp_path):
    put(tmp_path, {f"{i}.png": encoded(i) for i in range(3)})
    images = open_images(tmp_path, split="all", size=SIZE)
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.batch([0, 2]), images.batch([0, 2]))


def test_fingerprint_changes_with_content_and_preprocessing(tmp_path):
    put(tmp_path, {"a/1.png": encoded(1), "a/2.png": encoded(2), "a/2.txt": "two"})

    def fingerprint(size: int = SIZE) -> str:
        return open_images(tmp_path, split="all", size=size).fingerprint

    first = fingerprint()
    assert len(first) == 64
    assert fingerprint() == first
    assert fingerprint(size=9) != first
    (tmp_path / "a/1.png").touch()
    assert fingerprint() == first
    seen = {first}
    put(tmp_path, {"a/1.png": encoded(3)})
    seen.add(fingerprint())
    put(tmp_path, {"a/2.txt": "TWO"})
    seen.add(fingerprint())
    (tmp_path / "a").rename(tmp_path / "b")
    seen.add(fingerprint())
    (tmp_path / "b/2.png").unlink()
    seen.add(fingerprint())
    assert len(seen) == 5


def test_fingerprint_does_not_depend_on_the_place(tmp_path):
    for name in ("here", "there"):
        put(tmp_path / name, {"a/1.png": encoded(1)})
    assert len({open_images(tmp_path / name, split="all").fingerprint for name in ("here", "there")}) == 1


def test_resizes_to_size(tmp_path):
    wide = np.zeros((40, 90, 3), np.uint8)
    wide[:, 25:60] = 255
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    put(tmp_path, {"1.png": buffer.getvalue()})
    whole = np.asarray(Image.fromarray(wide).resize((36, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(shown(open_images(tmp_path, split="all", size=16), 0), whole[:, 10:26])


# ---- shards


def sample(seed: int, cls: str, caption: str) -> dict[str, bytes | str]:
    return {
        f"img{seed:03d}.png": encoded(seed),
        f"img{seed:03d}.json": json.dumps({"class": cls, "caption": caption}),
    }


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("tgz", "w:gz")])
def test_shards_by_pattern_and_folder(tmp_path, ending, mode):
    tar(tmp_path / f"train-000.{ending}", {**sample(0, "cat", "zero"), **sample(1, "dog", "one")}, mode)
    tar(tmp_path / f"train-001.{ending}", sample(2, "dog", "two"), mode)
    tar(tmp_path / f"val-000.{ending}", sample(3, "eel", "three"), mode)
    for source in (tmp_path, f"{tmp_path}/train-{{000..001}}.{ending}"):
        images = open_images(source, size=SIZE)
        assert images.keys == ["img000", "img001", "img002"]
        assert images.captions == ["zero", "one", "two"]
        assert [images.classes[i] for i in images.labels] == ["cat", "dog", "dog"]
        assert np.array_equal(shown(images, 2), picture(2))
    assert images.classes == ("cat", "dog")
    held = open_images(tmp_path, split="heldout", size=SIZE)
    assert (held.keys, held.classes) == (["img003"], ("cat", "dog", "eel"))
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards of .* are missing, first .*train-002"):
        open_images(f"{tmp_path}/train-{{000..003}}.{ending}")


def test_shards_with_cls_and_txt(tmp_path):
    path = tar(
        tmp_path / "set.tar",
        {
            "dir/a.png": encoded(0),
            "dir/a.cls": "3",
            "dir/a.txt": "words\n",
            "b.PNG": encoded(1),
            "c.txt": "no image",
        },
    )
    images = open_images(path, split="all", size=SIZE)
    assert images.keys == ["dir/a", "b"]
    assert images.classes == ("0", "1", "2", "3")
    assert images.labels.tolist() == [3, -1]
    assert images.captions == ["words", ""]
    assert "passed over: {'txt': 1}" in images.report()
    put(tmp_path, {"classes.txt": "n\ne\ns\nw\n"})
    assert open_images(path, split="all").classes == ("n", "e", "s", "w")


def test_shards_that_each_count_from_zero(tmp_path):
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", sample(0, "c", name))
    images = open_images(tmp_path, split="all", size=SIZE)
    assert len(set(images.keys)) == 2
    assert images.captions == ["a", "b"]


def test_broken_image_in_a_shard(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.png": b"", "b.png": encoded(0)})
    with pytest.raises(ImageError, match=r"x.tar::a.png: the file is empty"):
        open_images(path, split="all").batch([0])
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert open_images(path, split="all", on_error="skip").keys == ["b"]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\e.png"])
def test_paths_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a path that leads outside; refused"):
        open_images(tar(tmp_path / "x.tar", {"good.png": encoded(0), name: encoded(1)}), on_error="skip")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "b.png"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"'a.png' is a link or a special file; refused"):
        open_images(tmp_path / "x.tar", on_error="skip")


def test_a_shard_that_unpacks_without_end_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tar(tmp_path / "x.tar.xz", {"a.png": bytes(1 << 20)}, "w:xz")
    assert path.stat().st_size < 1 << 12
    monkeypatch.setattr(shards, "MEMORY", 1 << 19)
    monkeypatch.setattr(tarfile.ExFileObject, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="compressed shards beyond"):
        open_images(path, split="all")


def test_damaged_shards(tmp_path):
    whole = tar(tmp_path / "whole.tar", {**sample(0, "a", ""), **sample(1, "a", "")}).read_bytes()
    packed = tar(tmp_path / "packed.tar.xz", sample(0, "a", ""), "w:xz").read_bytes()
    for name, data in {
        "cut.tar": whole[:700], "cut.tar.xz": packed[:-200],
        "marks.tar": whole[: 4 * 1024], "none.tar": b"", "page.tar": b"<html>" * 300,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: damaged or truncated tar"):
            open_images(tmp_path / name, split="all")
    with pytest.raises(ValueError, match=r"holds a.png twice"):
        open_images(_twice(tmp_path / "twice.tar"), split="all")
    with pytest.raises(ValueError, match=r"::a.png: its .json or .cls can't be read"):
        open_images(tar(tmp_path / "json.tar", {"a.png": encoded(0), "a.json": "{"}), split="all")
    with pytest.raises(ValueError, match="several images"):
        open_images(tar(tmp_path / "two.tar", {"a.png": encoded(0), "a.jpg": encoded(0)}), split="all")
    tar(tmp_path / "mixed" / "train-0.tar", sample(0, "a", ""))
    tar(tmp_path / "mixed" / "more.tar", sample(1, "a", ""))
    with pytest.raises(ValueError, match=r"more.tar: the other shards' names begin with a split"):
        open_images(tmp_path / "mixed")
    with pytest.raises(ValueError, match="read from disk only"):
        open_images("https://example.org/train-{0..9}.tar")


def _twice(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return path


def test_shards_beside_images_and_splits_without_shards(tmp_path):
    tar(tmp_path / "train-0.tar", sample(0, "a", ""))
    with pytest.raises(ValueError, match=r"no shards of split 'heldout' \(there are train\)"):
        open_images(tmp_path, split="heldout")
    with pytest.raises(ValueError, match=r"no shards of split 'val' \(there are heldout, train\)"):
        open_images("emoji", split="val")
    put(tmp_path, {"cat/1.png": encoded(0)})
    with pytest.raises(ValueError, match=r"holds images \(cat/1.png\) as well as shards \(train-0.tar\)"):
        open_images(tmp_path)


def test_index_of_something_else(tmp_path):
    tar(tmp_path / "train-0.tar", sample(0, "a", ""))
    for text in ("[]", '{"classes": {"a": 1}, "splits": ["train"]}', '{"splits": {"train": 3}}'):
        put(tmp_path, {"index.json": text})
        assert open_images(tmp_path).classes == ("a",)
    put(tmp_path, {"index.json": "{"})
    with pytest.raises(ValueError, match=r"index.json: not valid JSON"):
        open_images(tmp_path)


def test_wrong_checksum(tmp_path):
    tar(tmp_path / "train-0.tar", sample(0, "a", ""))
    index = {"classes": ["a"], "splits": {"train": {"shards": [{"file": "train-0.tar", "sha256": "0" * 64}]}}}
    put(tmp_path, {"index.json": json.dumps(index)})
    with pytest.raises(ValueError, match="its sha256 is not the one in"):
        open_images(tmp_path)


def test_webdataset_itself_reads_such_shards(tmp_path):
    import webdataset

    tar(tmp_path / "train-0.tar", {**sample(0, "a", "zero"), **sample(1, "b", "one")})
    ours = open_images(tmp_path, size=SIZE)
    theirs = list(webdataset.WebDataset(str(tmp_path / "train-0.tar"), shardshuffle=False).decode("rgb8"))
    assert [row["__key__"] for row in theirs] == ours.keys
    assert all(np.array_equal(row["png"], shown(ours, i)) for i, row in enumerate(theirs))


# ---- Hugging Face


def hugging_face_table(seeds, **columns):
    import datasets

    features = {"picture": datasets.Image()}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    for name in columns.keys() - {"label"}:
        features[name] = datasets.Value("string")
    rows = {"picture": [{"bytes": encoded(s), "path": None} for s in seeds], **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_hugging_face_from_disk(tmp_path):
    import datasets

    data = datasets.DatasetDict(
        train=hugging_face_table([0, 1], label=[1, 0], caption=["zero", "one"]),
        validation=hugging_face_table([2], label=[1], caption=["two"]),
        test=hugging_face_table([3], label=[0], caption=["three"]),
    )
    data.save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path / 'set'}"
    train = open_images(source, size=SIZE)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [1, 0]
    assert train.captions == ["zero", "one"]
    assert train.keys == ["train-00000000", "train-00000001"]
    assert np.array_equal(shown(train, 1), picture(1))
    held = open_images(source, split="heldout", size=SIZE)
    assert held.captions == ["two"]
    assert "'test' (1 images) is left out" in held.report()
    assert train.fingerprint != held.fingerprint
    assert len(open_images(source, split="all")) == 4


def test_hugging_face_without_splits_or_words(tmp_path):
    hugging_face_table(range(100)).save_to_disk(tmp_path / "bare")
    source = f"hf:{tmp_path / 'bare'}"
    images = open_images(source, split="all", size=SIZE)
    assert len(images) == 100
    assert images.labels.unique().tolist() == [-1]
    parts = [len(open_images(source, split=s)) for s in ("train", "heldout")]
    assert sum(parts) == 100
    assert min(parts) > 0


def test_hugging_face_row_without_an_image(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": encoded(0), "path": None}, None]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "gaps")
    source = f"hf:{tmp_path / 'gaps'}"
    with pytest.raises(ImageError, match=r"row 1: can't be read \(the row has no image\)"):
        open_images(source, split="all").batch([1])
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert open_images(source, split="all", on_error="skip").keys == ["row-00000000"]


def test_hugging_face_errors(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="neither a folder made by save_to_disk nor"):
        open_images(f"hf:{tmp_path / 'nothing'}")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(ValueError, match="no image column among text"):
        open_images(f"hf:{tmp_path / 'words'}")


# ---- writing


def test_write_folder_round_trip(tmp_path):
    tar(tmp_path / "s" / "train-0.tar", {**sample(0, "a/b: c", "zero"), **sample(1, "dog", "one")})
    tar(
        tmp_path / "s" / "val-0.tar",
        {**sample(0, "dog", "two"), "free.png": encoded(5), "free.json": '{"x": 1}'},
    )
    put(tmp_path / "s" / "LICENSES", {"MIT.txt": "as is"})
    sets = [open_images(tmp_path / "s", split=s, size=SIZE) for s in ("train", "heldout")]
    out = write_folder(sets, tmp_path / "out")
    assert (out / "train/a_b_ c/img000.png").is_file()
    assert (out / "heldout/free.png").is_file()
    assert (out / "MIT.txt").read_text() == "as is"
    for one in sets:
        again = open_images(out, split=one.split, size=SIZE)
        order = [again.keys.index(key) for key in one.keys]
        assert torch.equal(again.batch(order), one.batch(range(len(one))))
        assert again.classes == one.classes
        assert torch.equal(again.labels[order], one.labels)
        assert [again.captions[i] for i in order] == one.captions
    assert open_images(out, split="heldout").meta[1]["x"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]  # no temporary folder left


def test_hugging_face_reads_what_write_folder_writes(tmp_path):
    put(tmp_path / "in", {"train/cat/1.png": encoded(1), "train/cat/1.txt": "a cat"})
    out = write_folder(open_images(tmp_path / "in", size=SIZE), tmp_path / "out")
    assert (out / "train/cat/1.png").is_file()  # the class is said once
    import datasets

    rows = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "c"))
    assert rows[0]["caption"] == "a cat"
    assert np.array_equal(np.asarray(rows[0]["image"].convert("RGB")), picture(1))


def test_write_folder_overwrites_only_its_own(tmp_path):
    put(tmp_path / "in", {"train/1.png": encoded(1)})
    images = open_images(tmp_path / "in", size=SIZE)
    (tmp_path / "out").mkdir()
    write_folder(images, tmp_path / "out")  # empty: fine
    with pytest.raises(FileExistsError, match="is not empty"):
        write_folder(images, tmp_path / "out")
    put(tmp_path / "out", {"train/old.png": encoded(2)})
    write_folder(images, tmp_path / "out", overwrite=True)
    assert open_images(tmp_path / "out", size=SIZE).keys == ["1"]
    put(tmp_path / "mine", {"thesis.txt": "x"})
    with pytest.raises(FileExistsError, match="was not written by this command"):
        write_folder(images, tmp_path / "mine", overwrite=True)
    put(tmp_path, {"file": "x"})
    with pytest.raises(FileExistsError, match="is a file"):
        write_folder(images, tmp_path / "file")
    with pytest.raises(ValueError, match="different splits"):
        write_folder([images, images], tmp_path / "two")


def test_write_folder_leaves_nothing_half_written(tmp_path):
    put(tmp_path / "in", {"1.png": encoded(1), "2.png": b""})
    put(tmp_path / "good", {"1.png": encoded(1)})
    write_folder(open_images(tmp_path / "good", split="all"), tmp_path / "out")
    with pytest.raises(ImageError):
        write_folder(open_images(tmp_path / "in", split="all"), tmp_path / "new")
    with pytest.raises(ImageError):
        write_folder(open_images(tmp_path / "in", split="all"), tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "in", "out"]
    assert open_images(tmp_path / "out", split="all").keys == ["1"]


def test_import_is_light():
    code = "import sys, genlab.data; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_and_its_split(tmp_path, monkeypatch):
    assert named_split("emoji:train") == ("emoji", "train")
    assert named_split("hf:user/set") == ("hf:user/set", "")
    assert named_split("hf:user/set:config:all") == ("hf:user/set:config", "all")
    assert named_split("emoji") == ("emoji", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine:train").mkdir()
    assert named_split("mine:train") == ("mine:train", "")
