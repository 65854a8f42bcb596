"""An independent classifier: softmax regression on EfficientNet-Lite0's pooled features of real images.

What judges drawings shares no training with what drew them. Classes count alike, whatever their number of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genlab.data.images import ImageSet
from genlab.noise import permutation

from .features import EfficientNetLite0


@dataclass(frozen=True)
class Classifier:
    """Linear weights on standardised features."""

    classes: tuple[str, ...]
    mean_D: torch.Tensor
    scale_D: torch.Tensor
    weight_DC: torch.Tensor
    bias_C: torch.Tensor

    def logits(self, features_ND: torch.Tensor) -> torch.Tensor:
        """(N, C) of features."""
        return (features_ND - self.mean_D) / self.scale_D @ self.weight_DC + self.bias_C

    def __call__(self, features_ND: torch.Tensor) -> torch.Tensor:
        """Class indices (N,) of features."""
        return self.logits(features_ND).argmax(1)


def pooled(images: torch.Tensor, extractor: Any = None, batch_size: int = 64) -> torch.Tensor:
    """Pooled features (N, 1280) of uint8 images (N, 3, H, W)."""
    extractor = extractor or EfficientNetLite0()
    return torch.from_numpy(np.concatenate([extractor(part)["pool"] for part in images.split(batch_size)])).float()


def fit_classifier(
    features_ND: torch.Tensor, labels_N: torch.Tensor, classes: tuple[str, ...], decay: float = 1e-2
) -> Classifier:
    """Fit by L-BFGS: mean cross-entropy, classes weighted alike, and decay / 2 |weights|^2.

    Raises:
        ValueError: if fewer than two classes have images.
    """
    count = torch.bincount(labels_N, minlength=len(classes))
    if int((count > 0).sum()) < 2:
        raise ValueError(
            f"a classifier needs images of two classes at least; of {len(classes)} it has {count.tolist()}"
        )
    mean, scale = features_ND.mean(0), features_ND.std(0) + 1e-4
    x = (features_ND - mean) / scale
    class_weight = torch.where(count > 0, len(x) / (count.clamp_min(1) * (count > 0).sum()), 0.0)
    weight = torch.zeros(x.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        each = F.cross_entropy(x @ weight + bias, labels_N, reduction="none")
        loss = (each * class_weight[labels_N]).mean() + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    # a class without images is never the answer
    bias = torch.where(count > 0, bias.detach(), -torch.inf)
    return Classifier(classes, mean, scale, weight.detach(), bias)


def some_of_each(images: ImageSet, each: int, seed: int = 0) -> torch.Tensor:
    """Indices of up to `each` images a class, drawn at random but always the same."""
    order = permutation(len(images), seed)
    labels = images.labels[order]
    return torch.cat([order[labels == c][:each] for c in range(len(images.classes))])


def classifier_of(images: ImageSet, extractor: Any = None, each: int = 200) -> Classifier:
    """The classifier of a set of images, from up to `each` images a class."""
    picks = some_of_each(images, each)
    return fit_classifier(pooled(images.batch(picks), extractor), images.labels[picks], images.classes)
