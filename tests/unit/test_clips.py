"""Films in and out, sets of clips, the embedded animations."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genlab.cli import main
from genlab.data import ImageError, open_images
from genlab.data.clips import cut, open_clips, set_in_motion
from genlab.data.images import EMBEDDED
from genlab.data.video import read_film, write_film
from genlab.pictures import sheet, to_pil

ROOT = Path(__file__).resolve().parents[2]


def ramp(n, size=32):
    """Frames whose grey says their number."""
    return [Image.new("RGB", (size, size), (20 * i, 20 * i, 20 * i)) for i in range(n)]


def greys(film):
    return film.frames_T.mean((1, 2, 3)) / 20


@pytest.mark.parametrize(("suffix", "slack"), [("mp4", 0.35), ("gif", 0.1), ("webp", 0.2)])
def test_written_films_read_back_at_any_rate(tmp_path, suffix, slack):
    path = tmp_path / f"a.{suffix}"
    write_film(ramp(8), path, 4)
    data = path.read_bytes()
    same = read_film(data, "a", 32, 4)
    assert same.frames_T.shape == (8, 32, 32, 3)
    assert same.loops == (suffix != "mp4")
    assert np.abs(greys(same) - np.arange(8)).max() < slack
    assert np.abs(greys(read_film(data, "a", 32, 8)) - np.arange(16) // 2).max() < slack
    assert np.abs(greys(read_film(data, "a", 16, 2)) - np.arange(0, 8, 2)).max() < slack
    # 3 a second: what is on the screen at 0, 1/3, 2/3, … seconds
    assert np.abs(greys(read_film(data, "a", 32, 3)) - [0, 1, 2, 4, 5, 6]).max() < slack
    assert list(tmp_path.iterdir()) == [path]


def test_frames_of_uneven_length_and_odd_sides(tmp_path):
    path = tmp_path / "a.gif"
    first, *others = ramp(3)
    first.save(path, save_all=True, append_images=others, duration=[500, 1000, 250], loop=0)
    assert greys(read_film(path.read_bytes(), "a", 32, 4)).round().tolist() == [0, 0, 1, 1, 1, 1, 2]
    write_film([Image.new("RGB", (31, 45), "red")] * 4, tmp_path / "a.mp4", 4)
    frames = read_film((tmp_path / "a.mp4").read_bytes(), "a", 16, 4).frames_T
    assert frames.shape == (4, 16, 16, 3)
    assert frames[..., 0].min() > 220


def test_sound_is_left_out_with_a_note(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=Fraction(4)), container.add_stream("aac", rate=8000)
        video.width = video.height = 32
        video.pix_fmt, audio.layout = "yuv420p", "mono"
        for frame in ramp(8):
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        for start in range(0, 16000, 1000):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 8000, start
            container.mux(audio.encode(sound))
        container.mux(video.encode())
        container.mux(audio.encode())
    film = read_film(path.read_bytes(), "a", 32, 4)
    assert film.notes == ("sound is left out",)
    assert len(film.frames_T) == 8
    clips = open_clips(tmp_path, "all", 16, 4)
    clips.batch([0])
    assert "sound is left out (1 decoded clips)" in clips.report()


def test_broken_films_are_named_or_counted(tmp_path):
    write_film(ramp(8), tmp_path / "good.mp4", 4)
    whole = (tmp_path / "good.mp4").read_bytes()
    write_film(ramp(8), tmp_path / "good.webp", 4)
    animation = (tmp_path / "good.webp").read_bytes()
    broken = {"cut.mp4": whole[: len(whole) // 2], "empty.mp4": b"", "text.mp4": b"hello " * 99,
              "cut.webp": animation[: len(animation) // 2]}  # fmt: skip
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=name):
            read_film(data, name, 16, 4)
    with pytest.raises(ImageError, match=r"cut\.mp4|empty\.mp4|text\.mp4|cut\.webp"):
        open_clips(tmp_path, "all", 16).batch(range(6))
    with pytest.warns(UserWarning, match="skipped 4 of 6 clips"):
        clips = open_clips(tmp_path, "all", 16, on_error="skip")
    assert clips.keys == ["good.mp4", "good.webp"]
    assert "4 skipped" in clips.report()
    with pytest.raises(ValueError, match=r"films are \.mp4, \.gif or \.webp"):
        write_film(ramp(2), tmp_path / "a.avi", 4)


def test_cut():
    film = np.arange(12)
    assert cut(film, True, 8, 0, 2).tolist() == [*range(8)]
    assert cut(film, True, 8, 1, 2).tolist() == [6, 7, 8, 9, 10, 11, 0, 1]
    assert cut(film, False, 8, 1, 2).tolist() == [*range(4, 12)]
    assert cut(film[:3], False, 5, 0, 1).tolist() == [0, 1, 2, 2, 2]


def test_stills_set_in_motion():
    image = open_images("emoji", "heldout").batch([0])[0].permute(1, 2, 0).numpy()
    a, b = set_in_motion(image, "a", 8), set_in_motion(image, "b", 8)
    assert a.shape == (8, 64, 64, 3)
    assert (a == set_in_motion(image, "a", 8)).all()
    assert np.abs(a - b.astype(float)).mean() > 1
    assert np.abs(np.diff(a.astype(float), axis=0)).mean((1, 2, 3)).min() > 0.2
    both = open_clips("emoji-anim#3+moved:emoji#5", size=32, frames=4, takes=2)
    assert len(both) == 3 * 2 + 5
    assert both.batch([0, 10]).shape == (2, 4, 3, 32, 32)
    assert both.fingerprint != open_clips("emoji-anim#3+moved:emoji#5", size=32, frames=4, fps=8, takes=2).fingerprint
    with pytest.raises(ValueError, match="at least 1"):
        open_clips("emoji-anim#none")


@pytest.fixture(scope="module")
def animations():
    return {split: open_clips("emoji-anim", split) for split in ("train", "heldout")}


def test_embedded_animations(animations):
    files = [p for p in EMBEDDED["emoji-anim"].rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8_000_000
    index = json.loads((EMBEDDED["emoji-anim"] / "index.json").read_text())
    for part in index["splits"].values():
        for shard in part["shards"]:
            path = EMBEDDED["emoji-anim"] / shard["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
    assert "Microsoft" in (EMBEDDED["emoji-anim"] / "LICENSES" / "fluent-emoji.MIT.txt").read_text()
    train, held = animations["train"], animations["heldout"]
    assert len(train) > 150
    assert len(held) > 60
    for clips in (train, held):
        assert all(clips.captions)
        x = clips.batch(range(len(clips)))
        assert x.shape == (len(clips), 8, 3, 64, 64)
        assert x.float().diff(dim=1).abs().mean((1, 2, 3, 4)).min() > 0.5  # every one moves
    # a frame is what the embedded stills show of that code point at some moment: same subject, same place
    assert open_images("emoji-anim", "heldout").batch([0]).shape == (1, 3, 64, 64)


def test_no_subject_is_in_both_splits_nor_held_out_elsewhere(animations):
    groups = {split: {m["group"] for m in clips.meta} for split, clips in animations.items()}
    stills = {split: {m["group"] for m in open_images("emoji", split).meta} for split in ("train", "heldout")}
    assert not groups["train"] & groups["heldout"]
    assert groups["train"] <= stills["train"]
    assert groups["heldout"] <= stills["heldout"]


def test_data_writes_films_as_they_are(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "emoji-anim", "--split", "heldout", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == {"heldout": len(list(out.rglob("*.webp")))}
    again, own = open_clips(out, "heldout"), open_clips("emoji-anim", "heldout")
    assert len(again) == len(own)
    where = {key: i for i, key in enumerate(again.keys)}
    rows = [0, len(own) - 1]
    there = [where[own.keys[i]] for i in rows]
    assert torch.equal(again.batch(there), own.batch(rows))
    assert again.captions[there[0]] == own.captions[0]
    assert (out / "fluent-emoji.MIT.txt").is_file()
    assert main(["data", "emoji-anim", "--size", "32", "--out", str(tmp_path / "b")]) == 2
    assert main(["data", "moved:emoji", "--clips", "--out", str(tmp_path / "b")]) == 2


def test_sheet():
    frames = sheet(torch.zeros(4, 5, 3, 16, 16, dtype=torch.uint8), columns=2)
    assert len(frames) == 5
    assert frames[0].size == (2 * 18 + 2, 2 * 18 + 2)
    assert to_pil(torch.zeros(3, 4, 4)).size == (4, 4)
