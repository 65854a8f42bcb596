"""Train, pack and measure all that ships: `make zoo`, or `python scripts/zoo.py NAME…`.

A finished training is not done again, an interrupted one goes on; packing and measuring are done every time.
Models come after the tokenizer they stand on. What the demo needs goes into the package, the rest into zoo/genlab_zoo.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shipped model."""

    name: str
    """What `genlab list` calls it."""
    presets: tuple[str, ...] = ()
    """The recipes that make it, one after the other, each starting from the one before; by default the preset of
    its name."""
    dtype: torch.dtype = torch.bfloat16
    """Stored as."""
    wheel: bool = False
    """Part of genlab's own wheel."""
    borrows: tuple[tuple[str, str], ...] = ()
    """Parts of it that another shipped model holds already, and which."""
    tokenizer: str = ""
    """What decodes what it draws, where that isn't the tokenizer it was trained on."""
    budget: float = 6.0
    """The most that its folder may take, in MB (10^6 bytes)."""

    @property
    def folder(self) -> Path:
        """Where it ships."""
        return (ROOT / "genlab/weights" if self.wheel else ROOT / "zoo/genlab_zoo") / self.name

    @property
    def stages(self) -> tuple[str, ...]:
        """Its recipes."""
        return self.presets or (self.name,)

    @property
    def megabytes(self) -> float:
        """What its folder takes; 0 where it isn't packed yet."""
        return sum(path.stat().st_size for path in self.folder.glob("*")) / 1e6


VAE = (("vae", "kl_vae-f8c16-emoji64"),)
BUDGET = 200.0
"""MB that all of them may take."""
ZOO = (
    Entry(
        "kl_vae-f8c16-emoji64",
        presets=("kl_vae-f8c16-emoji64", "kl_vae-f8c16-decoder-emoji64"),
        dtype=torch.int8,
        wheel=True,
        budget=12.5,
    ),
    Entry("xar-cell-emoji64", presets=("xar-cell-emoji64", "xar-cell-things-emoji64"), wheel=True, budget=14.8),
    Entry("vq-f4-emoji64", presets=("vq-f4-emoji64", "vq-f4-decoder-emoji64"), budget=5.6),
    Entry("bae-f4-emoji64", presets=("bae-f4-emoji64", "bae-f4-decoder-emoji64"), budget=5.6),
    Entry("msvq-f4-emoji64", presets=("msvq-f4-emoji64", "msvq-f4-decoder-emoji64"), budget=5.3),
    Entry("rvq-f8-emoji64", dtype=torch.int8, budget=11.5),
    Entry("resgen-emoji64", presets=("resgen-emoji64", "resgen-more-emoji64"), budget=6.4),
    Entry("flextok-d6-emoji64", dtype=torch.int8, borrows=VAE, budget=8.7),
    Entry("flexar-emoji64", budget=3.1),
    Entry("flexar-text-emoji64", budget=3.4),
    Entry("seed-emoji64", presets=("seed-contrastive-emoji64", "seed-codes-emoji64"), budget=8),
    Entry(
        "xar-seed-emoji64",
        presets=("xar-seed-emoji64", "xar-seed-more-emoji64", "xar-seed-things-emoji64"),
        budget=15.7,
    ),
    Entry("llamagen-emoji64", presets=("llamagen-emoji64", "llamagen-more-emoji64"), budget=3),
    Entry("llamagen-draft-emoji64", budget=0.6),
    Entry("dd-llamagen-emoji64", budget=3),
    Entry("llamagen-text-emoji64", presets=("llamagen-text-emoji64", "llamagen-text-more-emoji64"), budget=3.2),
    Entry("llamagen-text-draft-emoji64", budget=0.6),
    Entry("dd-llamagen-text-emoji64", budget=3.2),
    Entry("elm-2-6-emoji64", presets=("elm-2-6-emoji64", "elm-2-6-more-emoji64"), budget=2.7),
    Entry("var-emoji64", presets=("var-emoji64", "var-more-emoji64"), budget=4.2),
    Entry("dd-var-emoji64", budget=4.2),
    Entry("xar-patch-emoji64", budget=8.4),
    Entry("xar-scale-emoji64", budget=8.4),
    Entry("ecar-emoji64", budget=8.4),
    Entry("flow-emoji64", budget=8.4),
    Entry("mar-target-emoji64", budget=7.2),
    Entry("mar-draft-emoji64", budget=0.9),
    Entry("seed_llama-emoji64", presets=("seed_llama-emoji64", "seed_llama-things-emoji64"), budget=8.2),
    Entry(
        "divot-emoji64",
        presets=(
            "divot-emoji64",
            "divot-more-emoji64",
            "divot-detokenizer-emoji64",
            "divot-detokenizer-more-emoji64",
        ),
        borrows=VAE,
        budget=12.4,
    ),
    Entry(
        "divot_lm-emoji64",
        presets=("divot_lm-emoji64", "divot_lm-more-emoji64"),
        tokenizer="divot-adapt-emoji64",
        budget=8,
    ),
    Entry(
        "divot-adapt-emoji64",
        dtype=torch.int8,
        borrows=(*VAE, *((part, "divot-emoji64") for part in ("temporal", "norm", "spatial"))),
        budget=4.3,
    ),
)


def train(entry: Entry, runs: Path) -> Path:
    """The folder of the trained model."""
    model = None
    for stage in entry.stages:
        out = runs / stage
        if not (out / "model/config.json").is_file():
            command = [sys.executable, "-m", "genlab.cli", "train", stage, "--out", str(out), "--device", "cpu"]
            subprocess.run([*command, *(["--init", str(model)] if model else [])], check=True)
        model = out / "model"
    assert model is not None
    return model


def pack(entry: Entry, trained: Path) -> None:
    """Store the averaged weights small, with their card.

    Raises:
        ValueError: if they take more than the entry's budget.
    """
    from genlab.hub import from_pretrained

    model = from_pretrained(trained)
    model.extra.pop("name", None)
    model.extra.pop("tokenizer_sha256", None)  # the tokenizer that ships is stored small too
    if entry.tokenizer:
        model.extra["tokenizer"] = entry.tokenizer
    if len(entry.stages) > 1:
        model.extra["trained"]["stages"] = list(entry.stages)
    entry.folder.parent.mkdir(parents=True, exist_ok=True)
    card = (trained / "README.md").read_text().replace(f"# {entry.stages[-1]}\n", f"# {entry.name}\n", 1)
    model.save_pretrained(entry.folder, card=card, dtype=entry.dtype, borrow=dict(entry.borrows))
    for path in entry.folder.iterdir():
        path.chmod(0o644)
    if entry.megabytes > entry.budget:
        raise ValueError(
            f"{entry.folder} takes {entry.megabytes:.1f} MB, its budget in scripts/zoo.py is {entry.budget:g}: store "
            f"it in fewer bits (dtype), or give it more (all together {BUDGET:g})"
        )


def measure(entry: Entry, n: int | None, sweep: int, batch_size: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of a packed model on the held-out images (a tokenizer) or against the training images (a generator, its
    sampler set by `settings`, NAME=VALUE).
    """
    from genlab.data import open_images
    from genlab.hub import read_description
    from genlab.registry import TOKENIZERS

    described = read_description(entry.folder)
    kind = described["kind"]
    if kind.startswith("divot"):
        return measure_clips(entry, kind, n)
    if kind.startswith("seed") or "codes_of" in described:
        return measure_seed(kind, n)
    if kind in TOKENIZERS:
        return measure_tokenizer(entry, n)
    from eval import evaluate
    from eval.neighbours import nearest_quantiles
    from genlab.commands.models import load_line
    from genlab.commands.sample import make_sampler
    from genlab.pictures import grid, save_png
    from genlab.precision import torch_dtype

    line = load_line(entry.folder, dtype=torch_dtype("auto"))
    heldout = open_images("emoji", split="heldout")
    n = min(n or len(heldout), len(heldout))
    rows: list[Any] = heldout.captions if line.generator.by_text else heldout.labels.tolist()

    def draw(picks: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, Any, Any]:
        sampler = make_sampler(line.generator, "", tuple(settings), scale)
        condition = line.condition([rows[i] for i in picks.tolist()])
        images, stats = line.draw(sampler, condition, picks, batch_size, progress=True)
        figure = evaluate(
            images, "emoji:train", reference_is_sample=False, class_protocol="emoji:heldout", sampler=sampler.name
        ).figures[0]
        return images, stats, figure

    scales, points = (1.0, 1.5, 2.0, 3.0, 4.0) if sweep else (), {}
    for scale in scales:
        points[scale] = draw(torch.linspace(0, len(heldout) - 1, sweep).long(), scale)[2].value
        print(f"guidance {scale:g}: {points[scale]:.1f} ({sweep} images)", flush=True)
    best = min(points, key=points.__getitem__) if points else None
    images, stats, figure = draw(torch.linspace(0, len(heldout) - 1, n).long(), best)
    save_png(grid(images[torch.linspace(0, n - 1, 64).long()], columns=16), ROOT / f"runs/zoo/{entry.name}.png")
    train = open_images("emoji", split="train")
    shares = (0.01, 0.1, 0.5)
    near = nearest_quantiles(images, train.batch(torch.arange(len(train))), shares)
    return {
        figure.name: [round(x, 1) for x in (figure.value, figure.low, figure.high)],
        "images": n,
        "nearest training image, root mean square in pixel values": {
            f"{100 * share:g} % of images": round(distance, 1) for share, distance in zip(shares, near, strict=True)
        },
        "guidance": best if best is not None else line.generator.default_guidance.scale,
        "guidance sweep": {f"{k:g}": round(v, 1) for k, v in points.items()},
        "model calls": round(stats.model_calls / max(1, -(-n // batch_size)), 1),
        "seconds an image": round(stats.seconds / stats.images, 3),
    }


def measure_tokenizer(entry: Entry, n: int | None) -> dict[str, Any]:
    """Reconstruction, and the codebook's use."""
    from genlab.commands.reconstruct import ReconstructConfig, reconstruct
    from genlab.pictures import save_png

    figures, pairs = reconstruct(ReconstructConfig(model=str(entry.folder), n=n))
    save_png(pairs, ROOT / f"runs/zoo/{entry.name}.png")
    fd = [figures[f"fd_efficientnet_lite0{end}"] for end in ("", "_low", "_high")]
    return {
        "PSNR dB, all pixels pooled": round(figures["psnr_all_pixels_pooled"], 2),
        "PSNR dB, mean of images": round(figures["psnr_all_pixels_mean_of_images"], 2),
        "PSNR dB, non-white pixels pooled": round(figures["psnr_non_white_pixels_pooled"], 2),
        "fd_efficientnet_lite0 to the originals": [round(x, 1) for x in fd],
        "images": figures["images"],
        **{k: round(figures[k], 3) for k in ("codes", "usage", "perplexity") if k in figures},
    }


def measure_clips(entry: Entry, kind: str, n: int | None) -> dict[str, Any]:
    """A Divot or its language model on the held-out clips: `genlab bench divot`."""
    from eval import bench_divot
    from genlab.hub import read_description

    lm = kind == "divot_lm"
    tokenizer = read_description(entry.folder)["tokenizer"] if lm else str(entry.folder)
    c = bench_divot.DivotBenchConfig(
        tokenizer=tokenizer, lm=(str(entry.folder),) if lm else (), n=n or 0, out=ROOT / f"runs/zoo/{entry.name}"
    )
    result = bench_divot.run(c)
    held = result["heldout"]
    if lm:
        own, near = result["language"][str(entry.folder)], result["language"]["nearest_training_clip"]
        return {"clips": held["clips"], "CIDEr of the nearest training clip's caption": round(near["cider"], 3)} | {
            name: round(value, 3) for name, value in own.items() if value is not None
        }
    back = held["reversed"]["motion_correlation_with_the_clip_backwards"]
    return {
        "clips": held["clips"],
        **{name: round(value, 3) for name, value in held["own_tokens"].items()},
        "motion_correlation by another clip's tokens": round(held["another_clips_tokens"]["motion_correlation"], 3),
        "motion_correlation of the clip backwards, by its own tokens": round(back, 3),
    }


@functools.cache
def seed_results(n: int | None) -> dict[str, Any]:
    """`genlab bench seed` of what ships, once for all three models that it measures."""
    from eval import bench_seed

    c = bench_seed.SeedBenchConfig(out=ROOT / "runs/zoo/seed")
    return bench_seed.run(dataclasses.replace(c, n=n) if n else c)


def measure_seed(kind: str, n: int | None) -> dict[str, Any]:
    """A SEED, what draws its codes, or its language model."""
    result = seed_results(n)
    images = {"images": result["images"]}
    if kind == "seed":
        return images | {name: round(value, 3) for name, value in result["retrieval"].items() if name != "of"}
    if kind != "seed_llama":
        originals = round(result["classifier"]["heldout_accuracy"], 3)
        drawn = {name: round(value, 3) for name, value in result["reconstruction"].items()}
        return images | drawn | {"right_class of the originals": originals}
    drawn, captions = next(iter(result["drawings"].values())), result["captions"]
    return images | {
        "CIDEr": round(captions["given"]["cider"], 3),
        "CIDEr of its own words alone": round(captions["written"]["cider"], 3),
        "CIDEr of the nearest training image's caption": round(captions["nearest_training_image"]["cider"], 3),
        "BLEU": round(captions["given"]["bleu"], 1),
        "prompts drawn, the best of candidates each": drawn["prompts"],
        "in the right class": round(drawn["right_class"], 3),
        "right caption over others": round(drawn["right_caption_over_others"], 3),
        "in the right class, not chosen": round(drawn["not_chosen"]["right_class"], 3),
        "right caption over others, not chosen": round(drawn["not_chosen"]["right_caption_over_others"], 3),
    }


def write_figures(entry: Entry, figures: dict[str, Any], command: str) -> None:
    """Into the model card, with the command that made them."""
    path = entry.folder / "README.md"
    card = path.read_text().split("\n## Figures")[0].rstrip()
    lines = [f"- {name}: {show(value)}" for name, value in figures.items() if value not in ({}, None)]
    path.write_text(
        f"{card}\n\n## Figures\n\nOn the held-out images (or clips) of the embedded set; distances of samples are to "
        "its training images, for the held-out images' classes. Brackets: 95 % interval.\n\n"
        + "\n".join(lines)
        + f"\n\n    {command}\n"
    )


def show(value: Any) -> str:
    """A figure for people."""
    if isinstance(value, list):
        return f"{value[0]} ({value[1]} to {value[2]})"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def sizes(entries: list[Entry]) -> str:
    """A Markdown table: what each takes, its budget, and the CPU time of loading it, the best of three."""
    import time

    from genlab.hub import from_pretrained

    rows = []
    for entry in (entry for entry in entries if entry.megabytes):
        from_pretrained(entry.folder)  # libraries are imported, files are in memory
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            from_pretrained(entry.folder)
            best = min(best, time.process_time() - start)
        rows.append(f"| `{entry.name}` | {entry.megabytes:.1f} | {entry.budget:g} | {best:.2f} |")
    waiting = [entry for entry in entries if not entry.megabytes]
    rows += [f"| `{entry.name}` | not yet | {entry.budget:g} | |" for entry in waiting]
    there, budget = (sum(getattr(entry, what) for entry in entries) for what in ("megabytes", "budget"))
    return "\n".join(
        [
            "| model | MB | budget, MB | loads in, CPU-s |",
            "|---|---|---|---|",
            *rows,
            f"| in all (of at most {BUDGET:g}) | {there:.1f} | {budget:g} | |",
        ]
    )


def main() -> int:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models (default: all that ship)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where trainings keep their state")
    parser.add_argument("--train", action="store_true", help="only train and pack")
    parser.add_argument("--measure", action="store_true", help="only measure what is packed")
    parser.add_argument("--sizes", action="store_true", help="only print what each takes, on disk and to load")
    parser.add_argument("--n", type=int, help="images measured (default: the held-out split)")
    parser.add_argument("--sweep", type=int, default=256, help="images a point of the guidance sweep; 0: no sweep")
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch while drawing")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of the sampler, top_p=0.6")
    options = parser.parse_args()
    known = {entry.name: entry for entry in ZOO}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no {', '.join(unknown)} in the zoo; it has {', '.join(known)}")
    if options.sizes:
        print(sizes([known[name] for name in options.names or known]))
        return 0
    for entry in (known[name] for name in options.names or known):
        if not options.measure:
            pack(entry, train(entry, options.runs))
        if not options.train:
            figures = measure(entry, options.n, options.sweep, options.batch_size, options.set)
            given = "".join(
                f" --{name.replace('_', '-')} {getattr(options, name)}"
                for name in ("n", "sweep", "batch_size")
                if getattr(options, name) != parser.get_default(name)
            ) + (f" --set {' '.join(options.set)}" if options.set else "")
            write_figures(entry, figures, f"python scripts/zoo.py {entry.name} --measure{given}")
            print(json.dumps({entry.name: figures}, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
