"""How much of its vocabulary a tokenizer uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from genlab.tokens import Tokens


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy (nats) of the codes' frequencies: codes, if all were used equally. Scalar."""
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp()


def whole_codes(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Sub-token ids (..., k), first one most significant, as one id (...) below vocab^k.

    Raises:
        ValueError: if vocab^k doesn't fit into 62 bits.
    """
    k = ids.shape[-1]
    if vocab**k > 2**62:
        raise ValueError(f"{k} sub-tokens of {vocab} codes don't fit into one 62-bit id")
    place = torch.tensor([vocab ** (k - 1 - i) for i in range(k)], device=ids.device)
    return (ids.long() * place).sum(-1)


def codebook_usage(batches: Iterable[Tokens]) -> dict[str, float]:
    """Usage of the codebook over all tokens of a set of images.

    Args:
        batches: tokens of one spec; the sub-tokens of a binary code count as one code of k d bits, the depths
            of residual tokens count apart and are averaged.

    Returns:
        `codes`, how many there could be; `used`, how many occur; `usage`, their share, 0 … 1; `perplexity`,
        1 … codes.

    Raises:
        ValueError: for continuous tokens, or none at all.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    codes = 0
    for tokens in batches:
        spec = tokens.spec
        if spec.vocab is None:
            raise ValueError(f"only discrete tokens use a codebook; these are {spec.describe()}")
        if spec.kind == "residual":
            codes, columns = spec.vocab, tokens.values.flatten(0, 1).unbind(-1)
        elif spec.kind == "binary":
            codes, columns = spec.vocab**spec.depth, (whole_codes(tokens.values, spec.vocab).flatten(),)
        else:
            codes, columns = spec.vocab, (tokens.values.flatten(),)
        empty = torch.zeros(0, dtype=torch.long, device=tokens.values.device)
        seen = seen or [(empty, empty)] * len(columns)
        seen = [_merge(known, ids) for known, ids in zip(seen, columns, strict=True)]
    if not codes:
        raise ValueError("no tokens to measure the codebook's usage on")
    used = sum(len(ids) for ids, _ in seen) / len(seen)
    mean = sum(float(perplexity(counts)) for _, counts in seen) / len(seen)
    return {"codes": codes, "used": used, "usage": used / codes, "perplexity": mean}


def _merge(known: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids and their counts, with more ids."""
    new, count = ids.unique(return_counts=True)
    both, where = torch.cat([known[0], new]).unique(return_inverse=True)
    return both, torch.zeros_like(both).index_add_(0, where, torch.cat([known[1], count]))
