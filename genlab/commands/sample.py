"""`genlab sample MODEL`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from genlab.config import config, from_dict, to_dict
from genlab.precision import DtypeName

from . import shared

Schedule = Literal["constant", "linear", "cosine", "log", "square", "square_root"]


@config
class SampleConfig:
    """Draw images from MODEL: one row a class or prompt, and one column a seed.

    The grid, or the folder of PNGs, gets a manifest.json beside it: command, config, versions, weights, seeds, cost.
    Under torchrun the processes share the images, and the first one writes grid and manifest.
    Sampler options follow by name, e.g. --set steps=50 --set method=heun; `genlab list` names the samplers.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A shipped name (`genlab list`), a checkpoint folder or a Hub id."""
    classes: str = "all"
    """`all`, numbers (0,3-5) or names ("food & drink,flags"; the beginning is enough)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """For a model by text: what to draw, e.g. --prompt "a red apple"; may be repeated."""
    prompts: Path | None = None
    """For a model by text: a file with one prompt a line."""
    seeds: str = "0-7"
    """One image a seed for each class or prompt: 0-15, or 1,5,9. An image depends on these two alone."""
    grid: Path | None = None
    """Write one PNG with all images, captioned; without --grid and --out: grid.png. Of clips: an animated .webp, .gif
    or .mp4."""
    out: Path | None = None
    """Write single PNGs into this folder, with metadata (of clips WebPs, without); existing ones of the same manifest
    are kept."""
    sampler: str = ""
    """Sampler; the generator's plain one by default."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A sampler option, name=value; may be repeated."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is unguided. The generator's own default where not given."""
    guidance_schedule: Schedule | None = None
    """How it grows over the groups: `constant` guides the first too, `linear` (xAR's, MAR's) not. The generator's own
    where not given."""
    best_of: int = 1
    """By prompt: draw so many candidates an image and keep the one that fits the prompt best."""
    judge: str = "seed-emoji64"
    """Who says so: a MODEL with a space of images and captions."""
    tokenizer: str = ""
    """Another tokenizer of the same tokens."""
    tokens: str = ""
    """Ordered tokens (a flextok's): show each image with so many of them, one column a count: 1,2,4,8, or `all`."""
    batch_size: int = 32
    """Images a batch; the images don't depend on it (see docs for the tolerance)."""
    zoom: int = 1
    """Enlarge the grid's images by this factor."""
    device: str = "auto"
    """auto, cpu, cuda."""
    dtype: DtypeName = "float32"
    """Weights and arithmetic of the generator; `auto` is bfloat16 where the hardware multiplies it faster, and so not
    the same images on every machine."""
    json: bool = False
    """Print the manifest as JSON."""


def make_sampler(
    generator: Any,
    name: str,
    options: tuple[str, ...] = (),
    guidance: float | None = None,
    schedule: Schedule | None = None,
) -> Any:
    """A sampler for a generator out of command-line words.

    Raises:
        ValueError: for an unknown sampler or option, or a pairing that can't work.
    """
    from genlab.registry import SAMPLERS
    from samplers import default_sampler

    cls = SAMPLERS[name] if name else type(default_sampler(generator))
    fields: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {option!r}")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance must be a number, got {guidance}")
    wanted = {k: v for k, v in (("scale", guidance), ("schedule", schedule)) if v is not None}
    if wanted:
        if "guidance" in fields:
            raise ValueError("give guidance by --guidance or by --set guidance=…, not by both")
        fields["guidance"] = to_dict(dataclasses.replace(generator.default_guidance, **wanted))
    return cls(from_dict(cls.Config, fields, where=f"options of sampler {cls.name!r}"))


def main(argv: list[str]) -> int:
    """Draw and write."""
    c = shared.parse(SampleConfig, argv, prog="genlab sample")
    if c.batch_size < 1 or c.zoom < 1:
        raise ValueError(f"--batch-size and --zoom must be at least 1, got {c.batch_size} and {c.zoom}")
    import torch

    from genlab.data.video import read_film, write_film
    from genlab.hub import write_atomic
    from genlab.pictures import grid, save_png, sheet, to_pil
    from genlab.precision import torch_dtype
    from genlab.processes import agree, gather, processes
    from genlab.rerank import candidate_seeds

    from .models import load_line

    rank, world = processes()
    device = shared.torch_device(c.device)
    dtype = torch_dtype(c.dtype, device)
    line = load_line(c.model, tokenizer=c.tokenizer, device=device, dtype=dtype)
    sampler = make_sampler(line.generator, c.sampler, c.set, c.guidance, c.guidance_schedule)
    prompts = read_prompts(c, line)
    judge = read_judge(c, line, device)
    class_ids, seeds = [] if prompts else line.class_ids(c.classes), shared.numbers(c.seeds)
    rows: list[Any] = [*prompts, *class_ids]
    conditions = line.condition(rows)
    jobs = [(row, seed) for row in range(len(rows)) for seed in seeds]
    fps = getattr(line.tokenizer.config, "fps", None)  # of a tokenizer of clips
    suffix = "png" if fps is None else "webp"
    grid_path = (c.grid or Path(f"grid.{suffix}")) if c.grid is not None or c.out is None else None
    if grid_path is not None:
        shared.require_grid(grid_path, c.model, clips=fps is not None)
    manifest_path = (c.out if c.out is not None else grid_path.parent) / "manifest.json"  # type: ignore[union-attr]
    manifest: dict[str, Any] = {
        "command": "genlab " + " ".join(["sample", *argv]),
        "command_config": to_dict(c),
        "sampler": {"name": sampler.name, "exact": sampler.exact, **to_dict(sampler.config)},
        "guidance": to_dict(sampler.config.guidance or line.generator.default_guidance),
        "best_of": judge.about | {"n": c.best_of} if judge is not None else None,
        "weights_sha256": line.hashes,
        "classes": class_ids,
        "class_names": [line.classes[i] for i in class_ids] if line.classes else [],
        "prompts": prompts,
        "seeds": seeds,
        "versions": shared.versions(),
        "git": shared.git_revision(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if c.tokens:
        if judge is not None:
            raise ValueError("--best-of chooses among finished images: it doesn't go with --tokens")
        from .kept import sample_grid

        if world > 1:
            raise ValueError("--tokens writes one grid by one process: call it without torchrun")
        if c.out is not None:
            raise ValueError("--tokens writes one grid: give --grid FILE.png, not --out")
        path = grid_path or Path("grid.png")
        return sample_grid(c, line, sampler, manifest, rows, conditions, path, manifest_path)
    clock = time.perf_counter()
    images: dict[tuple[int, int], Any] = {}
    if c.out is not None:
        out = c.out
        images_done = agree(lambda: set_up_folder(out, manifest, suffix))
        jobs_left = [(row, seed) for row, seed in jobs if file_name(rows[row], seed, suffix) not in images_done]
        if len(jobs_left) < len(jobs) and rank == 0:
            print(f"{len(jobs) - len(jobs_left)} of {len(jobs)} images are there already", file=sys.stderr)
    else:
        jobs_left = jobs
    from tqdm import tqdm

    from samplers.base import Stats

    stats = Stats()
    parts = [jobs_left[start : start + c.batch_size] for start in range(0, len(jobs_left), c.batch_size)]
    with tqdm(total=len(jobs_left), unit="img", desc="sampling", disable=None if rank == 0 else True) as bar:
        for part in parts[rank::world]:
            which, part_seeds = (torch.tensor(column) for column in zip(*part, strict=True))
            if judge is None:
                drawn, cost = line.draw(sampler, conditions[which], part_seeds, c.batch_size)
            else:
                many, candidates = which.repeat_interleave(c.best_of), candidate_seeds(part_seeds, c.best_of)
                drawn, cost = line.draw(sampler, conditions[many], candidates, c.batch_size)
                drawn = drawn[judge.best(drawn, [rows[row] for row in which.tolist()], c.best_of)]
                cost = dataclasses.replace(cost, images=len(part))
            stats = stats + cost
            for (row, seed), image in zip(part, drawn, strict=True):
                if grid_path is not None:
                    images[row, seed] = image
                if c.out is not None:
                    what = {"prompt" if prompts else "class": rows[row]}
                    about = {"model": c.model, **what, "seed": seed, "sampler": sampler.name}
                    path = c.out / file_name(rows[row], seed, suffix)
                    if fps is not None:
                        write_film([to_pil(frame) for frame in image], path, fps)
                    else:
                        save_png(to_pil(image), path, about)
            bar.update(min(len(part) * world, len(jobs_left) - bar.n))
    shares = gather((stats, images))  # each drew others
    if rank > 0:
        return 0
    stats, images = sum((cost for cost, _ in shares), Stats()), {k: v for _, own in shares for k, v in own.items()}
    manifest["stats"] = {k: v if isinstance(v, list) else round(v, 4) for k, v in vars(stats).items()}
    manifest["seconds"] = round(time.perf_counter() - clock, 3)
    if (choice := getattr(sampler, "choice", None)) is not None:  # `auto`: what drew them, and why
        manifest["sampler"]["chosen"] = {"name": choice.name, "why": sampler.why, **to_dict(choice.config)}
    if grid_path is not None:
        for row, seed in jobs:
            if (row, seed) not in images:  # it was drawn by an earlier, interrupted command
                import numpy as np
                from PIL import Image

                assert c.out is not None
                if fps is not None:
                    film = read_film((path := c.out / file_name(rows[row], seed, suffix)).read_bytes(), str(path),
                                     line.tokenizer.config.image_size, fps)  # fmt: skip
                    images[row, seed] = torch.from_numpy(film.frames_T.transpose(0, 3, 1, 2).copy())
                    continue
                with Image.open(c.out / file_name(rows[row], seed)) as image:
                    images[row, seed] = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
        names = prompts or [line.classes[i] if line.classes else str(i) for i in class_ids]
        drawn = torch.stack([images[j] for j in jobs])
        look: dict[str, Any] = {"row_labels": names, "columns": len(seeds), "zoom": c.zoom}
        if fps is not None:
            write_film(sheet(drawn, **look), grid_path, fps)
        else:
            picture = grid(drawn, **look)
            save_png(picture, grid_path, {"genlab": json.dumps(manifest["command_config"])})
    write_atomic(manifest_path, json.dumps(manifest, indent=2) + "\n")
    if c.json:
        print(json.dumps(manifest, indent=2))
    else:
        wrote = [str(p) for p in (grid_path, c.out) if p]
        rate = f", {stats.seconds / stats.images:.3f} s an image" if stats.images else ""
        print(f"{len(jobs)} images -> {', '.join(wrote)} ({manifest['seconds']:.1f} s{rate}); {manifest_path}")
    return 0


def read_judge(c: SampleConfig, line: Any, device: Any) -> Any:
    """Who chooses among candidates; None where there is one only.

    Raises:
        ValueError: for fewer than one candidate, a model by class or of clips, or one that can't judge.
    """
    from genlab.hub import from_pretrained
    from genlab.rerank import Judge

    if c.best_of < 1:
        raise ValueError(f"--best-of must be at least 1, got {c.best_of}")
    if c.best_of == 1:
        return None
    if not line.generator.by_text:
        raise ValueError(f"--best-of goes by how well an image fits its prompt, and {c.model} draws by class")
    if getattr(line.tokenizer.config, "fps", None) is not None:
        raise ValueError(f"--best-of judges images, and {c.model} draws clips")
    return Judge(from_pretrained(c.judge, device=device), c.judge)


def read_prompts(c: SampleConfig, line: Any) -> list[str]:
    """The prompts of a model by text, each once; of one by class, none.

    Raises:
        ValueError: if there are none where it needs some, or the other way round.
        FileNotFoundError: for a file of prompts that isn't there.
    """
    prompts = list(c.prompt)
    if c.prompts is not None:
        if not c.prompts.is_file():
            raise FileNotFoundError(f"no file of prompts at {c.prompts}; it holds one prompt a line")
        try:
            prompts += c.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{c.prompts} is not UTF-8 text: {error}") from None
    prompts = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if not line.generator.by_text and (prompts or c.prompts is not None):
        raise ValueError(
            f"{c.model} draws by class, not by text: give --classes, not --prompt; it knows {line.describe_classes()}"
        )
    if line.generator.by_text and c.classes != "all":
        raise ValueError(f"{c.model} draws by text, not by class: give --prompt, not --classes")
    if line.generator.by_text and not prompts:
        raise ValueError(f'{c.model} draws by text: say what, e.g. --prompt "a red apple"')
    return prompts


def file_name(what: int | str, seed: int, suffix: str = "png") -> str:
    """Name of one image's file, by class or prompt."""
    if isinstance(what, int):
        return f"class{what:04d}_seed{seed:08d}.{suffix}"
    words = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")[:40]
    return f"prompt-{words}-{hashlib.sha256(what.encode()).hexdigest()[:8]}_seed{seed:08d}.{suffix}"


def set_up_folder(out: Path, manifest: dict[str, Any], suffix: str = "png") -> set[str]:
    """Names of the images that an interrupted run of the same settings has written already; half-written ones go.

    Raises:
        ValueError: if the folder holds images of other settings.
    """
    from genlab.hub import write_atomic

    same = ("sampler", "guidance", "best_of", "weights_sha256", "dtype")
    note = out / ".settings.json"
    wanted = {k: manifest[k] for k in same}
    files = {p.name for p in out.glob(f"*_seed*.{suffix}")} if out.is_dir() else set()
    if files and (not note.exists() or {"dtype": "float32", "best_of": None, **json.loads(note.read_text())} != wanted):
        raise ValueError(
            f"{out} holds images of another model, sampler, guidance, --best-of or dtype; choose another --out"
        )
    for left in out.glob(".*_seed*.tmp"):
        left.unlink()
    write_atomic(note, json.dumps(wanted))
    return files
