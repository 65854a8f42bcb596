"""`genlab demo --out demo/`: what ships, shown on one page."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from pathlib import Path
from typing import Any

from genlab.config import config, to_dict
from genlab.precision import DtypeName

from . import shared
from .reconstruct import ReconstructConfig, reconstruct


@config
class DemoConfig:
    """Reconstruct held-out images, draw every class, measure both, and write one self-contained page.

    Works on a CPU, offline, in a few minutes: OUT/index.html, the pictures beside it, demo.json.
    """

    out: Path = Path("demo")
    """Folder to write."""
    model: str = "xar-cell-emoji64"
    """The generator to show; its checkpoint names the tokenizer."""
    refining: str = "flexar-text-emoji64"
    """A generator by text over ordered tokens, shown refining as tokens are kept; left out where it isn't there."""
    prompts: tuple[str, ...] = ("red apple", "grinning face", "woman: dark skin tone", "flag: France")
    """What it draws."""
    columns: int = 8
    """Images a class in the sample grid."""
    n: int = 256
    """Images for the Fréchet distances: as many samples as held-out images, of the same classes."""
    dtype: DtypeName = "auto"
    """Arithmetic while drawing; `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    json: bool = False
    """Print the figures as JSON."""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>genlab demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} code {{ background: #f3f3f3; padding: 0 .2em }}
.note {{ color: #666; font-size: .9em }}
</style></head><body>
<h1>genlab demo</h1>
<p>A tokenizer turns 64×64 emoji into {tokens}; an autoregressive generator draws such tokens for a class; the
tokenizer decodes them. Both were trained on a CPU on the embedded set and ship with the package.</p>
<h2>Reconstructions</h2>
<p>Held-out images (never trained on) above what <code>{tokenizer}</code> makes of them.
PSNR {psnr:.1f} dB over all pixels, {psnr_inner:.1f} dB over those that aren't white ({n_rec} images);
{ratio:.0f} pixel values for each latent number.</p>
<img src="data:image/png;base64,{rec}" alt="rows of original emoji, each above its reconstruction">
<h2>Samples</h2>
<p><code>{model}</code>, one row a class, seeds 0 to {last_seed}, sampler <code>{sampler}</code>, guidance {guidance};
{seconds:.2f} s an image here. Nothing was picked.</p>
<img src="data:image/png;base64,{samples}" alt="a grid of generated emoji, one row for each class">
{refining}<h2>Fréchet distance</h2>
<p>{metric} to the training images, with 95 % intervals; {n} images each, of the same classes. Lower is better; the
held-out images are the floor at this number of images.</p>
<table><tr><th>images</th><th>distance</th><th>interval</th></tr>{rows}</table>
<p class="note">{caution}</p>
<h2>Again</h2>
<p><code>genlab sample {model} --seeds 0-15 --grid out.png</code><br>
<code>genlab reconstruct {tokenizer} --grid rec.png</code><br>
<code>genlab train {model} --out runs/mine</code></p>
<p class="note">Made in {total:.0f} s by <code>genlab demo</code>, genlab {version}, torch {torch}.
Emoji art: Fluent Emoji (MIT, Microsoft) and Noto Emoji (Apache-2.0, Google).</p>
</body></html>
"""


REFINING = """<h2>One prompt, token by token</h2>
<p><code>{model}</code> draws {n} ordered tokens for a prompt; any first k of them are an image. One row a prompt,
seed 0, decoded from {counts} tokens.</p>
<img src="data:image/png;base64,{picture}" alt="rows of one prompt each, the image refining from left to right">
"""


def main(argv: list[str]) -> int:
    """Make the page."""
    c = shared.parse(DemoConfig, argv, prog="genlab demo")
    shared.require_positive(c, "n", "columns")
    import torch

    import genlab
    from genlab.data import open_images
    from genlab.hub import write_atomic
    from genlab.pictures import grid, save_png
    from genlab.precision import torch_dtype

    from .models import load_line
    from .sample import make_sampler

    clock = time.perf_counter()
    line = load_line(c.model, dtype=torch_dtype(c.dtype))
    line.needs_classes("demo")
    heldout = open_images("emoji", split="heldout")
    if c.n > len(heldout):
        raise ValueError(f"--n {c.n}: there are {len(heldout):,} held-out images")
    picks = torch.linspace(0, len(heldout) - 1, c.n).long()
    same_classes = line.class_of(heldout.classes, heldout.labels[picks])
    c.out.mkdir(parents=True, exist_ok=True)
    tokenizer = line.generator.extra["tokenizer"]
    sampler = make_sampler(line.generator, "")

    print(f"1/4 reconstructing {c.n} held-out images with {tokenizer}")
    figures, pairs = reconstruct(ReconstructConfig(model=tokenizer, n=c.n, fd=False))
    save_png(pairs, c.out / "reconstructions.png")

    print(f"2/4 drawing {len(line.classes)} classes x {c.columns} with {c.model}")
    labels = torch.arange(line.n_classes).repeat_interleave(c.columns)
    seeds = torch.arange(c.columns).repeat(line.n_classes)
    images, stats = line.draw(sampler, labels, seeds, batch_size=40, progress=True)
    picture = grid(images, columns=c.columns, row_labels=line.classes, zoom=2)
    save_png(picture, c.out / "samples.png", {"model": c.model})

    print(f"3/4 drawing {len(c.prompts)} prompts token by token with {c.refining or 'nothing'}")
    refining = refine(c, torch_dtype(c.dtype))

    print(f"4/4 measuring: {c.n} samples and {c.n} held-out images against the training images")
    evaluation = shared.load("eval")
    drawn, _ = line.draw(sampler, same_classes, 1_000_000 + torch.arange(c.n), batch_size=64, progress=True)
    reference = shared.load("eval.references").path("emoji-train")
    results = {
        "held-out images (floor)": evaluation.evaluate(heldout.batch(picks), reference, reference_is_sample=False),
        f"samples of {c.model}": evaluation.evaluate(
            drawn, reference, reference_is_sample=False, class_protocol="emoji:heldout", sampler=sampler.name
        ),
    }
    rows = {name: r.figures[0] for name, r in results.items()}
    guidance = sampler.config.guidance or line.generator.default_guidance
    summary: dict[str, Any] = {
        "model": c.model,
        "tokenizer": tokenizer,
        "reconstruction": figures,
        "distances": {name: to_dict(f) for name, f in rows.items()},
        "seconds_an_image": stats.seconds / stats.images,
        "seconds": time.perf_counter() - clock,
        "config": to_dict(c),
        "versions": shared.versions(),
    }
    write_atomic(c.out / "demo.json", json.dumps(summary, indent=2) + "\n")
    page = PAGE.format(
        tokens=html.escape(line.tokenizer.spec.describe()),
        tokenizer=html.escape(tokenizer),
        psnr=figures["psnr_all_pixels_pooled"],
        psnr_inner=figures["psnr_non_white_pixels_pooled"],
        n_rec=figures["images"],
        ratio=figures["pixel_values_per_latent_number"] or 0,
        rec=png64(pairs),
        samples=png64(picture),
        refining=refining,
        model=html.escape(c.model),
        last_seed=c.columns - 1,
        sampler=sampler.name,
        guidance=f"{guidance.scale:g} ({guidance.schedule})",
        seconds=summary["seconds_an_image"],
        metric=next(iter(rows.values())).name,
        n=c.n,
        rows="".join(
            f"<tr><td>{html.escape(name)}</td><td>{f.value:.2f}</td><td>{interval(f)}</td></tr>"
            for name, f in rows.items()
        ),
        caution="Not FID, and not comparable with published figures: another network, small pictures, few images.",
        total=summary["seconds"],
        version=genlab.__version__,
        torch=summary["versions"].get("torch", "?"),
    )
    write_atomic(c.out / "index.html", page)
    if c.json:
        print(json.dumps(summary, indent=2))
    else:
        for name, f in rows.items():
            print(f"{f.name} {name}: {f.value:.2f} ({interval(f)})")
        print(f"open {c.out / 'index.html'} ({summary['seconds']:.0f} s)")
    return 0


def refine(c: DemoConfig, dtype: Any) -> str:
    """The section on ordered tokens, and refining.png; empty where there is no such model.

    Raises:
        ValueError: for a model that draws by class, or whose tokens aren't ordered.
    """
    import torch

    from genlab.hub import shipped
    from genlab.pictures import save_png

    from .kept import counts_of, draw_refining
    from .models import load_line
    from .sample import make_sampler

    if not c.refining or not c.prompts:
        return ""
    if c.refining == DemoConfig.refining and c.refining not in shipped():
        print(f"  {c.refining} is not part of this install (it comes with genlab-zoo): left out")
        return ""
    line = load_line(c.refining, dtype=dtype)
    if not line.generator.by_text:
        raise ValueError(f"--refining takes a generator by text, and {c.refining} draws by class")
    counts, n = counts_of("all", line.tokenizer.spec), len(c.prompts)
    sampler = make_sampler(line.generator, "")
    picture, _ = draw_refining(
        line, sampler, line.condition(c.prompts), torch.zeros(n, dtype=torch.long), list(c.prompts), counts, n, zoom=2
    )
    save_png(picture, c.out / "refining.png", {"model": c.refining})
    return REFINING.format(
        model=html.escape(c.refining),
        n=line.tokenizer.spec.length,
        counts=", ".join(map(str, counts)),
        picture=png64(picture),
    )


def interval(figure: Any) -> str:
    """`low to high`, or a dash."""
    return "–" if figure.low is None else f"{figure.low:.2f} to {figure.high:.2f}"


def png64(image: Any) -> str:
    """A PIL image as base64 PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
