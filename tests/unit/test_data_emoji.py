"""The embedded set: what it holds, that no subject is in both splits, that its recipe repeats."""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genlab.data import open_images

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "genlab" / "data" / "emoji"


@pytest.fixture(scope="module")
def emoji():
    return {split: open_images("emoji", split=split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("build_emoji", ROOT / "scripts" / "build_emoji.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_emoji"] = module
    spec.loader.exec_module(module)
    return module


def test_counts_classes_captions(emoji):
    train, held = emoji["train"], emoji["heldout"]
    assert (len(train), len(held)) == (5383, 1530)
    assert train.classes == held.classes
    assert len(train.classes) == 10
    everything = open_images("emoji", split="all")
    assert len(everything) == 6913
    for images in emoji.values():
        assert all(images.captions)
        assert len(set(images.keys)) == len(images)
        assert set(map(int, images.labels.unique())) == set(range(10))
        assert {meta["vendor"] for meta in images.meta} == {"fluent", "noto"}
        assert all(
            key == f"{meta['vendor']}-{meta['code']}" for key, meta in zip(images.keys, images.meta, strict=True)
        )
    row = everything.keys.index("noto-1f600")
    assert everything.captions[row].startswith("grinning face, ")
    assert everything.classes[everything.labels[row]] == "Smileys & Emotion"
    frequencies = [torch.bincount(s.labels, minlength=10) / len(s) for s in (train, held)]
    assert (frequencies[0] - frequencies[1]).abs().max() < 0.003


def test_pixels(emoji):
    images = emoji["heldout"]
    pixels = images.batch(range(len(images)))
    assert pixels.shape == (1530, 3, 64, 64)
    assert pixels.dtype == torch.uint8
    assert (pixels[:, :, 0, 0] > 200).all(1).float().mean() > 0.8  # on white
    assert pixels.flatten(1).float().std(1).min() > 1  # none is blank
    small = open_images("emoji", split="heldout", size=32)
    assert small.batch([0]).shape == (1, 3, 32, 32)


def test_size_checksums_and_licences():
    files = [path for path in EMOJI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    index = json.loads((EMOJI / "index.json").read_text())
    shards = {s["file"]: s["sha256"] for part in index["splits"].values() for s in part["shards"]}
    assert {p.name for p in files if p.name.endswith(".tar.xz")} == shards.keys()
    for name, sha256 in shards.items():
        assert hashlib.sha256((EMOJI / name).read_bytes()).hexdigest() == sha256
    licences = {p.name: p.read_text() for p in (EMOJI / "LICENSES").iterdir()}
    assert "Apache License" in licences["noto-emoji.Apache-2.0.txt"]
    assert "Microsoft" in licences["fluent-emoji.MIT.txt"]
    assert all(name in licences["NOTICE.txt"] for name in licences if name != "NOTICE.txt")


def test_no_subject_in_both_splits(emoji):
    """Told without the recipe's own grouping: by code point, and by what tones and signs leave of it."""
    tones = {f"1f3f{c}" for c in "bcdef"}
    people = {"1f468", "1f469", "1f9d1"}
    views = {
        "code": lambda code: code,
        "group": None,
        "without tones": lambda code: [p for p in code.split("-") if p not in tones | {"fe0f"}] or code,
        "without gender": lambda code: (
            [
                "person" if p in people else p
                for p in code.split("-")
                if p not in tones | {"fe0f", "2640", "2642", "200d"}
            ]
            or code
        ),
    }
    for name, view in views.items():
        where = collections.defaultdict(set)
        for split, images in emoji.items():
            for meta in images.meta:
                where[meta["group"] if view is None else str(view(meta["code"]))].add(split)
        assert len(where) > 1500
        assert [subject for subject, splits in where.items() if len(splits) > 1] == [], name
    vendors = collections.Counter(meta["code"] for images in emoji.values() for meta in images.meta)
    assert collections.Counter(vendors.values())[2] > 3000


def test_no_near_duplicate_across_splits(emoji):
    """RMS distance at a quarter of the size: equal flags are 0.1 apart, the keycaps 3 and 8 are 9.5."""
    flat = {}
    for split, images in emoji.items():
        pixels = images.batch(range(len(images))).float()
        flat[split] = torch.nn.functional.avg_pool2d(pixels, 4).flatten(1) - 128
    nearest = torch.cdist(flat["heldout"], flat["train"]).min(1).values / flat["train"].shape[1] ** 0.5
    assert nearest.min() > 8


def test_webdataset_itself_reads_the_shards():
    import webdataset

    shard = next(iter(sorted(EMOJI.glob("heldout-*.tar.xz"))))
    row = next(iter(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8")))
    assert row["webp"].shape == (64, 64, 3)
    assert row["json"]["caption"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f44b-1f3ff", "1f44b"),  # skin
        ("1f3c3-1f3fb-200d-2640-fe0f-200d-27a1-fe0f", "1f3c3"),  # gender, direction
        ("1f469-1f3fd-200d-1f680", "1f9d1-200d-1f680"),  # woman astronaut, astronaut
        ("1f468-200d-2764-fe0f-200d-1f48b-200d-1f468", "1f48f"),  # kisses
        ("1f469-200d-2764-fe0f-200d-1f469", "1f491-1f3ff"),  # couples
        ("1f468-200d-1f469-200d-1f467", "1f46a"),  # families
        ("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f46b"),  # holding hands
        ("1f471-200d-2642-fe0f", "1f9d1-200d-1f9b0"),  # hair
        ("1f934", "1fac5"),
        ("0023-fe0f-20e3", "23-20e3"),
    ],
)
def test_variants_share_a_group(recipe, one, other):
    assert recipe.group_of(one) == recipe.group_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f3fb", "1f3fc"),
        ("2640-fe0f", "2642-fe0f"),
        ("1f680", "1f9d1-200d-1f680"),
        ("1f1e9-1f1ea", "1f1eb-1f1f7"),
    ],
)
def test_different_subjects_do_not(recipe, one, other):
    assert recipe.group_of(one) != recipe.group_of(other)


def test_tiny_rebuild_is_deterministic(recipe, tmp_path, monkeypatch, capsys):
    """The same tarballs give the same bytes, in any order of members; another tarball is refused."""
    rng = np.random.default_rng(0)

    def picture(side: int, kind: str) -> bytes:
        buffer = io.BytesIO()
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 4), np.uint8))
        blocks.resize((side, side), Image.Resampling.NEAREST).save(buffer, kind)
        return buffer.getvalue()

    codes = ["1F600", "1F44B", "1F44B-1F3FB", "1F1E9-1F1EA"]
    table = [
        {"name": "GRINNING FACE", "unified": "1F600", "category": "Smileys & Emotion", "subcategory": "face"},
        {"name": "WAVING HAND", "unified": "1F44B", "category": "People & Body", "subcategory": "hand",
         "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB"}}},
        {"name": "GERMANY FLAG", "unified": "1F1E9-1F1EA", "category": "Flags", "subcategory": "flag"},
    ]  # fmt: skip
    words = [{"hexcode": "1F600", "label": "grinning face", "tags": ["happy", "grinning face"]}]
    files = {
        "@lobehub/fluent-emoji-3d": {f"package/assets/{c.lower()}.webp": picture(256, "WEBP") for c in codes}
        | {"package/assets/beef.webp": picture(256, "WEBP")},
        "emoji-datasource-google": {f"package/img/google/64/{c.lower()}.png": picture(64, "PNG") for c in codes}
        | {"package/emoji.json": json.dumps(table).encode()},
        "emojibase-data": {"package/en/data.json": json.dumps(words).encode()},
    }
    built = []
    for turn in range(2):
        cache, pins = tmp_path / f"cache{turn}", {}
        cache.mkdir()
        for package, members in files.items():
            path = cache / (package.lstrip("@").replace("/", "-") + "-1.tgz")
            with tarfile.open(path, "w:gz") as archive:
                for name, data in sorted(members.items(), reverse=bool(turn)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            pins[f"{package}@1"] = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(recipe, "PACKAGES", pins)
        monkeypatch.setattr(recipe, "HELDOUT", 2)
        out = tmp_path / f"out{turn}"
        out.mkdir()
        (out / "train-000009.tar.xz").write_bytes(b"of an earlier build")
        monkeypatch.setattr(sys, "argv", ["build_emoji.py", "--cache", str(cache), "--out", str(out)])
        recipe.main()
        built.append({p.name: p.read_bytes() for p in out.glob("*.tar.xz")})
    assert built[0] == built[1]
    assert "train-000009.tar.xz" not in built[0]
    printed = capsys.readouterr().out
    assert "not in emoji.json: fluent/beef.webp" in printed
    assert "not Microsoft's: fluent/1f1e9-1f1ea.webp" in printed
    images = open_images(out, split="all")
    assert len(images) == 7
    assert images.captions[images.keys.index("noto-1f600")] == "grinning face, happy"
    assert images.captions[images.keys.index("noto-1f44b-1f3fb")] == "waving hand"
    monkeypatch.setattr(recipe, "PACKAGES", dict.fromkeys(pins, "0" * 64))
    with pytest.raises(SystemExit, match="expected 0000"):
        recipe.main()
