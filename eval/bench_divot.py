"""Divot's acceptance figures: `genlab bench divot --help`.

On held-out clips: does the reconstruction move as the original does, and as the tokens say? Decoded from its own
tokens, from another clip's, from those of the clip played backwards (which must give the clip backwards), and beside
them what the autoencoder of the frames alone allows. The mixture head, on a known mixture of three Gaussians, beside a
head that predicts the mean.

With `--lm`, language models over those tokens: captions of the held-out clips beside those of the nearest training clip
(all in captions.md, every third in captions.png), likelihood of the held-out clips' tokens under their captions,
clips drawn for the same captions, and eight fixed prompts drawn as one animated contact sheet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genlab.config import config, to_dict
from genlab.data.clips import open_clips
from genlab.data.video import write_film
from genlab.hub import from_pretrained, write_atomic
from genlab.nn.mixture import mixture_loss, split_mixture
from genlab.pictures import grid, save_png, sheet, to_float, to_uint8
from genlab.tokens import Tokens, concatenate, require_fit
from samplers import default_sampler

from .captions import bleu, cider
from .clips import I3D, frame_features, frechet_of_clips, fvd, motion_correlation, reconstruction
from .features import EfficientNetLite0

PROMPTS = (
    "waving hand", "party popper", "man running: medium-dark skin tone", "whale", "pirate flag", "birthday cake",
    "shooting star", "cow face",
)  # fmt: skip
"""What the contact sheet shows."""


@config
class DivotBenchConfig:
    """Measure a Divot on held-out clips, and the mixture head on a known mixture.

    Writes result.json, clips.webp (originals, reconstructions, backwards, another's tokens) and clips.png; of the first
    language model captions.md, captions.png, prompts.webp and prompts.png.
    """

    tokenizer: str = "divot-emoji64"
    """The Divot, a MODEL; empty: only the mixture head."""
    lm: tuple[str, ...] = ()
    """Language models over its tokens, MODELs, to compare; the first is shown."""
    painter: str = ""
    """Another de-tokenizer for what they draw, a MODEL, e.g. one adapted to drawn tokens."""
    clips: str = "emoji-anim"
    """A source of clips; its training split has the nearest clips."""
    split: str = "heldout"
    """Its split."""
    n: int = 0
    """Clips; 0: all."""
    steps: int | None = None
    """Steps of the de-tokenizer; None: its own."""
    guidance: float | None = None
    """Its guidance; None: its own."""
    batch_size: int = 8
    """Clips a batch."""
    fd: bool = True
    """Also Fréchet distances."""
    i3d: str = ""
    """Also FVD, by this I3D in TorchScript (i3d_torchscript.pt): a program, so take it from where you trust."""
    out: Path = Path("runs/bench_divot")
    """Where the results go."""
    json: bool = False
    """Print JSON."""


def decode(tokenizer: Any, tokens: Tokens, c: DivotBenchConfig) -> torch.Tensor:
    """uint8 clips of tokens, in batches."""
    seeds = torch.arange(len(tokens))
    with torch.inference_mode():
        parts = [
            to_uint8(
                tokenizer.decode(
                    tokens[i : i + c.batch_size], seeds[i : i + c.batch_size], steps=c.steps, guidance=c.guidance
                )
            )
            for i in range(0, len(tokens), c.batch_size)
        ]
    return torch.cat(parts)


def encode(tokenizer: Any, x: torch.Tensor, c: DivotBenchConfig) -> Tokens:
    """Tokens of uint8 clips, in batches."""
    with torch.inference_mode():
        return concatenate([tokenizer.encode(to_float(part)) for part in x.split(c.batch_size)])


def held_out(c: DivotBenchConfig, tokenizer: Any) -> dict[str, Any]:
    """Held-out clips from their own tokens, another's, and those of the clip backwards."""
    t = tokenizer.config
    images = open_clips(c.clips, c.split, t.image_size, t.frames, t.fps)  # type: ignore[arg-type]
    n = min(c.n or len(images), len(images))
    x = images.batch(torch.linspace(0, len(images) - 1, n).long())
    tokens, reverse = encode(tokenizer, x, c), encode(tokenizer, x.flip(1), c)
    y, backwards = decode(tokenizer, tokens, c), decode(tokenizer, reverse, c)
    # another clip's tokens: half the set away, where a subject's variants don't lie
    other = torch.roll(torch.arange(n), n // 2)
    with torch.inference_mode():
        latents = [tokenizer.latents_of(to_float(part)) for part in x.split(c.batch_size)]
        raster = torch.cat(latents).flatten(0, 1)
        frames = [tokenizer.vae.decode(Tokens(part, tokenizer.vae.spec)) for part in raster.split(64)]
    ceiling = to_uint8(torch.cat(frames)).unflatten(0, (n, -1))
    extractor = EfficientNetLite0() if c.fd else None
    change = (tokens.values - reverse.values).norm(dim=(1, 2)) / tokens.values.norm(dim=(1, 2))
    mean = lambda v: float(torch.tensor(v).nanmean())  # noqa: E731
    rows = slice(0, min(8, n))
    shown = torch.stack([x[rows], y[rows], backwards[rows], y[other][rows]])
    labels = ["original", "decoded", "backwards", "another's"]
    write_film(
        sheet(shown.flatten(0, 1), columns=shown.shape[1], row_labels=labels, zoom=2), c.out / "clips.webp", t.fps
    )
    own = reconstruction(x, y, extractor)
    if c.i3d:
        own["fvd"] = fvd(I3D(c.i3d), x, y)
    few = torch.stack([x[:4], y[:4], backwards[:4]], 1).flatten(0, 2)
    save_png(grid(few, columns=t.frames, row_labels=labels[:3] * 4), c.out / "clips.png")
    return {
        "clips": n,
        "own_tokens": own,
        "autoencoder_alone": reconstruction(x, ceiling, extractor),
        "another_clips_tokens": {"motion_correlation": mean(motion_correlation(x, y[other]))},
        "reversed": {
            "relative_change_of_tokens": float(change.mean()),
            "motion_correlation_with_the_clip_backwards": mean(motion_correlation(x.flip(1), backwards)),
            "motion_correlation_with_the_clip": mean(motion_correlation(x, backwards)),
        },
    }


def language(c: DivotBenchConfig, tokenizer: Any) -> dict[str, Any]:
    """The language models' figures on held-out clips; of the first, words and pictures."""
    t = tokenizer.config
    open_split = lambda split: open_clips(c.clips, split, t.image_size, t.frames, t.fps)  # noqa: E731
    held, train = open_split(c.split), open_split("train")
    n = min(c.n or len(held), len(held))
    rows = torch.linspace(0, len(held) - 1, n).long()
    x, wanted = held.batch(rows), [held.captions[i] for i in rows.tolist()]
    tokens, painter = encode(tokenizer, x, c), from_pretrained(c.painter) if c.painter else tokenizer
    extractor = EfficientNetLite0()
    seen = [
        F.normalize(torch.from_numpy(frame_features(extractor, clips).mean(1)), dim=1)
        for clips in (x, train.batch(range(len(train))))
    ]
    near = [train.captions[i] for i in (seen[0] @ seen[1].T).argmax(1).tolist()]
    result: dict[str, Any] = {"nearest_training_clip": judge(near, wanted)}
    for i, name in enumerate(c.lm):
        model = from_pretrained(name)
        if model.kind != "divot_lm":
            raise ValueError(f"{name} holds a {model.kind}: --lm takes a divot_lm")
        require_fit(c.tokenizer, tokenizer.spec, name, model.spec)
        said = model.describe(tokens)
        result[name] = judge(said, wanted) | {"heldout_nats_a_channel": likelihood(model, wanted, tokens, c)}
        if c.fd or c.i3d:
            drawn = draw(model, painter, wanted, c)
            result[name] |= frechet_of_clips(extractor, x, drawn) if c.fd else {}
            result[name] |= {"fvd": fvd(I3D(c.i3d), x, drawn)} if c.i3d else {}
        if i == 0:
            known = {words for caption in train.captions for words in (caption, caption.split(",")[0])}
            result[name]["prompts_of_training"] = sum(p in known for p in PROMPTS)
            clips = draw(model, painter, PROMPTS, c)
            frames = sheet(clips, columns=4, zoom=2)
            write_film(frames, c.out / "prompts.webp", t.fps)
            save_png(grid(clips.flatten(0, 1), columns=t.frames, row_labels=PROMPTS), c.out / "prompts.png")
            show_captions(x, wanted, said, near, c)
    return result


def judge(captions: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """CIDEr (mean) and BLEU."""
    references = [[words] for words in wanted]
    return {"cider": float(cider(captions, references).mean()), "bleu": bleu(captions, references)}


def likelihood(model: Any, captions: Sequence[str], tokens: Tokens, c: DivotBenchConfig) -> float | None:
    """Nats a channel of clips' tokens under their captions; None where the head has no density."""
    if model.config.head == "diffusion":
        return None
    nats = []
    with torch.inference_mode():
        for i in range(0, len(tokens), c.batch_size):
            part = slice(i, i + c.batch_size)
            nats.append(-model.log_prob(model.read_captions(captions[part]), tokens.values[part]).flatten())
    return float(torch.cat(nats).mean()) / model.config.dim


def draw(model: Any, painter: Any, captions: Sequence[str], c: DivotBenchConfig) -> torch.Tensor:
    """uint8 clips drawn for captions; clip i by seed i."""
    seeds = torch.arange(len(captions))
    drawn = default_sampler(model).sample(model, model.read_captions(captions), seeds, c.batch_size)
    return decode(painter, drawn.tokens, c)


def show_captions(
    x: torch.Tensor, wanted: Sequence[str], said: Sequence[str], near: Sequence[str], c: DivotBenchConfig
) -> None:
    """captions.md, all of them; captions.png, every third with four of its frames."""
    cell = lambda words: words.replace("|", "\\|")  # noqa: E731
    lines = ["| | written | reference | nearest training clip's |", "|---|---|---|---|"]
    lines += [
        f"| {i} | {cell(a)} | {cell(b)} | {cell(d)} |"
        for i, (a, b, d) in enumerate(zip(said, wanted, near, strict=True), 1)
    ]
    write_atomic(c.out / "captions.md", "\n".join(lines) + "\n")
    rows = range(0, len(x), 3)
    frames = torch.linspace(0, x.shape[1] - 1, 4).long()
    shown = x[list(rows)][:, frames].flatten(0, 1)
    save_png(grid(shown, columns=4, row_labels=[f"{i + 1}: {said[i][:60]}" for i in rows]), c.out / "captions.png")


def mixture(steps: int = 400, n: int = 4096) -> dict[str, Any]:
    """A mixture head and a mean head, trained on draws of a known mixture of three Gaussians in four dimensions.

    The mean head's likelihood is that of one Gaussian about it with the best spread a channel, which favours it.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.5, 0.3, 0.2])
    means = torch.tensor([[2.0, 0.0, 1.0, -2.0], [-2.0, 1.5, -1.0, 1.0], [0.5, -2.5, 3.0, 2.5]])

    def draw() -> torch.Tensor:
        k = torch.multinomial(weights, n, True, generator=generator)
        return means[k] + 0.4 * torch.randn(n, 4, generator=generator)

    train, test, C = draw(), draw(), 4
    best: tuple[float, torch.Tensor] | None = None
    for _start in range(4):  # as with any mixture: of a few starts, the best on the training draws
        head = nn.Parameter(torch.cat([torch.randn(3 * C, generator=generator), torch.zeros(3 * C + 3)]))
        optimizer = torch.optim.Adam([head], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = mixture_loss(head.expand(n, 1, -1), train[:, None], 3)
            loss.backward()
            optimizer.step()
        if best is None or float(loss.detach()) < best[0]:
            best = float(loss.detach()), head.detach().clone()
    assert best is not None
    found, _, logits = split_mixture(best[1][None, None], 3)
    found, share = found[0, 0], logits.softmax(-1)[0, 0]
    nearest = torch.cdist(means, found).argmin(1)
    spread = (train - train.mean(0)).square().mean(0)
    gaussian = 0.5 * ((test - train.mean(0)).square() / spread + spread.log() + math.log(2 * math.pi)).mean()
    return {
        "means_error_of_their_size": float((found[nearest] - means).norm() / means.norm()),
        "weights_error": float((share[nearest] - weights).abs().max()),
        "every_component_found": len(set(nearest.tolist())) == 3,
        "heldout_nats_a_channel": float(mixture_loss(best[1].expand(n, 1, -1), test[:, None], 3)),
        "heldout_nats_a_channel_mse": float(gaussian),
        "mse_of_the_mean": float(F.mse_loss(train.mean(0).expand_as(test), test)),
    }


def run(c: DivotBenchConfig) -> dict[str, Any]:
    """Measure; writes result.json and the clips.

    Raises:
        ValueError: for a tokenizer that isn't a divot with a de-tokenizer.
    """
    result: dict[str, Any] = {"config": to_dict(c), "mixture": mixture()}
    if c.tokenizer:
        tokenizer = from_pretrained(c.tokenizer)
        if tokenizer.kind != "divot" or not tokenizer.config.draws:
            raise ValueError(f"{c.tokenizer} is no divot with a de-tokenizer: this bench measures one")
        result["heldout"] = held_out(c, tokenizer)
        if c.lm:
            result["language"] = language(c, tokenizer)
    write_atomic(c.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The figures for people, beside what is asked of them."""
    lines = []
    if held := result.get("heldout"):
        own, alone, back = held["own_tokens"], held["autoencoder_alone"], held["reversed"]
        lines += [
            f"{held['clips']} clips",
            f"motion correlation, own tokens        {own['motion_correlation']:.3f} "
            f"± {own['motion_correlation_error']:.3f} (wanted: at least 0.5)",
            f"motion correlation, another's tokens  {held['another_clips_tokens']['motion_correlation']:.3f} "
            "(wanted: at most 0.1)",
            f"motion correlation, autoencoder alone {alone['motion_correlation']:.3f}",
            f"backwards: tokens change by           {back['relative_change_of_tokens']:.3f} of their size",
            f"  correlation with the clip backwards {back['motion_correlation_with_the_clip_backwards']:.3f}, "
            f"with the clip {back['motion_correlation_with_the_clip']:.3f}",
            f"PSNR {own['psnr']:.2f} dB (autoencoder alone {alone['psnr']:.2f} dB)",
            *(f"{k} {v:.2f}" for k, v in own.items() if k.startswith(("fd_", "fvd"))),
        ]
    if language := result.get("language"):
        lines.append(
            f"{'language models, held-out clips':<40} {'CIDEr':>6} {'BLEU':>5} {'nats':>7} {'frames':>8} {'motion':>8}"
        )
        for name, row in language.items():
            fd = [row.get(f"fd_{what}_efficientnet_lite0") for what in ("frames", "motion")]
            nats = row.get("heldout_nats_a_channel")
            lines.append(
                f"  {name.replace('_', ' ') if name.startswith('nearest') else name:<38} {row['cider']:>6.3f} "
                f"{row['bleu']:>5.1f} {'-' if nats is None else f'{nats:.3f}':>7} "
                + " ".join(f"{'-' if v is None else f'{v:.1f}':>8}" for v in fd)
                + (f"  fvd {row['fvd']:.1f}" if "fvd" in row else "")
            )
        lines.append(
            "nats: of a channel of a held-out clip's token under its caption; frames, motion: Fréchet distances"
        )
    m = result["mixture"]
    lines.append(
        f"mixture head: means off by {m['means_error_of_their_size']:.3f} of their size (wanted: at most 0.05), "
        f"weights by {m['weights_error']:.3f} (at most 0.05), {m['heldout_nats_a_channel']:.3f} nats a channel held "
        f"out against {m['heldout_nats_a_channel_mse']:.3f} of a mean head"
    )
    return "\n".join(lines)
