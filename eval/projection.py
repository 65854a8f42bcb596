"""What fewer calls of a diffusion head would save at the published sizes.

The heads that ship are so small that what a call costs besides its products decides. So the calls that a bench
counted are priced with the measured calls of heads of MAR's published sizes (Li et al., arXiv 2406.11838), random
weights: a plain step evaluates one point a row, a verification the window's drafts and the point before them.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from genlab.nn.diffusion_head import DiffusionHead

SIZES = {"MAR-B": (768, 1024, 6), "MAR-L": (1024, 1280, 8)}
"""Width of the transformer, width and depth of the head."""


def head_seconds(head: DiffusionHead, points: int, rows: int, repeats: int = 5) -> float:
    """Seconds of an evaluation at so many points of so many rows (guided: two an image): the fastest of some."""
    width = head.cond_embed.out_features
    weight = head.input_proj.weight
    x, condition = weight.new_zeros(rows, points, head.channels), weight.new_zeros(rows, 1, width)
    t = torch.zeros(rows, points, dtype=torch.long, device=weight.device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            begin = time.perf_counter()
            head(x, t, condition)
            if weight.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
    return best


def project(rows: list[dict[str, Any]], head_rows: int, sizes: dict[str, tuple[int, int, int]] = SIZES) -> None:
    """Give each speculating row `projected`: how many times less the head would take, by size.

    Args:
        rows: of the bench, the plain one first; those with a `window` and fewer head calls are speculating.
        head_rows: rows of a head's call, guided ones twice.
        sizes: names to (condition, width, depth).
    """
    speculating = [r for r in rows if r.get("head_calls") and r["settings"].get("window")]
    if not rows[0].get("head_calls") or not speculating:
        return
    for name, (condition, width, depth) in sizes.items():
        head = DiffusionHead(16, condition, width, depth).eval()
        price = {n: head_seconds(head, n, head_rows) for n in {1, *(r["settings"]["window"] + 1 for r in speculating)}}
        for row in speculating:
            saved = rows[0]["head_calls"] * price[1] / (row["head_calls"] * price[row["settings"]["window"] + 1])
            row.setdefault("projected", {})[name] = saved
