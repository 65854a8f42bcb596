"""How well captions match references: CIDEr and BLEU, without Java.

CIDEr is CIDEr-D of Vedantam et al., arXiv 1411.5726, as the COCO evaluation computes it (n = 1 to 4, a Gaussian of
the lengths' difference with sigma 6, ten times the mean cosine of tf-idf vectors, counts clipped), but for the words:
lower case, split at all that is neither letter nor digit, where COCO's runs the Penn Treebank's splitter in Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

N, SIGMA = 4, 6.0
Vector = list[dict[tuple[str, ...], float]]


def words_of(caption: str) -> list[str]:
    """Letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", caption.lower())


def ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Counts of all n-grams, n = 1 to 4."""
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption against its references, (N,); their mean is the set's.

    An n-gram weighs by the number of images whose references hold it, among these N.

    Raises:
        ValueError: for another number of captions than images, no images, or an image without references.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(
            f"CIDEr needs one caption and at least one reference an image; got {len(captions)} captions and "
            f"{len(references)} images, {sum(not r for r in references)} of them without references"
        )
    counted = [[ngrams(words_of(r)) for r in own] for own in references]
    holds = Counter(gram for own in counted for gram in set().union(*own))
    images = math.log(len(references))

    def vector(counts: Counter[tuple[str, ...]]) -> Vector:
        out: Vector = [{} for _ in range(N)]
        for gram, count in counts.items():
            out[len(gram) - 1][gram] = count * (images - math.log(max(1, holds[gram])))
        return out

    scores = []
    for caption, own in zip(captions, counted, strict=True):
        counts = ngrams(words_of(caption))
        mine, length = vector(counts), _length(counts)
        each = [_likeness(mine, vector(r)) * math.exp(-((length - _length(r)) ** 2) / (2 * SIGMA**2)) for r in own]
        scores.append(10 * sum(each) / len(each))
    return np.array(scores)


def _length(counts: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 1)


def _likeness(a: Vector, b: Vector) -> float:
    """Mean over n of the cosine, a caption's counts clipped to the reference's."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        norms = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
        if norms:
            total += sum(min(v, y[gram]) * y[gram] for gram, v in x.items() if gram in y) / norms
    return total / N


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0 to 100, by sacrebleu (its 13a tokenizer), in lower case; images may differ in references.

    Raises:
        ImportError: if sacrebleu is missing.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs the library sacrebleu: pip install 'genlab[text]'") from error
    most = max(len(own) for own in references)
    columns: Any = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return float(BLEU(lowercase=True).corpus_score(list(captions), columns).score)
