"""CIDEr-D: how much two captions have in common, rare words counting more (Vedantam et al., arXiv 1411.5726).

As the COCO evaluation computes it (n = 1 to 4, a Gaussian of the lengths' difference with sigma 6, ten times the mean
cosine of tf-idf vectors, counts clipped), but for the words: lower case, split at all that is neither letter nor digit,
where COCO's runs the Penn Treebank's splitter in Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

N, SIGMA = 4, 6.0
Counts = Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    """Letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", caption.lower())


def ngrams(words: Sequence[str]) -> Counts:
    """Counts of all n-grams, n = 1 to 4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


class Cider:
    """CIDEr-D with the n-gram frequencies of a set of images."""

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        """Args: references: of each image its captions; an n-gram weighs by the number of images that have it."""
        own = [set().union(*(ngrams(words_of(caption)) for caption in captions)) for captions in references]
        self.images = math.log(max(1, len(own)))
        self.holds: Counts = Counter(gram for grams in own for gram in grams)
        self.vector = cache(self._vector)

    def __call__(self, caption: str, reference: str) -> float:
        """From 0 to 10."""
        (mine, length), (theirs, other) = self.vector(caption), self.vector(reference)
        total = 0.0
        for x, y in zip(mine, theirs, strict=True):
            norms = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
            if norms:
                total += sum(min(v, y[gram]) * y[gram] for gram, v in x.items() if gram in y) / norms
        return 10 * total / N * math.exp(-((length - other) ** 2) / (2 * SIGMA**2))

    def _vector(self, caption: str) -> tuple[list[dict[tuple[str, ...], float]], int]:
        """Weights of its n-grams, n by n, and its number of words."""
        words = words_of(caption)
        out: list[dict[tuple[str, ...], float]] = [{} for _ in range(N)]
        for gram, count in ngrams(words).items():
            out[len(gram) - 1][gram] = count * (self.images - math.log(max(1, self.holds[gram])))
        return out, len(words)
