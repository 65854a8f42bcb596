"""Films and animations: MP4 and its kin through PyAV; GIF, animated WebP and PNG through Pillow."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genlab.data.decode import MAX_PIXELS, ImageError, formats, on_white, square

if TYPE_CHECKING:
    from PIL import Image

_ANIMATION = re.compile("gif|webp|a?png")
_FILM = re.compile("mp4|m4v|mov|webm|mkv|avi|mpe?g|ogv|ts")
MAX_SECONDS = 60.0
"""What a film shows after so many seconds is not read."""


def is_clip(suffix: str) -> bool:
    """Tell whether a file name's ending (lower case, no dot) is taken for that of a film or an animation."""
    return bool(_FILM.fullmatch(suffix) or _ANIMATION.fullmatch(suffix))


@dataclass(frozen=True, eq=False)
class Film:
    """A film's frames at an even rate."""

    frames_T: np.ndarray
    """uint8, (T, size, size, 3)."""
    loops: bool
    """Whether it is an animation, which viewers show again and again."""
    notes: tuple[str, ...] = ()
    """What was left out: sound, and what is behind `MAX_SECONDS`."""


def read_film(data: bytes, where: str, size: int, fps: float) -> Film:
    """Decode a film or an animation.

    Frame t is what is on the screen t / fps seconds after the first picture. Each is composited on white and brought
    to a square as `decode.decode` does it. A still picture is a film of one frame.

    Args:
        data: the file's bytes.
        where: path or key, for messages.
        size: side of the frames in pixels.
        fps: frames a second.

    Raises:
        ImageError: empty, truncated, damaged, without pictures, or too large.
    """
    if not data:
        raise ImageError(where, "the file is empty (zero bytes)")
    notes: list[str] = []
    loops = data[:4] in (b"GIF8", b"\x89PNG") or data[8:12] == b"WEBP"
    shown = _animation(data, where) if loops else _film(data, where, notes)
    frames: list[np.ndarray] = []
    last: np.ndarray | None = None
    length = 0.0
    try:
        for start, stop, picture in shown:  # on the screen from second `start` to second `stop`
            length = stop
            while len(frames) / fps < start - 1e-6 and last is not None:
                frames.append(last)
            if start >= MAX_SECONDS:
                notes.append(f"cut after {MAX_SECONDS:.0f} seconds")
                break
            last = square(picture, size)
    except ImageError:
        raise
    except Exception as error:  # the readers raise nearly anything on damaged bytes
        raise ImageError(where, f"damaged film: {type(error).__name__}: {error}") from error
    if last is None:
        raise ImageError(where, "no pictures in it")
    wanted = max(1, round(min(length, MAX_SECONDS) * fps))
    frames += [last] * (wanted - len(frames))
    return Film(np.stack(frames[:wanted]), loops, tuple(notes))


Shown = Iterator[tuple[float, float, "Image.Image"]]


def _animation(data: bytes, where: str) -> Shown:
    from PIL import Image, ImageSequence

    with Image.open(io.BytesIO(data), formats=formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(where, f"{image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
        start = 0.0
        for frame in ImageSequence.Iterator(image):
            rgb = on_white(frame, where)
            # browsers, too, show a frame without a duration, or a very short one, for a tenth of a second
            seconds = frame.info.get("duration", 0) / 1000
            yield start, (start := start + (seconds if seconds > 0.01 else 0.1)), rgb


def _film(data: bytes, where: str, notes: list[str]) -> Shown:
    import av

    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise ImageError(where, "no pictures in it")
        if container.streams.audio:
            notes.append("sound is left out")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if stream.width * stream.height > MAX_PIXELS:
            raise ImageError(where, f"{stream.width}x{stream.height} pixels, more than the limit of {MAX_PIXELS}")
        begin: float | None = None
        end = 0.0
        step = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        for frame in container.decode(stream):
            time = frame.time if frame.time is not None else end + (begin or 0.0)
            begin = time if begin is None else begin
            end = time - begin + step
            yield time - begin, end, frame.to_image()
        said = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if end < 0.8 * said - 0.5:  # a film that was cut has its length at its head
            raise ImageError(where, f"truncated: {end:.1f} of {said:.1f} seconds are there")


def write_film(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write frames as MP4 (H.264), GIF or animated WebP, as the ending of `path` says; whole or not at all.

    Args:
        frames: RGB, all of one size.
        path: the file.
        fps: frames a second.

    Raises:
        ValueError: for another ending, or no frames.
    """
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".webp") or not frames:
        raise ValueError(f"can't write {len(frames)} frames to {path}: films are .mp4, .gif or .webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    try:
        if suffix == ".mp4":
            _write_mp4(frames, temporary, fps)
        else:
            first, *others = frames
            options: dict[str, Any] = {"disposal": 1} if suffix == ".gif" else {"quality": 90, "method": 4}
            first.save(
                temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **options
            )  # fmt: skip
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    import av

    # players want even sides: an odd one repeats its last pixels
    width, height = ((n + 1) // 2 * 2 for n in frames[0].size)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            odd = ((0, height - frame.height), (0, width - frame.width), (0, 0))
            pixels = np.pad(np.asarray(frame.convert("RGB")), odd, mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
