"""What a report shows beside the figures: near copies, influential images, classes, the precision-recall plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .frechet import frechet_of_features, frechet_with_error
from .manifold import BLOCK, distances, radii
from .neighbours import nearest

if TYPE_CHECKING:
    from .harness import FeatureSet

QUERIES = 5000
"""Neighbours are looked up for at most this many images of each set, evenly spaced."""
SHOWN = 12
NEIGHBOURHOODS = (1, 2, 3, 5, 8, 13)


def _spaced(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def collect(ours: FeatureSet, theirs: FeatureSet, layer: str) -> dict[str, Any]:
    """Material of the report, plain data; empty where a side is a statistics file.

    Args:
        ours: generated images.
        theirs: reference images.
        layer: which features to use.
    """
    if ours.store is None or theirs.store is None:
        return {}
    x, y = ours.store.read(layer), theirs.store.read(layer)
    out: dict[str, Any] = {"layer": layer, "nearest": near_copies(x, y)}
    result = frechet_with_error(
        ours.statistics(layer), theirs.statistics(layer), tiles=lambda: [x], reference_tiles=None
    )
    assert result.influence_N is not None
    order = np.argsort(result.influence_N)
    out["best"] = [_ranked(i, result.influence_N) for i in order[:SHOWN]]
    out["worst"] = [_ranked(i, result.influence_N) for i in order[::-1][:SHOWN]]
    if min(len(x), len(y)) > max(NEIGHBOURHOODS):
        out["precision_recall"] = precision_recall_curve(x, y)
    if ours.labels is not None and theirs.labels is not None:
        labels = theirs.labels
        if ours.classes and theirs.classes:  # by name: another set numbers its classes in its own way
            number = {name: i for i, name in enumerate(ours.classes)}
            numbers = np.array([number.get(name, -1) for name in theirs.classes] + [-1])  # the last, of no class
            labels = numbers[labels]
        out["per_class"] = per_class(x, ours.labels, y, labels)
    return out


def _ranked(index: np.integer, values: np.ndarray) -> dict[str, Any]:
    return {"image": int(index), "influence": float(values[index])}


def near_copies(x_ND: np.ndarray, y_MD: np.ndarray) -> dict[str, Any]:
    """Distances of generated images to their nearest reference image, beside those within the reference.

    A generator that copies has distances well below those of reference images to each other.
    """
    queries = _spaced(len(x_ND), QUERIES)
    distance, index = nearest(x_ND[queries], y_MD)
    out: dict[str, Any] = {"queries": len(queries), "median": float(np.median(distance))}
    own = np.empty(0)
    if len(y_MD) > 2:
        rows = _spaced(len(y_MD), QUERIES)
        # the nearest but itself; a duplicate of the row counts at distance 0
        own = nearest(y_MD[rows], y_MD, k=2)[0][:, 1]
        out["median_within_reference"] = float(np.median(own))
        out["share_below_reference_1_percent"] = float((distance[:, 0] < np.quantile(own, 0.01)).mean())
    edges = np.linspace(0.0, max(float(distance.max()), float(own.max(initial=0.0)), 1e-12), 41)
    out["edges"] = edges.tolist()
    out["generated"] = np.histogram(distance[:, 0], edges)[0].tolist()
    out["reference"] = np.histogram(own, edges)[0].tolist()
    closest = np.argsort(distance[:, 0], kind="stable")[:SHOWN]
    out["closest"] = [
        {"image": int(queries[i]), "neighbour": int(index[i, 0]), "distance": float(distance[i, 0])} for i in closest
    ]
    return out


def precision_recall_curve(x_ND: np.ndarray, y_MD: np.ndarray) -> list[dict[str, float]]:
    """Precision and recall for several neighbourhood sizes k (3 is the published one), on at most 5,000 a side."""
    x, y = x_ND[_spaced(len(x_ND), QUERIES)], y_MD[_spaced(len(y_MD), QUERIES)]
    of_x, of_y = radii(x, NEIGHBOURHOODS), radii(y, NEIGHBOURHOODS)
    inside_y = np.zeros((len(NEIGHBOURHOODS), len(x)), dtype=bool)
    inside_x = np.zeros((len(NEIGHBOURHOODS), len(y)), dtype=bool)
    for i in range(0, len(x), BLOCK):
        part = slice(i, i + BLOCK)
        distance = distances(x[part], y)
        for j in range(len(NEIGHBOURHOODS)):
            inside_y[j, part] = (distance <= of_y[j]).any(axis=1)
            inside_x[j] |= (distance <= of_x[j, part, None]).any(axis=0)
    return [
        {"k": k, "precision": float(a.mean()), "recall": float(b.mean())}
        for k, a, b in zip(NEIGHBOURHOODS, inside_y, inside_x, strict=True)
    ]


def per_class(x: np.ndarray, x_labels: np.ndarray, y: np.ndarray, y_labels: np.ndarray) -> list[dict[str, Any]]:
    """Fréchet distance within each class that has at least 2 images on both sides.

    Few images bias a distance upward: these figures compare classes of one size, not with the whole set's.
    """
    rows = []
    for label in np.intersect1d(x_labels[x_labels >= 0], y_labels):
        a, b = x[x_labels == label], y[y_labels == label]
        if min(len(a), len(b)) < 2:
            continue
        rows.append({"class": int(label), "n": len(a), "reference_n": len(b), "distance": frechet_of_features(a, b)})
    return rows
