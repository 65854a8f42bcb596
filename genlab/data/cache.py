"""Tokens and caption embeddings of a whole image set, computed once and kept on disk under a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlab.hub import sync
from genlab.processes import agree, gather, processes

if TYPE_CHECKING:
    import torch

    from genlab.noise import Noise
    from genlab.text import Text, TextEncoder

    from .images import ImageSet

BATCHES = 16
"""Batches a part: what one process encodes at a time, and what an interrupted one loses at most."""
CAPTIONS = 4096
"""Captions a part."""


def cache_folder() -> Path:
    """`$GENLAB_CACHE`, else `~/.cache/genlab`."""
    return Path(os.environ.get("GENLAB_CACHE") or Path.home() / ".cache" / "genlab")


def digest_of(head: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Hash of a text and of named tensors, as float32."""
    digest = hashlib.sha256(head.encode())
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, **tensors: torch.Tensor) -> None:
    """Write a file that is either whole or not there."""
    from safetensors.torch import save_file

    with _whole(path) as temporary:
        save_file(tensors, temporary)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, which takes its place if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_tokens(
    tokenizer: Any,
    images: ImageSet,
    *,
    flip: bool = False,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Token values (N, *spec.shape), on the host, of every image; with `flip`, then of every mirrored one (2N in all).

    The file is mapped, not read, so a set larger than memory is fine; it is keyed by the tokenizer's weights
    and the images' fingerprint. The processes of a launch share the work, and what an interrupted one did is kept.

    Args:
        tokenizer: encodes.
        images: the set.
        flip: also mirrored.
        batch_size: images at a time.
        device: where the tokenizer goes for as long as there is something to encode; None: it stays where it is.

    Raises:
        ValueError: if they don't see one cache.
    """
    import torch

    from genlab.pictures import to_float

    N, home = len(images), tokenizer.device
    batches = [
        (mirrored, range(start, min(start + batch_size, N)))
        for mirrored in (False, True)[: 1 + flip]
        for start in range(0, N, batch_size)
    ]
    parts = [batches[i : i + BATCHES] for i in range(0, len(batches), BATCHES)]

    def encode(part: int) -> dict[str, torch.Tensor]:
        if device is not None:
            tokenizer.to(device)
        done = []
        with torch.inference_mode():
            for mirrored, rows in parts[part]:
                x = to_float(images.batch(rows)).to(tokenizer.device)
                done.append(tokenizer.encode(x.flip(-1) if mirrored else x).values.cpu())
        return {"tokens": torch.cat(done)}

    head = f"1 {tokenizer.kind} {tokenizer.config} {flip} "
    key = agree(lambda: digest_of(head + images.fingerprint, tokenizer.state_dict()))
    names = [f"{rows.start + mirrored * N:010d}-{batch_size}" for (mirrored, rows), *_ in parts]
    try:
        return shared(cache_folder() / "tokens" / f"{key}.safetensors", names, encode, "images")["tokens"]
    finally:
        if tokenizer.device != home:
            tokenizer.to(home)


def shared(
    path: Path, names: Sequence[str], make: Callable[[int], dict[str, torch.Tensor]], what: str
) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped; if it isn't there, the processes of a launch make its parts in turn.

    Args:
        path: the file.
        names: of the parts; those that an interrupted launch made are not made again.
        make: a part's tensors, which are joined along their first axis.
        what: is encoded.

    Raises:
        ValueError: if the processes don't see one cache.
    """
    from safetensors import safe_open
    from tqdm import tqdm

    rank, world = processes()
    if not all(gather(path.exists())):
        parts = [path.with_suffix("") / f"{name}.safetensors" for name in names]
        missing = agree(lambda: [i for i, part in enumerate(parts) if not part.exists()])
        for i in tqdm(missing[rank::world], desc=f"encoding {what}", unit="part", leave=False, disable=rank > 0):
            write_tensors(parts[i], **make(i))
        gather(None)  # all parts are there
        if rank == 0 and not path.exists():
            try:
                join(parts, path)
            except FileNotFoundError:
                if not path.exists():  # else another run of the same joined them first
                    raise ValueError(
                        f"{path.parent} lacks what other processes wrote: give all machines one cache, "
                        "GENLAB_CACHE=FOLDER on a disk that they all see"
                    ) from None
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        gather(None)  # the file is there
        if not all(gather(path.exists())):
            raise ValueError(
                f"{path} is seen by some machines only: give all one cache, GENLAB_CACHE=FOLDER on a disk that they "
                "all see"
            )
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def join(parts: Sequence[Path], path: Path) -> None:
    """Write the tensors of several safetensors files into one, along their first axes, a part at a time."""
    import torch
    from safetensors import safe_open

    header: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for part in parts:
        with safe_open(part, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                x = file.get_slice(name)
                rows, *shape = x.get_shape()
                entry = header.setdefault(name, {"dtype": x.get_dtype(), "shape": [0, *shape]})
                entry["shape"][0] += rows
                sizes[name] = sizes.get(name, 0) + file.get_tensor(name).nbytes
    end = 0
    for name, entry in header.items():
        entry["data_offsets"] = [end, end := end + sizes[name]]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    with _whole(path) as temporary, temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for part in parts:
                with safe_open(part, "pt") as file:
                    out.write(file.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().data)


def captions_of(images: ImageSet) -> list[tuple[str, ...]]:
    """The distinct captions of each image: its own, `captions` (a list) and the `name` it begins with of its metadata.

    Raises:
        ValueError: if no image has one. An image without any, among others that have some, gets the empty caption.
    """
    found = []
    for caption, meta in zip(images.captions, images.meta, strict=True):
        more, name = meta.get("captions"), meta.get("name")
        words = [caption, *(more if isinstance(more, (list, tuple)) else ())]
        words += [name] if isinstance(name, str) and caption.startswith(name) else []
        found.append(tuple(dict.fromkeys(w.strip() for w in words if isinstance(w, str) and w.strip())))
    if not any(found):
        raise ValueError(
            f"{images.source} has no captions to draw by: put them beside the images (name.txt, or metadata.jsonl with "
            "file_name and caption), or train a generator by class"
        )
    return [words or ("",) for words in found]


@dataclass(frozen=True, eq=False)
class Captions:
    """Embeddings of every caption of a set, one behind the other."""

    embeds_SD: torch.Tensor
    """float16."""
    starts: torch.Tensor
    """Where each distinct caption begins, and the end, (M + 1,)."""
    of_image: list[list[int]]
    """Numbers of each image's captions."""

    def batch(self, index: torch.Tensor, noise: Noise) -> Text:
        """One caption an image, chosen by its noise among those it has."""
        from genlab.text import stack_captions

        u = noise.at(purpose="caption").uniform(1)[:, 0].tolist()
        picks = [(own := self.of_image[i])[int(x * len(own))] for i, x in zip(index.tolist(), u, strict=True)]
        spans = [(int(self.starts[p]), int(self.starts[p + 1])) for p in picks]
        return stack_captions([self.embeds_SD[a:b].float() for a, b in spans])


def cached_captions(encoder: TextEncoder, captions: Sequence[tuple[str, ...]]) -> Captions:
    """Embeddings of each image's captions, keyed by the encoder's weights, its length and the words."""
    import torch

    distinct = list(dict.fromkeys(words for own in captions for words in own))
    number = {words: i for i, words in enumerate(distinct)}
    parts = [distinct[i : i + CAPTIONS] for i in range(0, len(distinct), CAPTIONS)]

    def encode(part: int) -> dict[str, torch.Tensor]:
        embeds = encoder.encode_many(parts[part], dtype=torch.float16)
        return {"embeds": torch.cat(embeds), "lengths": torch.tensor([len(x) for x in embeds])}

    head = f"2 {encoder.name} {encoder.length} {'padded ' * encoder.pad}{distinct}"
    key = agree(lambda: digest_of(head, encoder.model.state_dict()))
    names = [f"{i:06d}" for i in range(len(parts))]
    tensors = shared(cache_folder() / "captions" / f"{key}.safetensors", names, encode, "captions")
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), tensors["lengths"].cumsum(0)])
    return Captions(tensors["embeds"], starts, [[number[words] for words in own] for own in captions])
