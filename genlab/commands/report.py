"""`genlab report RUN…`: runs, pictures, comparisons and figures as one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from genlab.config import config, load_json

from . import shared
from .kept import counts_of, decode_counts


@config
class ReportConfig:
    """Write one HTML page that holds everything and loads nothing: training curves, sample grids over time,
    reconstructions, sliders by number of tokens (a flextok's) or depths (an rvq's), speed beside quality, metrics.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")] = ()
    """What to show: folders that `genlab train` wrote (also while it trains), folders or JSON files of a bench, JSON
    files of `genlab eval` and `genlab reconstruct`. A run's own folder is searched for such files too."""
    model: tuple[str, ...] = ()
    """More MODELs to show: a tokenizer's reconstructions, a generator's samples."""
    out: Path = Path("report.html")
    """The page."""
    title: str = ""
    """Its heading; empty: made of the names."""
    images: str = ""
    """SOURCE or SOURCE:SPLIT that is reconstructed; empty: the held-out part of what the model was trained on."""
    n: int = 8
    """Images a picture."""
    tokens: str = "all"
    """Positions of the slider of ordered tokens: 1,2,4,8, or `all` (the powers of two, and all)."""
    frames: int = 24
    """Sample grids shown a run, evenly spread over it."""
    render: bool = True
    """Also decode and draw with the runs' own models, not only with those of --model."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: bool = False
    """Print what the page holds as JSON."""


def main(argv: list[str]) -> int:
    """Collect, render, write."""
    c = shared.parse(ReportConfig, argv, prog="genlab report")
    if not c.sources and not c.model:
        raise ValueError("nothing to report on: name a run's folder, `genlab report runs/mine`, or --model MODEL")
    if min(c.n, c.frames) < 1:
        raise ValueError(f"--n and --frames must be at least 1, got {c.n} and {c.frames}")
    import genlab

    about = ", ".join(f"{k} {v}" for k, v in shared.versions().items())
    report = shared.load("eval.report").Report(
        title=c.title or "genlab: " + ", ".join(Path(s).name for s in (*c.sources, *c.model)),
        made_by=f"Made by genlab {genlab.__version__} with: genlab report {' '.join(argv)}. {about}.",
    )
    for source in c.sources:
        add_source(report, Path(source), c)
    name_apart(report, c.sources)
    for model in c.model:
        add_model(report, model, c)
    shared.load("eval.markup").write_page(c.out, report.html())
    held = {f.name: len(v) for f in dataclasses.fields(report) if isinstance(v := getattr(report, f.name), list)}
    if c.json:
        print(json.dumps({"out": str(c.out), "bytes": c.out.stat().st_size, "notes": report.notes, "holds": held}))
    else:
        for note in report.notes:
            print(f"note: {note}")
        print(f"{', '.join(f'{k} {n}' for k, n in held.items() if n and k != 'notes')} -> {c.out}")
    return 0


def add_source(report: Any, path: Path, c: ReportConfig) -> None:
    """A run's folder, a bench's, or a JSON file.

    Raises:
        FileNotFoundError: for a path that isn't there.
        ValueError: for one that holds nothing to show.
    """
    if path.is_dir() and (path / "metrics.jsonl").is_file():
        report.runs.append(read_run(report, path, c))
        for file in sorted(path.glob("*.json")):
            if file.name not in ("config.json", "manifest.json"):
                add_json(report, file)
        if c.render and (path / "model" / "config.json").is_file():
            try:
                add_model(report, str(path / "model"), c, of_run=True)
            except (ValueError, FileNotFoundError) as error:  # a run is worth its page without its pictures
                report.notes.append(f"{path}: its model is not shown: {error}")
    elif path.is_dir() or path.is_file():
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not sum(add_json(report, file) for file in files):
            raise ValueError(
                f"{path} holds nothing to report on: neither a run (metrics.jsonl) nor a bench's result.json with "
                "speed and distances, nor what `genlab eval --json FILE` or `genlab reconstruct --json > FILE` wrote"
            )
    else:
        raise FileNotFoundError(f"no run, bench or JSON file at {path}; `genlab train PRESET --out {path}` makes a run")


def add_json(report: Any, path: Path) -> bool:
    """Figures out of a JSON file; whether there were any."""
    data = load_json(path)
    if not isinstance(data, dict):
        return False
    if {"figures", "protocol", "generated"} <= data.keys():
        report.results.append((path.stem, shared.load("eval.result").Result.from_json(path.read_text())))
        return True
    counted = data.keys() & {"images", "clips"}
    if counted and {"model", "tokens", "source"} <= data.keys() and any(k.startswith("psnr") for k in data):
        report.figures.append(data)
        return True
    found = shared.load("eval.speed_quality").comparisons(data)
    report.comparisons += found
    return bool(found)


def read_run(report: Any, path: Path, c: ReportConfig) -> Any:
    """A training run's curves and sample grids.

    Raises:
        FileNotFoundError, ValueError: for a folder without its config.json, or a metrics.jsonl that isn't one.
    """
    parts = shared.load("eval.report")
    config = load_json(path / "config.json")
    if not isinstance(config, dict) or "kind" not in (config.get("model") or {}):
        raise ValueError(f"{path / 'config.json'} is not a training run's of genlab")
    lines = read_metrics(path / "metrics.jsonl")
    kind, tokenizer = config["model"]["kind"], config.get("tokenizer", "")
    data = config.get("data", {}).get("source", "")
    last = lines[-1] if lines else {}
    facts = {
        "model": kind,
        "tokenizer": tokenizer,
        "data": data,
        "images seen": f"{last.get('images', 0):,.0f} of {config.get('images', 0):,}",
        "CPU minutes": f"{last.get('cpu_seconds', 0) / 60:.1f}",
        "last loss": f"{last['loss']:.4g}" if "loss" in last else "",
    }
    about = f"{kind} on {tokenizer or data}" if tokenizer or data else kind
    samples = read_samples(report, path, c)
    return parts.Run(path.resolve().name, about, tuple((k, v) for k, v in facts.items() if v), tuple(lines), samples)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The finite numbers of a metrics.jsonl; a last line that is being written is left out.

    Raises:
        ValueError: for a line that isn't one of the loop's.
    """
    lines, texts = [], path.read_text().splitlines()
    for i, text in enumerate(texts):
        try:
            line = json.loads(text)
            float(line["images"])
        except (ValueError, TypeError, KeyError):
            if i == len(texts) - 1:
                break
            raise ValueError(
                f"line {i + 1} of {path} is not a line of `genlab train`'s metrics: {text[:80]!r}"
            ) from None
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}
        lines.append({k: v for k, v in numbers.items() if math.isfinite(v)})
    return lines


def read_samples(report: Any, path: Path, c: ReportConfig) -> Any:
    """A slider through a run's sample grids, or None where there are none."""
    from PIL import Image

    parts = shared.load("eval.report")
    files, frames = sorted((path / "samples").glob("*.png")), []
    picks = sorted({round(i * (len(files) - 1) / max(1, c.frames - 1)) for i in range(c.frames)}) if files else []
    for i in picks:
        try:
            with Image.open(files[i]) as image:
                image.load()
                stem = files[i].stem
                frames.append(parts.Frame(image.copy(), f"{int(stem):,} images seen" if stem.isdigit() else stem))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            report.notes.append(f"{files[i]} can't be read and is left out: {error}")
    if not frames:
        return None
    name = path.resolve().name
    about = f"{len(frames)} of {len(files)} sample grids, drawn with the averaged weights, always by the same seeds."
    return parts.Slider(name, "Training so far", about, f"Sample grid of {name}", tuple(frames))


def name_apart(report: Any, sources: tuple[str, ...]) -> None:
    """Runs whose folders have one name get their whole paths."""
    names = [run.name for run in report.runs]
    paths = [s for s in sources if (Path(s) / "metrics.jsonl").is_file()]
    for i, path in enumerate(paths):
        if names.count(names[i]) > 1:
            samples = report.runs[i].samples and dataclasses.replace(report.runs[i].samples, title=path)
            report.runs[i] = dataclasses.replace(report.runs[i], name=path, samples=samples)


def add_model(report: Any, name: str, c: ReportConfig, of_run: bool = False) -> None:
    """A tokenizer's reconstructions or a generator's samples; a slider where parts of the tokens are a picture.

    Raises:
        FileNotFoundError, ValueError: for a model or images that can't be had, or a model of clips.
    """
    from genlab.hub import from_pretrained, locate, read_description
    from genlab.registry import TOKENIZERS

    device = shared.torch_device(c.device)
    if read_description(locate(name))["kind"] in TOKENIZERS:
        add_tokenizer(report, name, from_pretrained(name, device=device), c)
    else:
        from .models import load_line

        add_generator(report, name, load_line(name, device=device), c, of_run)


def add_tokenizer(report: Any, name: str, tokenizer: Any, c: ReportConfig) -> None:
    """Held-out images and what becomes of them."""
    import torch

    from genlab.pictures import grid, to_float, to_uint8

    parts, size = shared.load("eval.report"), no_clips(name, tokenizer.spec)
    images, source = open_held_out(c.images or tokenizer.extra.get("data", {}).get("source") or "emoji", size)
    x = images.batch(torch.linspace(0, len(images) - 1, min(c.n, len(images))).long())
    psnr = shared.load("eval.reconstruction").psnr
    labels, of = ["original", "decoded"], f"{len(x)} images of {source}, above what {name} makes of them"
    with torch.inference_mode():
        tokens = tokenizer.encode(to_float(x).to(tokenizer.device))
        if steps := refinement(tokenizer.spec, c.tokens):
            unit, counts, cut = steps
            y = decode_counts(tokenizer, tokens, counts, None, c.n, cut)
            frames = tuple(
                parts.Frame(
                    grid(torch.cat([x, y[:, i]]), columns=len(x), row_labels=labels, zoom=zoom(size)),
                    f"{k} of {counts[-1]} {unit}, PSNR {float(psnr(x, y[:, i]).mean()):.1f} dB",
                )
                for i, k in enumerate(counts)
            )
            about = f"{of}. {tokenizer.spec.describe()}; PSNR is the mean over these {len(x)} images."
            title = f"{name}: reconstructions by number of {unit}"
            report.sliders.append(parts.Slider(title, f"{unit.capitalize()} kept", about, f"{of}", frames))
            return
        y = to_uint8(tokenizer.decode(tokens)).cpu()
    about = f"{of}. {tokenizer.spec.describe()}; PSNR {float(psnr(x, y).mean()):.1f} dB, the mean over these images."
    picture = grid(torch.cat([x, y]), columns=len(x), row_labels=labels, zoom=zoom(size))
    report.reconstructions.append(parts.Still(name, about, of, picture))


def add_generator(report: Any, name: str, line: Any, c: ReportConfig, of_run: bool) -> None:
    """One image a class or caption; of a run only where a slider shows more than its sample grids do."""
    import torch

    from genlab.pictures import grid, to_uint8
    from samplers import default_sampler

    parts = shared.load("eval.report")
    spec = line.tokenizer.spec
    size = no_clips(name, spec)
    steps = refinement(spec, c.tokens)
    if of_run and not steps:
        return
    if line.generator.by_text:
        source = c.images or line.generator.extra.get("data", {}).get("source") or "emoji"
        captions = list(dict.fromkeys(filter(None, open_held_out(source, size)[0].captions)))
        if not captions:
            raise ValueError(f"{name} draws by text, and {source} has no captions; name a set that has, with --images")
        rows: list[Any] = [captions[i % len(captions)] for i in range(c.n)]
        words = rows
    else:
        rows = [i % line.n_classes for i in range(c.n)]
        words = [line.classes[i] if line.classes else f"class {i}" for i in rows]
    sampler, seeds = default_sampler(line.generator), torch.arange(c.n)
    out = sampler.sample(line.generator, line.condition(rows), seeds)
    said = ", ".join(words)
    about = f"{sampler.name}, seeds 0-{c.n - 1}, {out.stats.seconds / c.n:.2f} s an image; nothing was picked: {said}."
    if steps:
        unit, counts, cut = steps
        y = decode_counts(line.tokenizer, out.tokens, counts, seeds, c.n, cut)
        frames = tuple(
            parts.Frame(grid(y[:, i], columns=c.n, zoom=zoom(size)), f"{k} of {counts[-1]} {unit}")
            for i, k in enumerate(counts)
        )
        title = f"{name}: samples by number of {unit}"
        report.sliders.append(parts.Slider(title, f"{unit.capitalize()} kept", about, f"Samples: {said}", frames))
        return
    with torch.inference_mode():
        y = to_uint8(line.tokenizer.decode(out.tokens, seeds)).cpu()
    report.drawn.append(parts.Still(name, about, f"Samples: {said}", grid(y, columns=min(c.n, 8), zoom=zoom(size))))


def refinement(spec: Any, tokens: str) -> tuple[str, list[int], str] | None:
    """What a slider goes through: its unit, its positions, and the method of `Tokens` that keeps so many."""
    if spec.order == "coarse_to_fine":
        return "tokens", counts_of(tokens, spec), "first"
    return ("depths", list(range(1, spec.depth + 1)), "first_depths") if spec.kind == "residual" else None


def zoom(size: int) -> int:
    """Small images are shown larger, by a whole factor."""
    return max(1, 128 // size)


def no_clips(name: str, spec: Any) -> int:
    """The side of a model's images.

    Raises:
        ValueError: for a model of clips.
    """
    if len(spec.image_size) == 3:
        raise ValueError(f"{name} is a model of clips, and the report shows images; `genlab reconstruct` writes films")
    return int(spec.image_size[-1])


def open_held_out(name: str, size: int) -> tuple[Any, str]:
    """A set of images, of its held-out part where no split is named, and what it is called."""
    from genlab.data.images import named_split, open_images

    source, split = named_split(name)
    try:
        return open_images(source, split=split or "heldout", size=size), f"{source}:{split or 'heldout'}"  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Name other images with --images, e.g. --images emoji:heldout") from None
