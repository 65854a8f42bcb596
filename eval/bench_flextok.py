"""FlexTok: what each further token buys: `genlab bench flextok --help`.

- Reconstruction of held-out images from their first k tokens: PSNR, similarity of features, Fréchet distance.
- Generation by class with k tokens: Fréchet distance to the training images.
- Tokens needed: the smallest k whose similarity reaches 95 % of that of all tokens, an image at a time, for simple
  things against complex ones. Simple and complex are the outer thirds of a ranking: of images by the size of their PNG
  file; of prompts by their number of words. Prompts are drawn with the text-conditional generator, and similarity is
  to the held-out pictures of that very prompt.
- Usage of the codebook on held-out images, by FSQ channel and by position.
- Decoding a batch of mixed k against one image after the other.

Similarity is the cosine of EfficientNet-Lite0's pooled features: no CLIP, no published figure compares with it. Since
any two emoji resemble each other, it is rescaled so that 0 is the mean similarity of an image to another one's
reconstruction, and 1 is identity.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genlab.config import config, to_dict
from genlab.data import open_images
from genlab.hub import from_pretrained, write_atomic
from genlab.pictures import grid, save_png, to_float, to_pil, to_uint8
from genlab.precision import DtypeName, torch_dtype
from genlab.tokens import Tokens, concatenate, require_fit
from samplers import default_sampler
from tokenizers_img.fsq import describe_usage

from . import references
from .features import EfficientNetLite0
from .harness import evaluate
from .reconstruction import psnr


@config
class FlexTokBenchConfig:
    """Measure a FlexTok, and the generators over its tokens, against the number of tokens kept.

    Writes result.json, curves.png, reconstructions.png and samples.png.
    """

    tokenizer: str = "flextok-d6-emoji64"
    """The FlexTok, a MODEL."""
    generator: str = "flexar-emoji64"
    """A generator by class over its tokens; empty: none."""
    text_generator: str = "flexar-text-emoji64"
    """A generator by caption over its tokens; empty: none."""
    out: Path = Path("runs/bench_flextok")
    """Where the results go."""
    counts: tuple[int, ...] = ()
    """Numbers of tokens; empty: the powers of two, and all."""
    n: int = 512
    """Held-out images, and images drawn by class."""
    prompts: int = 192
    """Held-out prompts drawn."""
    seeds: int = 2
    """Images a prompt."""
    steps: int | None = None
    """Steps of the decoder; None: its own."""
    decoder_guidance: float | None = None
    """Guidance of the decoder; None: its own."""
    dtype: DtypeName = "auto"
    """Arithmetic of decoding; how far a batch is from one by one is measured in float32."""
    share: float = 0.95
    """Of the final similarity that counts as reached."""
    batch_size: int = 32
    """Images a batch."""
    json: bool = False
    """Print JSON."""


def decode(tokenizer: Any, tokens: Tokens, seeds_N: torch.Tensor, c: FlexTokBenchConfig) -> torch.Tensor:
    """uint8 images of tokens, in batches."""
    parts = range(0, len(tokens), c.batch_size)
    options = {"steps": c.steps, "guidance": c.decoder_guidance}
    with torch.inference_mode():
        return torch.cat([
            to_uint8(tokenizer.decode(tokens[i : i + c.batch_size], seeds_N[i : i + c.batch_size], **options)).cpu()
            for i in parts
        ])  # fmt: skip


def unit_features(extractor: EfficientNetLite0, images: torch.Tensor, batch_size: int) -> np.ndarray:
    """Features of uint8 images scaled to length 1, (N, 1280)."""
    x = np.concatenate([extractor(part)["pool"] for part in images.split(batch_size)]).astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def similarity(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """Cosine of each pair, (N,), less what unrelated pairs have: 0 is chance, 1 identity."""
    chance = float((a_ND * np.roll(b_ND, len(b_ND) // 2, 0)).sum(1).mean()) if len(b_ND) > 1 else 0.0
    return ((a_ND * b_ND).sum(1) - chance) / (1 - chance)


def tokens_needed(similarity_KN: np.ndarray, counts: list[int], share: float) -> np.ndarray:
    """For each image the smallest count from which on `share` of its last similarity is reached, (N,)."""
    enough = similarity_KN >= share * similarity_KN[-1]
    lasting = np.flip(np.logical_and.accumulate(np.flip(enough, 0), 0), 0)
    return np.asarray(counts)[lasting.argmax(0)]


def by_complexity(
    similarity_KN: np.ndarray, complexity_N: np.ndarray, counts: list[int], share: float
) -> dict[str, Any]:
    """Tokens needed by the simplest and the most complex third, and the rank correlation over all.

    `low` and `high` bound the difference of the thirds' means (95 %, bootstrap over images); `of_the_mean` is what the
    mean similarity of a third needs, which one image's luck moves less.
    """
    from scipy.stats import spearmanr

    needed, order = tokens_needed(similarity_KN, counts, share), np.argsort(complexity_N, kind="stable")
    third = max(1, len(order) // 3)
    simple, complex_ = order[:third], order[-third:]
    rng = np.random.default_rng(0)
    draws = [needed[rng.choice(complex_, third)].mean() - needed[rng.choice(simple, third)].mean() for _ in range(2000)]
    moves = len(np.unique(needed)) > 1 and len(np.unique(complexity_N)) > 1
    rank, p_value = spearmanr(complexity_N, needed) if moves else (0.0, 1.0)
    out: dict[str, Any] = {"difference": float(needed[complex_].mean() - needed[simple].mean())}
    out |= {"low": float(np.quantile(draws, 0.025)), "high": float(np.quantile(draws, 0.975))}
    out |= {"rank_correlation": float(rank), "p_value": float(p_value)}
    for name, rows in (("simple", simple), ("complex", complex_)):
        out[name] = {
            "n": third,
            "complexity": [float(complexity_N[rows].min()), float(complexity_N[rows].max())],
            "tokens_needed": float(needed[rows].mean()),
            "median": float(np.median(needed[rows])),
            "of_the_mean": int(tokens_needed(similarity_KN[:, rows].mean(1, keepdims=True), counts, share)[0]),
            "similarity": similarity_KN[:, rows].mean(1).tolist(),
        }
    return out


def reconstruct(
    c: FlexTokBenchConfig, tokenizer: Any, painter: Any, extractor: Any, counts: list[int]
) -> dict[str, Any]:
    """Held-out images from their first k tokens."""
    heldout = open_images("emoji", split="heldout", size=tokenizer.config.image_size)
    picks = torch.linspace(0, len(heldout) - 1, min(c.n, len(heldout))).long()
    x = heldout.batch(picks)
    with torch.inference_mode():
        tokens = concatenate([tokenizer.encode(to_float(part)) for part in x.split(c.batch_size)])
    seeds, real = torch.arange(len(x)), unit_features(extractor, x, c.batch_size)
    rows, alike, shown = [], [], [x[:8]]
    for k in counts:
        y = decode(painter, tokens.first(k), seeds, c)
        alike.append(similarity(unit_features(extractor, y, c.batch_size), real))
        figure = evaluate(y, x, reference_is_sample=False).figures[0]
        db = psnr(x, y)
        rows.append({
            "tokens": k,
            "psnr": float(db.mean()),
            "psnr_error": float(db.std() / len(db) ** 0.5),
            "similarity": float(alike[-1].mean()),
            figure.name: figure.value,
            "fd_low": figure.low,
            "fd_high": figure.high,
        })  # fmt: skip
        shown.append(y[:8])
        print(json.dumps(rows[-1]), file=sys.stderr)
    # a picture's complexity: the bytes of its PNG
    sizes = []
    for image in x:
        to_pil(image).save(buffer := io.BytesIO(), format="PNG")
        sizes.append(len(buffer.getvalue()))
    labels = ["original", *(f"{k} tokens" for k in counts)]
    save_png(grid(torch.cat(shown), row_labels=labels), c.out / "reconstructions.png")
    return {
        "images": len(x),
        "rows": rows,
        "tokens_needed": by_complexity(np.stack(alike), np.asarray(sizes, float), counts, c.share),
        "usage": tokenizer.usage([tokens]),
        "speed": speed(tokenizer, painter, tokens, c),
    }


def speed(
    exact: Any, quick: Any, tokens: Tokens, c: FlexTokBenchConfig, batch: int = 16, rounds: int = 3
) -> dict[str, float]:
    """Seconds of decoding `batch` images with mixed k together and one by one, by the clock and with torch's threads.

    How far apart the images are is measured on the float32 model, `exact`.
    """
    n = min(batch, len(tokens))
    mixed, seeds = tokens[:n].first(torch.arange(n) % tokens.spec.length + 1), torch.arange(n)
    options = {"steps": c.steps, "guidance": c.decoder_guidance}

    def decode(model: Any, size: int) -> torch.Tensor:
        rows = [slice(i, i + size) for i in range(0, n, size)]
        return torch.cat([model.decode(mixed[part], seeds[part], **options) for part in rows])

    best = {"together": float("inf"), "one_by_one": float("inf")}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, size in (("together", n), ("one_by_one", 1)):
                start = time.perf_counter()
                decode(quick, size)
                best[name] = min(best[name], time.perf_counter() - start)
        apart = float((decode(exact, n) - decode(exact, 1)).abs().max())
    ratio = best["one_by_one"] / best["together"]
    return {**best, "batch": n, "threads": torch.get_num_threads(), "ratio": ratio, "largest_difference": apart}


def generate(c: FlexTokBenchConfig, painter: Any, counts: list[int]) -> dict[str, Any]:
    """Held-out classes drawn with k tokens, against the training images."""
    model = from_pretrained(c.generator)
    require_fit(c.tokenizer, painter.spec, c.generator, model.spec)
    labels = open_images("emoji", split="heldout", size=painter.config.image_size).labels
    labels = labels[torch.linspace(0, len(labels) - 1, min(c.n, len(labels))).long()]
    seeds, rows, shown, train = torch.arange(len(labels)), [], [], references.path("emoji-train")
    drawn = default_sampler(model).sample(model, labels, seeds, c.batch_size)
    for k in counts:
        y = decode(painter, drawn.tokens.first(k), seeds, c)
        figure = evaluate(y, train, class_protocol="emoji:heldout", reference_is_sample=False).figures[0]
        rows.append({"tokens": k, figure.name: figure.value, "fd_low": figure.low, "fd_high": figure.high})
        shown.append(y[torch.linspace(0, len(y) - 1, 8).long()])
        print(json.dumps(rows[-1]), file=sys.stderr)
    save_png(grid(torch.cat(shown), row_labels=[f"{k} tokens" for k in counts]), c.out / "samples.png")
    return {"images": len(labels), "rows": rows}


def prompt(c: FlexTokBenchConfig, painter: Any, extractor: Any, counts: list[int]) -> dict[str, Any]:
    """Held-out prompts drawn with k tokens, against the pictures of that prompt."""
    from genlab.text import TextEncoder

    model = from_pretrained(c.text_generator)
    require_fit(c.tokenizer, painter.spec, c.text_generator, model.spec)
    if getattr(model.config, "condition", "class") != "text":
        raise ValueError(f"{c.text_generator} draws by class: --text-generator takes one that draws by text")
    heldout = open_images("emoji", split="heldout", size=painter.config.image_size)
    index = {name: i for i, name in reversed(list(enumerate(heldout.captions)))}  # one picture a prompt
    names = sorted(index, key=lambda name: index[name])
    names = [names[i] for i in torch.linspace(0, len(names) - 1, min(c.prompts, len(names))).long().unique().tolist()]
    encoder = TextEncoder(model.extra.get("text_encoder", "minilm"), length=model.config.text_length)
    text = encoder([name for name in names for _ in range(c.seeds)])
    seeds = torch.arange(len(text))
    drawn = default_sampler(model).sample(model, text, seeds, c.batch_size)
    real = unit_features(extractor, heldout.batch([index[name] for name in names]), c.batch_size)
    real = real.repeat(c.seeds, 0)
    alike = []
    for k in counts:
        y = decode(painter, drawn.tokens.first(k), seeds, c)
        alike.append(similarity(unit_features(extractor, y, c.batch_size), real))
    # the mean over a prompt's seeds: one drawing's similarity says little
    mean_KP = np.stack(alike).reshape(len(counts), len(names), c.seeds).mean(2)
    # the caption starts with the emoji's name; tags follow behind the first comma
    words = np.asarray([len(name.split(",")[0].split()) for name in names], float)
    rows = [{"tokens": k, "similarity": float(s.mean())} for k, s in zip(counts, mean_KP, strict=True)]
    return {
        "prompts": len(names),
        "rows": rows,
        "tokens_needed": by_complexity(mean_KP, words, counts, c.share),
    }


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Every curve over the number of tokens."""
    from matplotlib.figure import Figure

    recon, generated, text = result["reconstruction"], result.get("generation"), result.get("prompts")
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    k = [r["tokens"] for r in recon["rows"]]
    fd = next(name for name in recon["rows"][0] if name.startswith(("fd_eff", "fid")))
    axes[0].errorbar(k, [r["psnr"] for r in recon["rows"]], [2 * r["psnr_error"] for r in recon["rows"]], marker="o")
    axes[0].set(ylabel="PSNR, dB", title="reconstruction")
    for part, name in ((recon, "reconstruction"), (generated, "generation")):
        if part:
            values = [r[fd] for r in part["rows"]]
            spans = [[r[fd] - r["fd_low"] for r in part["rows"]], [r["fd_high"] - r[fd] for r in part["rows"]]]
            axes[1].errorbar(k, values, np.maximum(spans, 0), marker="o", label=name)
    axes[1].set(ylabel=fd, title="Fréchet distance")
    for axis, part, title in ((axes[2], recon, "held-out images"), (axes[3], text, "prompts")):
        needed: dict[str, Any] = part["tokens_needed"] if part else {}
        for name in ("simple", "complex") if part else ():
            said = needed[name]
            axis.plot(k, said["similarity"], marker="o", label=f"{name}: {said['tokens_needed']:.1f} tokens needed")
        axis.set(ylabel="similarity", title=title)
    for axis in axes:
        axis.set(xscale="log", xlabel="tokens", xticks=k, xticklabels=k)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def run(c: FlexTokBenchConfig) -> dict[str, Any]:
    """Measure all; writes result.json and the pictures.

    Raises:
        ValueError: for a tokenizer that isn't a flextok, or counts beyond its tokens.
    """
    tokenizer = from_pretrained(c.tokenizer)
    if tokenizer.kind != "flextok":
        raise ValueError(f"{c.tokenizer} holds a {tokenizer.kind}, this bench measures a flextok")
    n = tokenizer.spec.length
    counts = sorted(set(c.counts)) or sorted({min(2**i, n) for i in range(n.bit_length() + 1)})
    if counts[0] < 1 or counts[-1] > n:
        raise ValueError(f"{c.tokenizer} has 1 to {n} tokens, --counts asks for {counts}")
    extractor, painter = EfficientNetLite0(), from_pretrained(c.tokenizer, dtype=torch_dtype(c.dtype))
    result: dict[str, Any] = {
        "config": to_dict(c),
        "tokens": tokenizer.spec.describe(),
        "reconstruction": reconstruct(c, tokenizer, painter, extractor, counts),
    }
    if c.generator:
        result["generation"] = generate(c, painter, counts)
    if c.text_generator:
        result["prompts"] = prompt(c, painter, extractor, counts)
    draw_curves(result, c.out / "curves.png")
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The figures for people."""
    recon = result["reconstruction"]
    fd = next(name for name in recon["rows"][0] if name.startswith(("fd_eff", "fid")))
    generated = {r["tokens"]: r[fd] for r in result.get("generation", {}).get("rows", [])}
    prompts = {r["tokens"]: r["similarity"] for r in result.get("prompts", {}).get("rows", [])}
    lines = [f"{'tokens':>6}  {'PSNR':>6}  {'similarity':>10}  {'FD':>8}  {'FD drawn':>8}  {'prompts':>8}"]
    for r in recon["rows"]:
        drawn = f"{generated[r['tokens']]:>8.2f}" if r["tokens"] in generated else f"{'-':>8}"
        alike = f"{prompts[r['tokens']]:>8.3f}" if r["tokens"] in prompts else f"{'-':>8}"
        lines.append(f"{r['tokens']:>6}  {r['psnr']:>6.2f}  {r['similarity']:>10.3f}  {r[fd]:>8.2f}  {drawn}  {alike}")
    for name, part in (("images", recon), ("prompts", result.get("prompts"))):
        if part:
            t = part["tokens_needed"]
            lines.append(
                f"{name}: {t['simple']['tokens_needed']:.1f} tokens needed by the simple third, "
                f"{t['complex']['tokens_needed']:.1f} by the complex; difference {t['difference']:.2f} "
                f"[{t['low']:.2f}, {t['high']:.2f}], rank correlation {t['rank_correlation']:.2f}"
            )
    u, s = recon["usage"], recon["speed"]
    lines += [
        f"codes used: {u['usage']:.1%} of {u['codes']}, perplexity {u['perplexity']:.0f}",
        *describe_usage(u),
        f"a batch of {s['batch']:.0f} with mixed k: {s['ratio']:.2f}x as fast as one by one on {s['threads']} threads, "
        f"largest difference {s['largest_difference']:.1e}",
    ]
    return "\n".join(lines)
