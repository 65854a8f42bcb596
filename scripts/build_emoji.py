#!/usr/bin/env python3
"""Rebuild the embedded demo set `emoji` (genlab/data/emoji) from the npm registry.

    python scripts/build_emoji.py                      # fetch with `npm pack`, check, write the shards
    python scripts/build_emoji.py --cache DIR --out DIR

Two artists draw the same subjects: Microsoft's Fluent 3D emoji (`@lobehub/fluent-emoji-3d`, MIT, 256 px) and
Google's Noto emoji (`emoji-datasource-google`, art Apache-2.0, 64 px). Names and tags come from
`emojibase-data` (MIT). Every picture is composited on white, brought to 64x64 and stored as WebP in
webdataset shards (`KEY.webp` + `KEY.json`, tar compressed with xz: the 512-byte blocks of a tar would double
the size).

* Encoding: lossless WebP of the colours rounded to multiples of 8 (at most 4/255 off). At this size it beats
  lossy WebP by far: 44 dB against 35 dB for the same bytes, because lossy WebP halves the chroma resolution.
* Split: whole groups of code points, see `group_of`; stratified by category; ordered by a hash of the group's
  name, so that neither a random generator nor the order of files has a say.
* The same tarballs, Pillow and libwebp give the same bytes; `index.json` says which made the shipped ones.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import lzma
import math
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

PACKAGES = {  # spec: sha256 of the tarball that `npm pack` leaves
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
LICENCES = {"fluent": "MIT (Microsoft)", "noto": "Apache-2.0 (Google)", "text": "MIT (emoji-data, emojibase)"}
SIZE = 64
META = ("class", "caption", "name", "tags", "subclass", "code", "vendor", "group")  # the .json of a sample
STEP = 8  # colours are rounded to multiples of this before lossless encoding
HELDOUT = 1530  # images wanted in the held-out split (classes round, so the result may differ by a few)
SHARD = 2000  # images a shard
NEAR = 10.0  # groups with two images closer than this (RMS of 255, at half size) are one group

SKIN = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
PERSON = {"1f468", "1f469", "1f9d1"}  # man, woman, adult
CHILD = {"1f466", "1f467", "1f9d2"}  # boy, girl, child
SAME_SUBJECT = {  # code points that differ in gender, number or hair only
    "person": ["1f471", "1f9d4", "person-1f9b0", "person-1f9b1", "person-1f9b2", "person-1f9b3"],
    "holding-hands": ["1f46b", "1f46c", "1f46d", "person-1f91d-person"],
    "child": ["1f466", "1f467", "1f9d2"],
    "older-adult": ["1f474", "1f475", "1f9d3"],
    "royalty": ["1f934", "1f478", "1fac5"],
    "claus": ["1f385", "1f936", "person-1f384"],
    "dancer": ["1f483", "1f57a"],
    "pregnant": ["1f930", "1fac3", "1fac4"],
    "handshake": ["1f91d", "1faf1-1faf2"],
}
# Microsoft publishes no country flags (github.com/microsoft/fluentui-emoji, issue 25). Those in the Fluent
# package come from somewhere else (another profile, another frame, close to Noto's), so nobody can say whose
# they are.
NOT_FLUENT = re.compile(r"1f1[ef]|1f3f4-e00")
ALIAS = {code: name for name, codes in SAME_SUBJECT.items() for code in codes}


def fetch(cache: Path) -> dict[str, Path]:
    """Return the checked tarball of every package, calling `npm pack` for those the cache lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for spec, sha256 in PACKAGES.items():
        path = cache / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", "--ignore-scripts", spec], cwd=cache, check=True)
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != sha256:
            raise SystemExit(f"{path}: sha256 {actual}, expected {sha256}; delete the file and run again")
        found[spec.rpartition("@")[0]] = path
    return found


def members(tarball: Path, prefix: str, suffix: str = "") -> dict[str, bytes]:
    """Read the members of a tarball under `prefix`, in sorted order, by their name below it."""
    with tarfile.open(tarball) as tar:
        infos = [m for m in tar if m.isfile() and m.name.startswith(prefix) and m.name.endswith(suffix)]
        return {m.name[len(prefix) :]: tar.extractfile(m).read() for m in sorted(infos, key=lambda m: m.name)}  # type: ignore[union-attr]


def plain(code: str) -> str:
    """A code point sequence without what the sources write differently: `_`, leading zeros, FE0F, E007F."""
    parts = [p.lstrip("0") for p in code.lower().replace("_", "-").split("-")]
    return "-".join(p for p in parts if p not in ("fe0f", "e007f"))


def group_of(code: str) -> str:
    """Name the subject of a code point sequence: what must not be in both splits.

    Skin tones, the gender signs, man/woman/person, and the direction someone faces are variants of one
    subject; so are couples and families of every make-up, hair colours, and the pairs of `SAME_SUBJECT`.
    """
    parts = plain(code).split("-")
    parts = [p for p in parts if p not in SKIN] or parts  # the five skin swatches are subjects of their own
    first, *rest = ["person" if p in PERSON else p for p in "-".join(parts).split("-200d-")]
    joined = [first, *(p for p in rest if p not in ("2640", "2642", "27a1"))]
    if "1f48b" in joined:
        return "1f48f"  # kiss
    if "2764" in joined and "person" in joined:
        return "1f491"  # couple with heart
    if first == "person" and CHILD & set(joined):
        return "1f46a"  # family
    name = "-".join(joined)
    return ALIAS.get(name, name)


def on_white(data: bytes) -> np.ndarray:
    """Decode, composite on white, pad to a square and bring to SIZE: uint8 (SIZE, SIZE, 3).

    Compositing comes before resizing: on white the two commute, and no colour bleeds out of clear pixels.
    """
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    rgb = canvas.convert("RGB")
    return np.asarray(rgb if side == SIZE else rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode as near-lossless WebP; return the bytes and the pixels they decode to."""
    rounded = np.minimum((pixels.astype(np.int32) + STEP // 2) // STEP * STEP, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rounded).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue(), rounded


def read_samples(packages: dict[str, Path]) -> list[dict]:
    """Join the pictures with names, categories and tags: one dict a picture, in the order of its key."""
    google = packages["emoji-datasource-google"]
    table = {}  # plain code -> (code, name, category, subcategory)
    for entry in json.loads(members(google, "package/emoji.json")[""]):
        for one in [entry, *entry.get("skin_variations", {}).values()]:
            code = one["unified"].lower()
            table[plain(code)] = (code, entry["name"].lower(), entry["category"], entry["subcategory"])
    words = {}  # plain code -> (label, tags)
    for entry in json.loads(members(packages["emojibase-data"], "package/en/data.json")[""]):
        for one in [entry, *entry.get("skins", [])]:
            words[plain(one["hexcode"])] = (one["label"], entry.get("tags", []))

    pictures = {
        "fluent": members(packages["@lobehub/fluent-emoji-3d"], "package/assets/", ".webp"),
        "noto": members(google, "package/img/google/64/", ".png"),
    }
    samples: dict[str, dict] = {}
    left_out = collections.defaultdict(list)
    for vendor, files in pictures.items():
        for file, data in files.items():
            short = plain(file.rpartition(".")[0])
            code, name, category, subcategory = table.get(short, ("",) * 4)
            key = f"{vendor}-{code}"
            if not code:
                left_out["not in emoji.json"].append(f"{vendor}/{file}")
                continue
            if key in samples:
                left_out["the same code point again"].append(f"{vendor}/{file}")
                continue
            if vendor == "fluent" and NOT_FLUENT.match(short):
                left_out["a country's flag, which is not Microsoft's"].append(f"{vendor}/{file}")
                continue
            label, tags = words.get(short, (name, []))
            samples[key] = {
                "key": key, "pixels": on_white(data), "class": category, "subclass": subcategory, "name":
                label, "tags": tags, "caption": ", ".join([label, *(t for t in tags if t != label)]),
                "code": code, "vendor": vendor, "group": group_of(code), "named": short in words,
            }  # fmt: skip
    for reason, names in left_out.items():
        print(f"{len(names)} left out, {reason}: {' '.join(names[:20])}{' …' * (len(names) > 20)}")
    return [samples[key] for key in sorted(samples)]


def merge_lookalikes(samples: list[dict]) -> list[tuple[str, str]]:
    """Give groups that hold nearly the same picture (two equal flags) one name; return the pairs."""
    half = np.stack([s["pixels"] for s in samples]).astype(np.float32)
    half = half.reshape(-1, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4)).reshape(len(samples), -1) - 128
    norms = (half**2).sum(1)
    parent = {s["group"]: s["group"] for s in samples}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    pairs = []
    for start in range(0, len(samples), 512):
        rows = slice(start, start + 512)
        squared = (norms[rows, None] + norms[None] - 2 * half[rows] @ half.T) / half.shape[1]
        for i, j in np.argwhere(squared < NEAR**2):
            a, b = sorted((root(samples[start + i]["group"]), root(samples[j]["group"])))
            if a != b:
                parent[b] = a
                pairs.append((a, b))
    for sample in samples:
        sample["group"] = root(sample["group"])
    return pairs


def split(samples: list[dict]) -> None:
    """Set `split` on every sample: held-out takes whole groups, and the class frequencies of the set."""
    groups = collections.defaultdict(list)
    for sample in samples:
        groups[sample["group"]].append(sample)
    wanted = collections.Counter(s["class"] for s in samples)
    room = {c: round(HELDOUT * n / len(samples)) for c, n in wanted.items()}
    for name in sorted(groups, key=lambda g: hashlib.sha256(f"genlab-emoji:{g}".encode()).hexdigest()):
        needs = collections.Counter(s["class"] for s in groups[name])
        held = all(n <= room[c] for c, n in needs.items())
        if held:
            for c, n in needs.items():
                room[c] -= n
        for sample in groups[name]:
            sample["split"] = "heldout" if held else "train"


def write_shard(path: Path, samples: list[dict]) -> None:
    """Write samples as a webdataset shard whose bytes depend on nothing but the samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            meta = {k: sample[k] for k in META}
            text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()
            for suffix, data in (("json", text), ("webp", sample["webp"])):
                info = tarfile.TarInfo(f"{sample['key']}.{suffix}")  # mtime, uid and gid stay 0
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    replace(path, lzma.compress(buffer.getvalue(), check=lzma.CHECK_CRC32, preset=6))


def replace(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main() -> None:
    """Fetch, join, split, encode, write; print what was left out and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_out = Path(__file__).resolve().parents[1] / "genlab" / "data" / "emoji"
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "genlab" / "npm")
    parser.add_argument("--out", type=Path, default=default_out)
    args = parser.parse_args()

    samples = read_samples(fetch(args.cache))
    pairs = merge_lookalikes(samples)
    print(f"{len(pairs)} pairs of groups merged for looking alike: {pairs}")
    split(samples)
    error: dict[str, list[float]] = {"fluent": [], "noto": []}
    for sample in samples:
        sample["webp"], decoded = encode(sample["pixels"])
        mse = np.mean((decoded.astype(np.float64) - sample["pixels"]) ** 2)
        error[sample["vendor"]].append(10 * math.log10(255**2 / max(mse, 1e-2)))

    args.out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, dict] = {}
    for name in ("train", "heldout"):
        chosen = [s for s in samples if s["split"] == name]
        # Shards in hash order, so that each one is a mixture and the first is a fair small subset.
        chosen.sort(key=lambda s: hashlib.sha256(s["key"].encode()).hexdigest())
        shards = []
        for number, start in enumerate(range(0, len(chosen), SHARD)):
            part = chosen[start : start + SHARD]
            path = args.out / f"{name}-{number:06d}.tar.xz"
            write_shard(path, part)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shards.append({"file": path.name, "images": len(part), "sha256": digest})
        frequencies = collections.Counter(s["class"] for s in chosen)
        splits[name] = {
            "images": len(chosen),
            "groups": len({s["group"] for s in chosen}),
            "classes": dict(sorted(frequencies.items())),
            "shards": shards,
        }
    index = {
        "name": "emoji",
        "size": SIZE,
        "classes": sorted({s["class"] for s in samples}),
        "splits": splits,
        "encoding": f"lossless WebP of colours rounded to multiples of {STEP}",
        "psnr_db": {v: round(float(np.mean(e)), 2) for v, e in error.items()},
        "captions_from_emojibase": sum(s["named"] for s in samples),
        "sources": PACKAGES,
        "licences": LICENCES,
        "built_with": {"pillow": PIL.__version__, "libwebp": features.version("webp")},
    }
    replace(args.out / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    listed = {s["file"] for part in splits.values() for s in part["shards"]}
    for stale in args.out.glob("*.tar.xz"):
        if stale.name not in listed:
            stale.unlink()
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(json.dumps({k: {**v, "shards": len(v["shards"])} for k, v in splits.items()}, indent=1))
    print(f"PSNR of the encoding {index['psnr_db']} dB; {total / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
