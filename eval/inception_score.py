"""Inception score (arXiv 1606.03498): exp of the mean KL divergence of p(y|x) from p(y), over splits."""

from __future__ import annotations

import itertools

import numpy as np


def inception_score(
    logits_NC: np.ndarray,
    *,
    splits: int = 10,
    per_split: int | None = None,
    shuffle: bool = True,
    seed: int = 2020,
) -> tuple[float, float, np.ndarray]:
    """Inception score of logits without bias, shape (N, 1008).

    Splits go by image index: after a fixed permutation (torch-fidelity), or consecutively (`shuffle=False`,
    ADM; then class-sorted samples give a wrong, low score). They are of equal size, or of `per_split` images and a
    last one of the rest (ADM).

    Returns:
        Mean and standard deviation over splits, and each split's score.

    Raises:
        ValueError: fewer images than splits.
    """
    import torch
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if len(logits_NC) < splits or splits < 1:
        raise ValueError(f"{len(logits_NC)} images cannot be cut into {splits} splits")
    logits = torch.from_numpy(np.ascontiguousarray(logits_NC))
    if shuffle:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    n = len(logits)
    bounds = [*range(0, n, per_split), n] if per_split else [i * n // splits for i in range(splits + 1)]
    scores = [
        isc_features_to_metric(logits[low:high], splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for low, high in itertools.pairwise(bounds)
    ]
    return float(np.mean(scores)), float(np.std(scores)), np.array(scores)


def students_reach(z: float, splits: int) -> float:
    """Standard errors on either side of a mean over a few splits, where z would do with many (Student's t)."""
    from statistics import NormalDist

    from scipy.stats import t

    return float(t.ppf(NormalDist().cdf(z), splits - 1)) if splits > 1 else z
