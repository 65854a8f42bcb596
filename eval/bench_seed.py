"""SEED: do the same codes serve seeing and drawing? `genlab bench seed --help`.

- Retrieval of held-out captions from quantised codes, and from the embeddings before quantisation.
- Reconstruction from the same codes: is it still the same kind of thing, for an independent classifier?
- Captions of held-out images, as `genlab caption` gives them and as the model alone writes them from codes, against
  those of the nearest training image, and of the nearest that the codes alone find; beside their images, evenly spaced
  and not picked, in captions.png and captions.md.
- Caption quality against the number of codes shown.
- Drawing from 20 fixed prompts: the right class of the data's, and the right caption against the others.
- The same LM over another tokenizer's codes (`--other`, e.g. 2D raster ones): captions and drawings side by side.

Retrieval and "right caption" are in the tokenizer's own contrastive space; the classifier and the nearest training
image look at EfficientNet-Lite0's pooled features, which no caption has touched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genlab.config import config, to_dict
from genlab.data import open_images
from genlab.data.images import ImageSet
from genlab.hub import from_pretrained, write_atomic
from genlab.pictures import grid, save_png, to_float, to_uint8
from genlab.rerank import Judge, candidate_seeds
from genlab.tokens import Tokens, concatenate, require_fit
from samplers import default_sampler

from .captions import bleu, cider
from .classify import Classifier, classifier_of, pooled
from .features import EfficientNetLite0
from .retrieval import beats_random, top_k
from .text import clip_scores

PROMPTS = (
    ("soccer ball", "Activities"), ("trophy", "Activities"), ("cat face", "Animals & Nature"),
    ("deciduous tree", "Animals & Nature"), ("flag: France", "Flags"), ("flag: Japan", "Flags"),
    ("red apple", "Food & Drink"), ("slice of pizza", "Food & Drink"), ("open book", "Objects"),
    ("light bulb", "Objects"),
    ("woman: dark skin tone", "People & Body"), ("thumbs up: medium-light skin tone", "People & Body"),
    ("smiling face", "Smileys & Emotion"), ("red heart", "Smileys & Emotion"), ("right arrow", "Symbols"),
    ("no entry", "Symbols"), ("stop sign", "Travel & Places"), ("house", "Travel & Places"),
    ("blue car", "Travel & Places"), ("top hat", "Objects"),
)  # fmt: skip
"""What is drawn, and the class of the embedded set that it belongs to."""


@config
class SeedBenchConfig:
    """Measure a SEED-LLaMA and its tokenizer; writes result.json, captions.png, captions.md, drawings.png and
    reconstructions.png.
    """

    model: str = "seed_llama-emoji64"
    """The language model, a MODEL."""
    tokenizer: str = ""
    """Its tokenizer, a seed; the one the model names where not given."""
    other: tuple[str, ...] = ()
    """The same LM over other codes, MODELs, to compare with; each names its tokenizer."""
    out: Path = Path("runs/bench_seed")
    """Where the results go."""
    source: str = "emoji"
    """Images with captions and classes; its training split has the nearest images and fits the classifier."""
    n: int = 200
    """Held-out images with captions of their own: retrieval among them, captions, reconstructions."""
    shown: int = 30
    """How many of them stand in captions.png."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of codes to write captions from."""
    beams: int = 3
    """Beams of the search for a caption."""
    seeds: int = 4
    """Drawings a prompt."""
    best_of: int = 8
    """Drawings each of those is chosen from, by how well it fits its prompt in the tokenizer's space; the figures of
    the first of them, not chosen, stand beside."""
    guidance: float | None = None
    """Of the drawings; None: the model's own."""
    each: int = 200
    """Images a class that the classifier is fitted to."""
    nearest_of: int = 0
    """Training images to look for the nearest among; 0: all."""
    clip: str = ""
    """Also the CLIP score of drawings and prompts, by this CLIP of transformers, a folder or Hub id."""
    batch_size: int = 32
    """Images a batch."""
    json: bool = False
    """Print JSON."""


def spaced(images: ImageSet, n: int) -> list[int]:
    """So many images of different captions, evenly spaced over the set; nobody picks them."""
    index: dict[str, int] = {}
    for i, caption in enumerate(images.captions):
        index.setdefault(caption, i)
    first = sorted(index.values())
    return [first[i] for i in torch.linspace(0, len(first) - 1, min(n, len(first))).long().tolist()]


def encode(tokenizer: Any, images: torch.Tensor, batch_size: int) -> Tokens:
    """Tokens of uint8 images."""
    with torch.inference_mode():
        return concatenate([tokenizer.encode(to_float(part)) for part in images.split(batch_size)])


def decode(tokenizer: Any, tokens: Tokens, batch_size: int, seeds: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 images of tokens; image i by seed i where none are given."""
    with torch.inference_mode():
        rows = range(0, len(tokens), batch_size)
        seeds = torch.arange(len(tokens)) if seeds is None else seeds
        return torch.cat([
            to_uint8(tokenizer.decode(tokens[i : i + batch_size], seeds[i : i + batch_size])) for i in rows
        ])  # fmt: skip


def embed(tokenizer: Any, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Contrastive vectors of uint8 images, not quantised."""
    with torch.inference_mode():
        return torch.cat([tokenizer.embed_images(to_float(part)) for part in images.split(batch_size)])


def retrieval(tokenizer: Any, x: torch.Tensor, tokens: Tokens, captions: list[str], batch_size: int) -> dict[str, Any]:
    """Share of images whose own caption is among the nearest, and of captions whose own image is."""
    with torch.inference_mode():
        words, codes = tokenizer.embed_text(captions), tokenizer.embed_codes(tokens)
    before = embed(tokenizer, x, batch_size)
    return {
        "of": len(captions),
        "chance_top5": 5 / len(captions),
        **{f"caption_top{k}": top_k(codes, words, k) for k in (1, 5)},
        **{f"image_top{k}": top_k(words, codes, k) for k in (1, 5)},
        "caption_top5_before_quantisation": top_k(before, words, 5),
    }


def judge(captions: Sequence[str], wanted: Sequence[str], tokenizer: Any, codes: Tokens) -> dict[str, float]:
    """CIDEr (mean), BLEU, and how often a caption fits its own image's codes better than the other images'."""
    references = [[w] for w in wanted]
    with torch.inference_mode():
        words, seen = tokenizer.embed_text([c or "." for c in captions]), tokenizer.embed_codes(codes)
    return {
        "cider": float(cider(captions, references).mean()),
        "bleu": bleu(captions, references),
        "fits_its_image_over_others": beats_random(words, seen),
        "cosine_to_image": float((words * seen).sum(1).mean()),
    }


def draw(
    model: Any, tokenizer: Any, seed: Any, judged_by: Classifier, extractor: Any, names: set[str], c: SeedBenchConfig
) -> tuple[dict[str, Any], torch.Tensor]:
    """The fixed prompts' drawings, judged; row by row, `seeds` a prompt. names: those of the training images."""
    from genlab.generators.base import Guidance

    known = [(prompt, name) for prompt, name in PROMPTS if name in judged_by.classes]
    prompts = [prompt for prompt, _ in known]
    rows = torch.arange(len(prompts)).repeat_interleave(c.seeds)
    sampler = default_sampler(model)
    if c.guidance is not None:
        guidance = Guidance(scale=c.guidance, schedule=model.default_guidance.schedule)
        sampler = type(sampler)(type(sampler.config)(guidance=guidance))
    many, seeds = rows.repeat_interleave(c.best_of), candidate_seeds(torch.arange(len(rows)), c.best_of)
    drawn = sampler.sample(model, model.read_captions(prompts)[many], seeds, c.batch_size)
    images = decode(tokenizer, drawn.tokens, c.batch_size, seeds)
    wanted = torch.tensor([judged_by.classes.index(name) for _, name in known])[rows]
    with torch.inference_mode():
        words = seed.embed_text(prompts)

    def judged(images: torch.Tensor) -> dict[str, Any]:
        right = judged_by(pooled(images, extractor)) == wanted
        seen = embed(seed, images, c.batch_size).view(len(prompts), c.seeds, -1)
        return {
            "right_class": float(right.double().mean()),
            "right_class_of_prompts": {
                p: f"{int(r.sum())}/{c.seeds}" for p, r in zip(prompts, right.view(-1, c.seeds), strict=True)
            },
            "right_caption_over_others": sum(beats_random(seen[:, s], words) for s in range(c.seeds)) / c.seeds,
            **({"clip_score": clip_score(images, [prompts[r] for r in rows.tolist()], c)} if c.clip else {}),
        }

    best = images[Judge(seed, "the tokenizer").best(images, [prompts[r] for r in rows.tolist()], c.best_of)]
    return {
        "prompts": len(prompts),
        "of_training": sum(p in names for p in prompts),
        "images": len(rows),
        **judged(best),
        "not_chosen": judged(images[:: c.best_of]),
        "seconds_an_image": drawn.stats.seconds / len(many),
    }, best


def clip_score(images: torch.Tensor, prompts: list[str], c: SeedBenchConfig) -> float:
    """Mean over images."""
    starts = range(0, len(images), c.batch_size)
    pairs = ((images[i : i + c.batch_size], prompts[i : i + c.batch_size]) for i in starts)
    return float(clip_scores(pairs, model=c.clip).mean())


def measure(c: SeedBenchConfig) -> dict[str, Any]:
    """All figures; writes the pictures.

    Raises:
        ValueError: for models of other kinds.
    """
    model = from_pretrained(c.model)
    if not hasattr(model, "describe"):
        raise ValueError(f"{c.model} holds a {model.kind}, this bench measures a seed_llama")
    seed = from_pretrained(c.tokenizer or model.extra["tokenizer"])
    if seed.kind != "seed":
        raise ValueError(
            f"{c.model} stands on a {seed.kind}; this bench measures one over a seed, others go to --other"
        )
    require_fit("the tokenizer", seed.spec, c.model, model.spec)
    size = seed.config.image_size
    held, train = (open_images(c.source, split=split, size=size) for split in ("heldout", "train"))
    picks = spaced(held, c.n)
    x, wanted = held.batch(picks), [held.captions[i] for i in picks]
    extractor, tokens = EfficientNetLite0(), encode(seed, x, c.batch_size)
    note("retrieval")
    result: dict[str, Any] = {"config": to_dict(c), "images": len(picks)}
    result["retrieval"] = retrieval(seed, x, tokens, wanted, c.batch_size)

    note("reconstruction")
    judged_by, features = classifier_of(train, extractor, c.each), pooled(x, extractor)
    labels, y = held.labels[picks], decode(seed, tokens, c.batch_size)
    of_y = pooled(y, extractor)
    result["classifier"] = {"heldout_accuracy": float((judged_by(features) == labels).double().mean())}
    result["reconstruction"] = {
        "right_class": float((judged_by(of_y) == labels).double().mean()),
        "own_original_top5": top_k(of_y, features, 5),
    }
    some = torch.linspace(0, len(x) - 1, min(16, len(x))).long()
    pairs = [part for half in some.split(8) for part in (x[half], y[half])]
    names = ["original", "from its codes"] * (len(pairs) // 2)
    save_png(grid(torch.cat(pairs), row_labels=names), c.out / "reconstructions.png")

    note("captions")
    among = torch.linspace(0, len(train) - 1, min(c.nearest_of or len(train), len(train))).long()
    parts = [train.batch(part) for part in among.split(512)]
    of_train, unit = torch.cat([pooled(part, extractor) for part in parts]), torch.nn.functional.normalize
    with torch.inference_mode():
        codes_of_train = torch.cat([seed.embed_codes(encode(seed, part, c.batch_size)) for part in parts])
        likeness = {"image": unit(features) @ unit(of_train).T, "codes": seed.embed_codes(tokens) @ codes_of_train.T}
    near, by_codes = ([train.captions[int(among[i])] for i in like.argmax(1).tolist()] for like in likeness.values())
    alone = model.describe(tokens, beams=c.beams)
    said = []
    for i in range(0, len(x), c.batch_size):
        said += model.vote(to_float(x[i : i + c.batch_size]), seed, alone[i : i + c.batch_size])
    result["captions"] = {
        "given": judge(said, wanted, seed, tokens) | {"its_own_words": sum(map(str.__eq__, said, alone)) / len(said)},
        "written": judge(alone, wanted, seed, tokens),
        "nearest_training_image": judge(near, wanted, seed, tokens),
        "nearest_training_image_by_codes": judge(by_codes, wanted, seed, tokens),
        "reference": judge(wanted, wanted, seed, tokens),
    }
    result["codes_shown"] = {}
    for k in sorted(k for k in set(c.counts) if k <= seed.spec.length):
        few = alone if k == seed.spec.length else model.describe(tokens, k, beams=c.beams)
        result["codes_shown"][str(k)] = judge(few, wanted, seed, tokens)
    show_captions(x, wanted, {"given": said, "by the model alone": alone}, near, c)

    note("drawings")
    drawn, images = draw(model, seed, seed, judged_by, extractor, names_of(train), c)
    result["drawings"] = {c.model: drawn}
    save_png(drawings_grid(images, judged_by, c), c.out / "drawings.png")
    result["over_other_codes"] = {}
    for name in c.other:
        note(name)
        other = from_pretrained(name)
        t = from_pretrained(other.extra["tokenizer"])
        require_fit(other.extra["tokenizer"], t.spec, name, other.spec)
        drawn, images = draw(other, t, seed, judged_by, extractor, names_of(train), c)
        save_png(drawings_grid(images, judged_by, c), c.out / f"drawings-{Path(name).name}.png")
        words = other.describe(encode(t, x, c.batch_size), beams=c.beams)
        result["over_other_codes"][name] = {
            "tokens": t.spec.describe(),
            "captions": judge(words, wanted, seed, tokens),
            "drawings": drawn,
        }
    return result


def names_of(images: ImageSet) -> set[str]:
    """Names and captions of images."""
    return {words for caption, meta in zip(images.captions, images.meta, strict=True)
            for words in (caption, str(meta.get("name", "")))}  # fmt: skip


def note(what: str) -> None:
    """Say what comes next."""
    print(f"bench seed: {what}", file=sys.stderr, flush=True)


def drawings_grid(images: torch.Tensor, judged_by: Classifier, c: SeedBenchConfig) -> Any:
    """One row a prompt."""
    names = [prompt for prompt, name in PROMPTS if name in judged_by.classes]
    return grid(images, columns=c.seeds, row_labels=names)


def show_captions(
    x: torch.Tensor, wanted: list[str], said: dict[str, list[str]], near: list[str], c: SeedBenchConfig
) -> None:
    """captions.png of the first of `said`, captions.md with all words; both number the images."""
    rows, first = torch.linspace(0, len(x) - 1, min(c.shown, len(x))).long().tolist(), next(iter(said.values()))
    labels = [f"{n}: {first[i][:70]}" for n, i in enumerate(rows, 1)]
    save_png(grid(x[rows], columns=1, row_labels=labels), c.out / "captions.png")
    columns = {**said, "reference": wanted, "nearest training image's": near}
    scores = cider(first, [[w] for w in wanted])
    lines = [f"| | {' | '.join(columns)} | CIDEr of the first |", f"|{'---|' * (len(columns) + 2)}"]
    for n, i in enumerate(rows, 1):
        cells = [words[i].replace("|", "\\|") for words in columns.values()]
        lines.append(f"| {n} | {' | '.join(cells)} | {scores[i]:.2f} |")
    write_atomic(c.out / "captions.md", "\n".join(lines) + "\n")


def run(c: SeedBenchConfig) -> dict[str, Any]:
    """Measure all; writes result.json too."""
    result = measure(c)
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The figures for people, each beside what is asked of it where something is."""
    r, captions, drawn = result["retrieval"], result["captions"], next(iter(result["drawings"].values()))
    recon = result["reconstruction"]
    lines = [
        f"{result['images']} held-out images",
        f"captions retrieved from codes: top-5 of {r['of']} {r['caption_top5']:.1%} (asked 30 %, chance "
        f"{r['chance_top5']:.1%}), top-1 {r['caption_top1']:.1%}; before quantisation, top-5 "
        f"{r['caption_top5_before_quantisation']:.1%}",
        f"images retrieved by caption: top-5 {r['image_top5']:.1%}, top-1 {r['image_top1']:.1%}",
        f"drawn from their codes: {recon['right_class']:.1%} in the right class (originals "
        f"{result['classifier']['heldout_accuracy']:.1%}); own original among the 5 nearest "
        f"{recon['own_original_top5']:.1%}",
        f"{drawn['prompts']} prompts drawn: {drawn['right_class']:.1%} in the right class (asked 50 %), right caption "
        f"over another {drawn['right_caption_over_others']:.1%} (asked 80 %); not chosen among candidates "
        f"{drawn['not_chosen']['right_class']:.1%} and {drawn['not_chosen']['right_caption_over_others']:.1%}; "
        f"{drawn['of_training']} prompts are names of training images",
        f"{'captions':<38} {'CIDEr':>7} {'BLEU':>6} {'fit':>7}",
    ]
    rows = [(name.replace("_", " "), row) for name, row in captions.items()]
    rows += [(f"written from {k} codes", row) for k, row in result["codes_shown"].items()]
    rows += [(f"written by {name}", row["captions"]) for name, row in result["over_other_codes"].items()]
    lines += [
        f"  {name[:36]:<36} {row['cider']:>7.3f} {row['bleu']:>6.1f} {row['fits_its_image_over_others']:>7.1%}"
        for name, row in rows
    ]
    for name, row in result["over_other_codes"].items():
        d = row["drawings"]
        lines.append(
            f"{name}, over {row['tokens']}: {d['right_class']:.1%} in the right class, right caption "
            f"{d['right_caption_over_others']:.1%}, {d['seconds_an_image']:.2f} s an image against "
            f"{drawn['seconds_an_image']:.2f}"
        )
    return "\n".join(lines)
