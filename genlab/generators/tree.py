"""Reading a tree of drafts in one forward: what `CausalLM.predict_tree` and the other generators' fallback share.

A tree hangs behind each row's end: node i of row b holds an event, its parent is an earlier node, or -1, the row's end.
Nodes see the row, their ancestors and themselves, as in SpecInfer's tree attention (Miao et al., arXiv 2305.09781).
Their keys and values stay outside the cache until a path is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from genlab.distributions import Categorical

if TYPE_CHECKING:
    from .base import Generator
    from .causal import CausalLM, CausalState


def paths(parent_BN: torch.Tensor) -> torch.Tensor:
    """The nodes from the row's end to each node, itself last, padded with -1: (B, N, D), D the depth.

    Raises:
        ValueError: if a parent doesn't come before its child.
    """
    B, N = parent_BN.shape
    own = torch.arange(N, device=parent_BN.device)
    if bool((parent_BN >= own).any()):
        raise ValueError("a tree's nodes must come behind their parents")
    up, steps = own.expand(B, N), []
    while N and bool((up >= 0).any()):
        steps.append(up)
        up = torch.where(up >= 0, parent_BN.gather(1, up.clamp(min=0)), -1)
    if not steps:
        return parent_BN.new_empty(B, N, 0)
    back = torch.stack(steps[::-1], -1)  # flush right: -1 in front; turn each to the left
    depth = (back >= 0).sum(-1, keepdim=True)
    at = torch.arange(back.shape[-1], device=back.device) + back.shape[-1] - depth
    return torch.where(at < back.shape[-1], back.gather(-1, at.clamp(max=back.shape[-1] - 1)), -1)


def predict_each(generator: Generator, state: Any, ids_BNK: torch.Tensor, parent_BN: torch.Tensor) -> Categorical:
    """The distributions behind each row's end and behind each node, by a `predict_many` for every node."""
    path = paths(parent_BN)
    rows = torch.arange(len(ids_BNK), device=ids_BNK.device)
    parts = [generator.predict_many(state, [])[0].logits_BGKV]  # type: ignore[attr-defined]
    for nodes_BD in path.unbind(1):
        depth = (nodes_BD >= 0).sum(1)
        drafts = [ids_BNK[rows, i.clamp(min=0)][:, None] for i in nodes_BD[:, : int(depth.max())].unbind(1)]
        dists = torch.cat([d.logits_BGKV for d in generator.predict_many(state, drafts)], 1)  # type: ignore[attr-defined]
        parts.append(dists[rows, depth][:, None])
    return Categorical(torch.cat(parts, 1))


def read_tree(
    model: CausalLM, state: CausalState, ids_BNK: torch.Tensor, parent_BN: torch.Tensor
) -> tuple[Categorical, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The same in one masked forward; also each layer's keys and values of the nodes (R, H, N, d)."""
    P, L, cache, device = model.prefix, model.n_groups, state.cache, ids_BNK.device
    assert cache is not None
    (B, N), n, path = parent_BN.shape, state.n, paths(parent_BN)
    depth_BN = (path >= 0).sum(-1)
    n_B1 = torch.tensor(n, device=device)[:, None]
    place_BN = (torch.cat([n_B1, n_B1 + depth_BN], 1)).clamp(max=L - 1)  # what root and nodes predict
    scales = torch.tensor([[state.guidance.at(model.progress(g)) for g in row] for row in place_BN.tolist()])
    halves = 2 if bool((scales != 1).any()) else 1
    R, rows = B * halves, slice(0, B * halves)
    # the trunk: what rows lack of their own, the last position at least (its output predicts the root's place)
    ends = [P + min(m, L - 1) for m in n] * halves
    lack = [min(held, end - 1) for held, end in zip(cache.lengths, ends, strict=False)]
    T = max(end - m for m, end in zip(lack, ends, strict=True))
    begin = [max(0, end - T) for end in ends]
    top, end_R1 = max(begin) + T, torch.tensor(ends, device=device)[:, None]
    trunk_RT = torch.tensor(begin, device=device)[:, None] + torch.arange(T, device=device)
    node_RN = (P + n_B1 + depth_BN - 1).clamp(max=P + L - 1).repeat(halves, 1)
    seen = None if state.seen_RP is None else state.seen_RP[rows]
    at_RX = torch.cat([trunk_RT, node_RN], 1)
    mask = model.visible(at_RX, top, seen)
    mask[:, :, T:] &= (torch.arange(top, device=device) < end_R1)[:, None, None]
    family = torch.zeros(B, N, N + 1, dtype=torch.bool, device=device).scatter(2, path.where(path >= 0, N), True)
    family_RTN = torch.cat([family.new_zeros(R, T, N), family[..., :N].repeat(halves, 1, 1)], 1)
    mask = torch.cat([mask, family_RTN[:, None]], -1)
    x = torch.cat([
        model._inputs(state, trunk_RT, R, min(begin) < P),
        model.embed(ids_BNK).repeat(halves, 1, 1),
    ], 1)  # fmt: skip
    cache.crop(begin + cache.lengths[R:])
    fresh: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(layer: int) -> Any:
        def put(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            fresh.append((k[:, :, T:], v[:, :, T:]))
            held = cache.put(layer, k[:, :, :T], v[:, :, :T], rows)
            return torch.cat([held[0], k[:, :, T:]], 2), torch.cat([held[1], v[:, :, T:]], 2)

        return put

    h = model.run(x, state.beside, at_RX, mask, causal=False, keep=keep)
    cache.advance(T, rows)
    cache.crop(ends + cache.lengths[R:])
    state.calls += 1
    state.rows_computed += R
    root = (end_R1 - 1 - trunk_RT[:, :1])[..., None].expand(-1, -1, h.shape[-1])
    logits = model.heads(torch.cat([h.gather(1, root), h[:, T:]], 1))
    if halves == 2:
        cond, free = logits.chunk(2)
        s = scales.to(logits)[..., None, None]
        logits = cond + (s - 1) * (cond - free)
    ticket = state.ticket
    return Categorical(logits, check=lambda: state.check(ticket)), fresh


def keep_path(model: CausalLM, state: CausalState, path_BD: torch.Tensor) -> None:
    """Put a path a row, nodes (B, D) and -1 behind its end, where `predict_many` would have put it as drafts."""
    cache = state.cache
    assert cache is not None
    assert state.tree is not None
    ids_BNK, fresh = state.tree
    state.tree, R = None, len(fresh[0][0])
    held = [model.prefix + min(n, model.n_groups - 1) for n in state.n] * (R // len(path_BD))
    if cache.lengths[:R] != held:
        raise ValueError("a path can be kept only right behind the predict_tree that read it")
    b, d = (path_BD >= 0).nonzero(as_tuple=True)
    state.ids_BLK[b, torch.tensor(state.n, device=b.device)[b] + d] = ids_BNK[b, path_BD[b, d]]
    rows_RD = path_BD.repeat(R // len(path_BD), 1)
    b, d = (rows_RD >= 0).nonzero(as_tuple=True)
    node, at = rows_RD[b, d], torch.tensor(held, device=b.device)[b] + d
    for layer, (k, v) in enumerate(fresh):
        cache.k[layer][b, :, at], cache.v[layer][b, :, at] = k[b, :, node], v[b, :, node]
    longer = (rows_RD >= 0).sum(1).tolist()
    cache.lengths = [m + t for m, t in zip(held, longer, strict=True)] + cache.lengths[R:]
