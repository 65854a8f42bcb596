"""Retrieval between two aligned sets of vectors, and the right partner against a random one."""

from __future__ import annotations

import torch


def ranks(queries_ND: torch.Tensor, answers_ND: torch.Tensor) -> torch.Tensor:
    """For each query, how many answers lie nearer (by cosine) than its own, row for row: 0 is the best, (N,).

    Equals count half, so that answers which are all the same are no success.

    Raises:
        ValueError: for sets that aren't aligned.
    """
    if queries_ND.shape != answers_ND.shape or queries_ND.ndim != 2:
        raise ValueError(f"need two (N, D) of one shape, got {tuple(queries_ND.shape)} and {tuple(answers_ND.shape)}")
    q, a = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries_ND, answers_ND))
    likeness = q @ a.T
    own = likeness.diag()[:, None]
    same = torch.isclose(likeness, own, rtol=0, atol=1e-9)
    return ((likeness > own) & ~same).sum(1) + (same.sum(1) - 1) / 2


def top_k(queries_ND: torch.Tensor, answers_ND: torch.Tensor, k: int) -> float:
    """Share of queries whose own answer is among the k nearest."""
    return float((ranks(queries_ND, answers_ND) < k).double().mean())


def beats_random(queries_ND: torch.Tensor, answers_ND: torch.Tensor) -> float:
    """Share of (query, other answer) pairs where the own answer is nearer: all others, so nothing is drawn; equals
    count half.

    Raises:
        ValueError: for fewer than two rows.
    """
    if len(queries_ND) < 2:
        raise ValueError(f"a random other needs two rows at least, got {len(queries_ND)}")
    return float(1 - ranks(queries_ND, answers_ND).double().mean() / (len(queries_ND) - 1))
