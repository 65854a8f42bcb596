"""`genlab bench baseline`: a generator beside a DDPM of the same size, tokens and training time."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from genlab.config import config, load_json, to_dict
from genlab.precision import DtypeName

from . import shared


@config
class BaselineConfig:
    """Train a U-Net DDPM on MODEL's tokens for as much CPU time as MODEL had, and measure both under one protocol.

    Three short probes choose the DDPM's learning rate; a small sweep chooses each model's guidance; then both
    draw as many images as the held-out split has, of its classes, and are compared with the training split, beside
    the held-out images themselves (the floor). Interrupt it at any time: the same command goes on.
    """

    model: str = "xar-cell-emoji64"
    """The generator to compare with."""
    out: Path = Path("runs/baseline")
    """Probes, the DDPM, and result.json."""
    cpu_minutes: float = 0.0
    """Training time; 0 takes what MODEL's checkpoint says it had."""
    probe_minutes: float = 2.0
    """CPU time of each learning-rate probe."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates probed."""
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Guidance scales swept, for both."""
    sweep: int = 256
    """Images a point of the sweep; 0 keeps each model's default guidance."""
    n: int | None = None
    """Images measured; the held-out split's size by default."""
    dtype: DtypeName = "auto"
    """Arithmetic while drawing, for both; `auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    batch_size: int = 64
    """Images a batch while drawing."""
    train_only: bool = False
    """Stop when the DDPM is trained."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Train, measure, print."""
    c = shared.parse(BaselineConfig, argv, prog="genlab bench baseline")
    ddpm = train_baseline(c)
    if c.train_only:
        print(f"trained: {ddpm}")
        return 0
    result = measure(c, ddpm)
    print(json.dumps(result, indent=2) if c.json else describe(result))
    return 0


def train_baseline(c: BaselineConfig) -> Path:
    """Probe learning rates, then train; returns the model's folder."""
    from genlab.hub import locate, read_description, write_atomic

    presets, loop = shared.load("train.presets").PRESETS, shared.load("train.loop")
    trained = read_description(locate(c.model)).get("trained", {})
    minutes = c.cpu_minutes or trained.get("cpu_minutes", 0)
    if not minutes:
        raise ValueError(f"{c.model} does not say how long it trained; give --cpu-minutes")
    base = presets["ddpm_unet-emoji64"]()
    losses: dict[float, float] = {}
    for rate in c.rates:
        out = c.out / f"probe-lr{rate:g}"
        probe = with_rate(base, rate, c.probe_minutes)
        if not (out / "model").is_dir():
            loop.train(probe, out, device="cpu")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tail = lines[-max(1, len(lines) // 4) :]
        losses[rate] = sum(line["loss"] for line in tail) / len(tail)
    best = min(losses, key=losses.__getitem__)
    print(f"learning rates probed (loss): {losses}; taking {best:g}", file=sys.stderr)
    out = c.out / "ddpm"
    if not (out / "model").is_dir():
        loop.train(with_rate(base, best, minutes), out, device="cpu")
    write_atomic(c.out / "probes.json", json.dumps({str(k): v for k, v in losses.items()}) + "\n")
    return out / "model"


def with_rate(base: Any, rate: float, minutes: float) -> Any:
    """The baseline's config at a learning rate and a CPU budget."""
    optim = dataclasses.replace(base.optim, lr=rate)
    return dataclasses.replace(base, optim=optim, cpu_minutes=minutes, sample_every=0)


def measure(c: BaselineConfig, ddpm: Path) -> dict[str, Any]:
    """Floor, baseline and ours under one protocol; written to result.json."""
    import torch

    from genlab.data import open_images
    from genlab.hub import write_atomic
    from genlab.pictures import grid, save_png
    from genlab.precision import torch_dtype

    from .models import load_line
    from .sample import make_sampler

    evaluate = shared.load("eval").evaluate
    neighbours = shared.load("eval.neighbours")
    heldout, train = open_images("emoji", split="heldout"), open_images("emoji", split="train")
    n = min(c.n or len(heldout), len(heldout))
    training_images = train.batch(torch.arange(len(train)))

    def judge(images: Any, label: str, guidance: str, count: int) -> dict[str, Any]:
        result = evaluate(images, "emoji:train", n=count, class_protocol="emoji:heldout", seeds=f"0-{count - 1}",
                          sampler=label, guidance=guidance, reference_is_sample=False)  # fmt: skip
        fd = result.figures[0]
        return {"metric": fd.name, "value": fd.value, "low": fd.low, "high": fd.high, "n": count}

    def nearest(images: torch.Tensor) -> list[float]:
        return neighbours.nearest_quantiles(images, training_images)

    held = heldout.batch(torch.arange(n))
    rows: dict[str, Any] = {
        "held-out images": {**judge(held, "none", "none", n), "nearest_training_image": nearest(held)}
    }
    for name, model in (("baseline", str(ddpm)), ("ours", c.model)):
        line = load_line(model, dtype=torch_dtype(c.dtype))
        labels = line.class_of(heldout.classes, heldout.labels)

        def draw(
            picks: torch.Tensor, scale: float | None, line: Any = line, labels: torch.Tensor = labels
        ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
            sampler = make_sampler(line.generator, "", (), scale)
            images, stats = line.draw(sampler, labels[picks], picks, c.batch_size, progress=True, keep=c.out / "tokens")
            return images, stats, judge(images, sampler.name, str(scale), len(picks))

        picks = torch.linspace(0, n - 1, c.sweep).long()
        sweep = {scale: draw(picks, scale)[2]["value"] for scale in c.guidances if c.sweep}
        best = min(sweep, key=sweep.__getitem__) if sweep else None
        images, stats, judged = draw(torch.arange(n), best)
        rows[name] = {
            **judged,
            "nearest_training_image": nearest(images),
            "model": model,
            "parameters": line.generator.n_params,
            "trained": line.generator.extra.get("trained", {}),
            "guidance": best if best is not None else to_dict(line.generator.default_guidance),
            "sweep": {str(k): v for k, v in sweep.items()},
            "seconds_an_image": stats.seconds / stats.images,
            "model_calls": stats.model_calls,
        }
        save_png(grid(images[torch.linspace(0, n - 1, 64).long()], columns=16), c.out / f"{name}.png")
    result = {
        "config": to_dict(c),
        "versions": shared.versions(),
        "git": shared.git_revision(),
        "probes": load_json(c.out / "probes.json"),
        "rows": rows,
    }
    write_atomic(c.out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def describe(result: dict[str, Any]) -> str:
    """The table for people."""
    columns = ["fd_efficientnet_lite0", "95 % interval", "n", "params", "s/image"]
    head = "".join(f"{c:>{w}}  " for c, w in zip(columns, (24, 20, 5, 8, 8), strict=True))
    lines = [f"{'':<18}{head}nearest training image (1 %, 10 %, 50 %)"]
    for name, row in result["rows"].items():
        parameters = f"{row['parameters'] / 1e6:.1f}M" if "parameters" in row else "-"
        seconds = f"{row['seconds_an_image']:.3f}" if "seconds_an_image" in row else "-"
        near = ", ".join(f"{x:.3f}" for x in row["nearest_training_image"])
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(
            f"{name:<18}{row['value']:>24.3f}  {interval:>20}  {row['n']:>5}  {parameters:>8}  {seconds:>8}  {near}"
        )
    return "\n".join([*lines, "not comparable with published figures: another network, 64x64 emoji, few images"])
