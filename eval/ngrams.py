"""How random a stream of tokens is: n-gram entropies on held-out tokens, with intervals.

Everything is a code length on documents that the counts have not seen, so a large vocabulary with few tokens does
not look predictable. Smoothing is interpolated Witten-Bell (IEEE Trans. Inf. Theory 37(4), 1991): with n occurrences
of a context and t different tokens behind it, p(w | h) = (c(h w) + t p(w | shorter h)) / (n + t), uniform at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Document = tuple[list[int], list[tuple[int, ...]]]
"""Tokens, and the context of each, nearest neighbour first; -1 where there is none."""


def text_document(tokens: Sequence[int], order: int = 2) -> Document:
    """A sentence: each token's context is the `order` tokens before it."""
    padded = [-1] * order + list(tokens)
    return list(tokens), [tuple(padded[i : i + order][::-1]) for i in range(len(tokens))]


def raster_document(ids_hw: np.ndarray) -> Document:
    """A map of tokens: the context is the token to the left, then the one above, where a raster scan has been."""
    padded = np.pad(ids_hw, ((1, 0), (1, 0)), constant_values=-1)
    left, above = padded[1:, :-1].ravel().tolist(), padded[:-1, 1:].ravel().tolist()
    return ids_hw.ravel().tolist(), list(zip(left, above, strict=True))


def take(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first `tokens` tokens, the last document cut."""
    out: list[Document] = []
    for ids, contexts in documents:
        if tokens <= 0:
            break
        out.append((ids[:tokens], contexts[:tokens]))
        tokens -= len(ids)
    return out


def without(document: Document, token: int) -> Document:
    """The document's other tokens, in the contexts they had."""
    kept = [(w, h) for w, h in zip(*document, strict=True) if w != token]
    return [w for w, _ in kept], [h for _, h in kept]


class NGrams:
    """Counts of tokens behind their contexts, shortest context first."""

    def __init__(self, documents: Sequence[Document], vocab: int) -> None:
        """Args: documents: to count, at least one token. vocab: tokens there could be."""
        self.vocab, self.order = vocab, len(documents[0][1][0])
        self.pairs: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(self.order + 1)]
        for ids, contexts in documents:
            for w, h in zip(ids, contexts, strict=True):
                for j, pairs in enumerate(self.pairs):
                    key = (*h[:j], w)
                    pairs[key] += 1
        self.seen: list[Counter[tuple[int, ...]]] = [Counter() for _ in self.pairs]
        self.kinds: list[Counter[tuple[int, ...]]] = [Counter() for _ in self.pairs]
        for pairs, seen, kinds in zip(self.pairs, self.seen, self.kinds, strict=True):
            for key, n in pairs.items():
                seen[key[:-1]] += n
                kinds[key[:-1]] += 1

    def bits(self, documents: Sequence[Document], context: int) -> np.ndarray:
        """Bits of each document, (N,), under the first `context` neighbours."""
        out = []
        for ids, contexts in documents:
            total = 0.0
            for w, h in zip(ids, contexts, strict=True):
                p = 1 / self.vocab
                for j in range(context + 1):
                    n, t = self.seen[j][h[:j]], self.kinds[j][h[:j]]
                    if not n:
                        break
                    key = (*h[:j], w)
                    p = (self.pairs[j][key] + t * p) / (n + t)
                total -= math.log2(p)
            out.append(total)
        return np.array(out)


def ratio(above_N: np.ndarray, below_N: np.ndarray) -> tuple[float, float]:
    """Sum over sum and its standard error, documents being the units (the delta method)."""
    value = above_N.sum() / below_N.sum()
    n, rest = len(above_N), above_N - value * below_N
    error = math.sqrt(n / max(1, n - 1) * float(rest @ rest)) / below_N.sum()
    return float(value), float(error)


@dataclass(frozen=True, kw_only=True)
class Randomness:
    """Entropies in bits a token on held-out documents, each with its standard error."""

    tokens: int
    """Tokens counted."""
    heldout_tokens: int
    """Tokens measured on."""
    vocab: int
    """Tokens there could be."""
    used: int
    """Different tokens among those counted."""
    commonest: float
    """Share of the commonest token."""
    entropies: tuple[tuple[float, float], ...]
    """With no context, with the nearest neighbour, with both."""
    kl_uniform: tuple[float, float]
    """log2(vocab) less the entropy without context: the distance from all tokens being equally likely."""
    evenness: tuple[float, float]
    """The entropy without context as a share of log2(vocab): 1 is uniform."""
    unpredictable: tuple[float, float]
    """Share of the entropy without context that the best context leaves: 1 means neighbours tell nothing."""


def randomness(train: Sequence[Document], heldout: Sequence[Document], vocab: int) -> Randomness:
    """Count on `train`, measure on `heldout`.

    Args:
        train: documents to count.
        heldout: other documents.
        vocab: tokens there could be.

    Raises:
        ValueError: if either has no tokens.
    """
    if not sum(len(ids) for ids, _ in train) or not sum(len(ids) for ids, _ in heldout):
        raise ValueError("no tokens to measure the randomness of: give at least one document on each side")
    grams = NGrams(train, vocab)
    lengths = np.array([len(ids) for ids, _ in heldout], float)
    bits = [grams.bits(heldout, j) for j in range(grams.order + 1)]
    entropies = tuple(ratio(b, lengths) for b in bits)
    best = min(bits, key=lambda b: b.sum())
    (plain, error), most = entropies[0], math.log2(vocab)
    return Randomness(
        tokens=sum(len(ids) for ids, _ in train),
        heldout_tokens=int(lengths.sum()),
        vocab=vocab,
        used=len(grams.pairs[0]),
        commonest=max(grams.pairs[0].values()) / sum(grams.pairs[0].values()),
        entropies=entropies,
        kl_uniform=(most - plain, error),
        evenness=(plain / most, error / most),
        unpredictable=ratio(best, bits[0]),
    )
