"""Images from more and more of their tokens: `--tokens` of `sample` and `reconstruct`, and `genlab bench flextok`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genlab.tokens import Tokens, TokenSpec

from . import shared


def counts_of(text: str, spec: TokenSpec) -> list[int]:
    """Numbers of tokens out of `1,2,4-6` or `all` (the powers of two, and all).

    Raises:
        ValueError: for tokens that aren't ordered, or numbers outside 1 … length.
    """
    if spec.order != "coarse_to_fine":
        raise ValueError(
            f"--tokens keeps an image's first ones, so they must be ordered (a flextok's), not {spec.describe()}"
        )
    if text == "all":
        return sorted({min(2**i, spec.length) for i in range(spec.length.bit_length() + 1)})
    counts = sorted(set(shared.numbers(text)))
    if not 1 <= counts[0] <= counts[-1] <= spec.length:
        raise ValueError(f"--tokens takes 1 to {spec.length} here, got {text}")
    return counts


def decode_counts(
    tokenizer: Any, tokens: Tokens, counts: list[int], seeds: Any, batch_size: int, cut: str = "first"
) -> Any:
    """uint8 images (N, len(counts), 3, H, W): what the first k tokens (or, with cut `first_depths`, depths) give."""
    import torch

    from genlab.pictures import to_uint8

    rows = []
    with torch.inference_mode():
        for i in range(0, len(tokens), batch_size):
            part, part_seeds = tokens[i : i + batch_size], None if seeds is None else seeds[i : i + batch_size]
            columns = [to_uint8(tokenizer.decode(getattr(part, cut)(k), part_seeds)).cpu() for k in counts]
            rows.append(torch.stack(columns, 1))
    return torch.cat(rows)


def draw_refining(
    line: Any,
    sampler: Any,
    conditions: Any,
    seeds: Any,
    labels: list[str],
    counts: list[int],
    batch_size: int,
    zoom: int,
) -> tuple[Any, Any]:
    """A picture of drawings with each number of tokens, one row a condition and seed, one column a count; and what was
    drawn.
    """
    from genlab.pictures import grid

    out = sampler.sample(line.generator, conditions, seeds, batch_size, progress=True)
    images = decode_counts(line.tokenizer, out.tokens, counts, seeds, batch_size)
    title = "tokens: " + ", ".join(map(str, counts))
    return grid(images.flatten(0, 1), columns=len(counts), row_labels=labels, title=title, zoom=zoom), out


def sample_grid(
    c: Any,
    line: Any,
    sampler: Any,
    manifest: dict[str, Any],
    rows: list[Any],
    conditions: Any,
    path: Path,
    manifest_path: Path,
) -> int:
    """Draw one image a class or prompt and seed, and write it with each number of tokens: one column a count."""
    import torch

    from genlab.hub import write_atomic
    from genlab.pictures import save_png

    counts = counts_of(c.tokens, line.tokenizer.spec)
    jobs = [(row, seed) for row in range(len(rows)) for seed in manifest["seeds"]]
    which, seeds = (torch.tensor(column) for column in zip(*jobs, strict=True))
    words = [line.classes[row] if isinstance(row, int) and line.classes else str(row) for row in rows]
    labels = [f"{words[row]}, seed {seed}" for row, seed in jobs]
    picture, out = draw_refining(line, sampler, conditions[which], seeds, labels, counts, c.batch_size, c.zoom)
    save_png(picture, path, {"genlab": json.dumps(manifest["command_config"])})
    kept = None if out.tokens.kept is None else out.tokens.kept.tolist()
    manifest = {**manifest, "columns": counts, "tokens_drawn": kept}
    write_atomic(manifest_path, json.dumps(manifest, indent=2) + "\n")
    if c.json:
        print(json.dumps(manifest, indent=2))
    else:
        print(f"{len(jobs)} images with {', '.join(map(str, counts))} tokens -> {path}; {manifest_path}")
    return 0


def by_tokens(c: Any, tokenizer: Any, images: Any, n: int) -> tuple[dict[str, Any], Any]:
    """Figures of reconstruction by the number of tokens kept, and a grid: the original, then one column a count."""
    import torch

    from genlab.pictures import grid, to_float
    from genlab.tokens import concatenate

    counts = counts_of(c.tokens, tokenizer.spec)
    x = images.batch(torch.arange(n))
    with torch.inference_mode():
        encode = [tokenizer.encode(to_float(part).to(tokenizer.device)) for part in x.split(c.batch_size)]
    y = decode_counts(tokenizer, concatenate(encode), counts, None, c.batch_size)
    psnr, judge = shared.load("eval.reconstruction").psnr, shared.load("eval").evaluate
    figures: dict[str, Any] = {
        "model": c.model,
        "images": n,
        "source": c.images,
        "tokens": tokenizer.spec.describe(),
        **tokenizer.usage(encode),
    }
    for i, k in enumerate(counts):
        figures[f"psnr_{k}_tokens"] = float(psnr(x, y[:, i]).mean())
        if c.fd and n > 1:
            figure = judge(y[:, i], x, reference_is_sample=False).figures[0]
            figures[f"{figure.name}_{k}_tokens"] = figure.value
    picks = torch.linspace(0, n - 1, min(2 * c.rows, n)).long()
    shown = torch.cat([x[picks, None], y[picks]], 1).flatten(0, 1)
    title = "original; tokens: " + ", ".join(map(str, counts))
    return figures, grid(shown, columns=1 + len(counts), title=title, zoom=2)
