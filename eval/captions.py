"""How well captions match references: CIDEr (`genlab.cider`) and BLEU, without Java."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from genlab.cider import Cider


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
    score = Cider(references)
    pairs = zip(captions, references, strict=True)
    return np.array([sum(score(caption, r) for r in own) / len(own) for caption, own in pairs])


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
