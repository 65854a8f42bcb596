"""Where a causal generator over a raster of ids looks, and how much it gains from there.

Attention says where the mass goes; `context_gain` says what it is worth: the rise in nats a token when the near or
the far context is replaced by another image's. A place is near where it is at most `RADIUS` rows and columns away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from genlab.generators.causal import CausalLM
from genlab.nn.attention import turn

RADIUS = 2


def distances(grid: tuple[int, int], norm: Literal["euclidean", "steps"]) -> torch.Tensor:
    """Between all places of a map, (L, L), in places: straight, or the larger of rows and columns."""
    at = torch.arange(grid[0] * grid[1])
    rows, columns = at // grid[1], at % grid[1]
    dy, dx = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    return torch.hypot(dy.double(), dx.double()) if norm == "euclidean" else torch.maximum(dy, dx)


@torch.no_grad()
def attention_layers(model: CausalLM, ids_BLK: torch.Tensor, labels_B: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each layer's attention (B, heads, L, P + L - 1) of the positions that predict the L places, in evaluation."""
    kept: list[torch.Tensor] = []
    hooks = [
        layer.get_submodule("wqkv").register_forward_hook(lambda _, __, out: kept.append(out))
        for layer in model.gpt.layers
    ]
    try:
        model.logits(ids_BLK[:, :-1], labels_B)
    finally:
        for hook in hooks:
            hook.remove()
    P, H = model.prefix, model.config.heads
    for qkv in kept:
        q, k, _ = qkv.unflatten(-1, (3, H, -1)).unbind(2)
        rope = model.gpt._rope[: q.shape[1], None, :]
        q, k = (turn(x, rope).transpose(1, 2) for x in (q, k))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        yield scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, :, P - 1 :]


@torch.no_grad()
def attention_locality(model: CausalLM, ids_BLK: torch.Tensor, labels_B: torch.Tensor) -> list[dict[str, Any]]:
    """One row a layer: mean distance of the attended places, and the share of the attention on near ones.

    Measured from the place that is predicted, over the mass that falls on places (the condition's share stands
    apart), averaged over heads, over places from the second on, and over images. `uniform_…` is what even attention
    to all earlier places would give.
    """
    P, grid = model.prefix, model.config.grid
    far = distances(grid, "euclidean")[1:, :-1].float()
    near = (distances(grid, "steps")[1:, :-1] <= RADIUS).float()
    before = torch.ones_like(far).tril()
    even = before / before.sum(-1, keepdim=True)
    rows = []
    for mass in attention_layers(model, ids_BLK, labels_B):
        on_places = mass[:, :, 1:, P:]
        total = on_places.sum(-1)
        share = on_places / total[..., None].clamp_min(1e-12)
        distance_B, near_B = ((share * x).sum(-1).mean((1, 2)) for x in (far, near))
        rows.append(
            {
                "distance": mean_error(distance_B),
                "near": mean_error(near_B),
                "condition": float(1 - total.mean()),
                "uniform_distance": float((even * far).sum(-1).mean()),
                "uniform_near": float((even * near).sum(-1).mean()),
            }
        )
    return rows


def mean_error(x_N: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    x = x_N.double()
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")


@torch.no_grad()
def nats(model: CausalLM, ids_BLK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Nats of each place given those before it, (B, L), sub-tokens summed."""
    logits = model.logits(ids_BLK[:, :-1], labels_B)
    return F.cross_entropy(logits.flatten(0, 2), ids_BLK.flatten(), reduction="none").view(ids_BLK.shape).sum(-1)


@torch.no_grad()
def context_gain(
    model: CausalLM, ids_BLK: torch.Tensor, labels_B: torch.Tensor, places: int = 16
) -> dict[str, torch.Tensor]:
    """Nats a place that the `near` and the `far` context save: with it, against with that of the next image, (B,).

    Args:
        model: causal, over a raster.
        ids_BLK: at least two images; each borrows from the one before it.
        labels_B: their classes, which stay.
        places: how many places are measured, spread over the map.
    """
    L = ids_BLK.shape[1]
    other, close = ids_BLK.roll(1, 0), distances(model.config.grid, "steps") <= RADIUS
    truth_BL = nats(model, ids_BLK, labels_B)
    golden = (5**0.5 - 1) / 2  # even steps would stay in a few columns
    chosen = sorted({1 + int((i * golden) % 1 * (L - 1)) for i in range(places)})
    gains: dict[str, list[torch.Tensor]] = {"near": [], "far": []}
    for g in chosen:
        for which, swapped in (("near", close[g]), ("far", ~close[g])):
            mixed = torch.where(swapped[:, None], other, ids_BLK)
            mixed[:, g:] = ids_BLK[:, g:]
            logits = model.logits(mixed[:, :g], labels_B)[:, -1]
            cost = F.cross_entropy(logits.flatten(0, 1), ids_BLK[:, g].flatten(), reduction="none")
            gains[which].append(cost.view(len(ids_BLK), -1).sum(-1) - truth_BL[:, g])
    return {which: torch.stack(parts).double().mean(0) for which, parts in gains.items()}
