"""Checks that a user can run (`genlab eval --self-test`): does this installation measure what it says?"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .frechet import frechet_distance, frechet_of_features
from .kernels import discrepancy
from .manifold import manifolds
from .statistics import RunningStatistics, Statistics, statistics_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One check's outcome."""

    name: str
    """What was checked."""
    passed: bool
    """Whether the measured value is within the limit."""
    measured: float
    """The measured error or value."""
    limit: str
    """What it has to satisfy."""


def _gaussians() -> Iterator[Check]:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    p, q, delta = rng.random(64), rng.random(64), rng.standard_normal(64)
    a = Statistics(mean_D=np.zeros(64), cov_DD=basis @ np.diag(p) @ basis.T)
    b = Statistics(mean_D=delta, cov_DD=basis @ np.diag(q) @ basis.T)
    closed = delta @ delta + np.square(np.sqrt(p) - np.sqrt(q)).sum()
    yield _below("analytic Gaussians: relative error", abs(frechet_distance(a, b) / closed - 1), 1e-9)
    yield _below("a set against itself", frechet_distance(a, a), 1e-8 * np.trace(a.cov_DD))


def _other_packages() -> Iterator[Check]:
    import scipy.linalg
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    rng = np.random.default_rng(1)
    for name, n in (("full rank", 900), ("rank deficient", 150)):
        x, y = rng.standard_normal((n, 256)), rng.standard_normal((n, 256)) * 1.2 + 0.1
        a, b = statistics_of(x), statistics_of(y)
        scale = np.trace(a.cov_DD) + np.trace(b.cov_DD)
        ours = frechet_distance(a, b)
        delta = a.mean_D - b.mean_D
        scipys = delta @ delta + scale - 2 * np.trace(scipy.linalg.sqrtm(a.cov_DD @ b.cov_DD)).real
        one, two = ({"mu": s.mean_D, "sigma": s.cov_DD} for s in (a, b))
        theirs = fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]
        yield _below(f"scipy's sqrtm, {name}: error over tr C1 + tr C2", abs(ours - scipys) / scale, 1e-6)
        yield _below(f"torch-fidelity, {name}: error over tr C1 + tr C2", abs(ours - theirs) / scale, 1e-6)
        yield _below(f"route through features, {name}", abs(frechet_of_features(x, y) - ours) / scale, 1e-6)


def _kernels() -> Iterator[Check]:
    rng = np.random.default_rng(2)
    values = [discrepancy(rng.standard_normal((80, 16)), rng.standard_normal((60, 16))).unbiased for _ in range(200)]
    z = abs(np.mean(values)) / (np.std(values, ddof=1) / np.sqrt(len(values)))
    yield _below("KID of equal distributions is 0: |mean| in standard errors", z, 4.0)


def _manifolds() -> Iterator[Check]:
    rng = np.random.default_rng(3)
    one, two = rng.standard_normal((200, 8)), rng.standard_normal((200, 8)) + 30.0
    both = np.concatenate([rng.standard_normal((200, 8)), rng.standard_normal((200, 8)) + 30.0])
    apart, half = manifolds(one, two), manifolds(one, both)
    yield _below("precision and recall of distant sets", apart.precision + apart.recall, 0.0)
    yield _above("precision of one mode of two", half.precision, 0.7)
    yield _below("recall of one mode of two: 1/2 at most", half.recall, 0.5)


def _invariance() -> Iterator[Check]:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3000, 48)) @ rng.standard_normal((48, 48)) + 1e3
    reference = statistics_of(rng.standard_normal((2000, 48)))
    whole = frechet_distance(statistics_of(x), reference)
    worst = 0.0
    for batch in (1, 7, 64):
        cut = statistics_of(x[i : i + batch] for i in range(0, len(x), batch))
        worst = max(worst, abs(frechet_distance(cut, reference) / whole - 1))
    yield _below("batch size: relative change", worst, 1e-9)
    worst = 0.0
    for processes in (2, 4):
        joined = RunningStatistics()
        for shard in np.array_split(x, processes + 1):
            joined.merge(RunningStatistics().update(shard))
        worst = max(worst, abs(frechet_distance(joined.finish(), reference) / whole - 1))
    yield _below("process count: relative change", worst, 1e-9)


def _corruptions(n: int, device: str) -> Iterator[Check]:
    """The distance to the clean images grows with the strength of blur, noise, JPEG and resizing."""
    import torch
    from PIL import Image, ImageFilter

    from genlab.data import open_images

    from .harness import evaluate

    clean = open_images("emoji", split="heldout").batch(range(n))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in clean]
    noise = np.random.default_rng(0).standard_normal((n, 64, 64, 3))

    def jpeg(quality: float, i: int) -> Image.Image:
        data = io.BytesIO()
        pictures[i].save(data, "JPEG", quality=int(quality))
        return Image.open(data).convert("RGB")

    def noisy(sigma: float, i: int) -> Image.Image:
        return Image.fromarray((np.asarray(pictures[i]) + sigma * noise[i]).round().clip(0, 255).astype(np.uint8))

    def resized(side: float, i: int) -> Image.Image:
        return pictures[i].resize((int(side), int(side))).resize((64, 64))

    corruptions: dict[str, tuple[Callable[[float, int], Image.Image], tuple[float, ...]]] = {
        "blur": (lambda radius, i: pictures[i].filter(ImageFilter.GaussianBlur(radius)), (0.5, 1.0, 2.0)),
        "noise": (noisy, (4.0, 12.0, 36.0)),
        "JPEG": (jpeg, (95, 60, 15)),
        "resize": (resized, (48, 32, 16)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(Path(scratch) / "clean.npz", clean.numpy())
        for name, (corrupt, levels) in corruptions.items():
            distances = [0.0]
            for level in levels:
                pixels = np.stack([np.asarray(corrupt(level, i)) for i in range(n)]).transpose(0, 3, 1, 2)
                out = evaluate(
                    torch.from_numpy(pixels.copy()), Path(scratch) / "clean.npz", device=device, cache=scratch
                )
                distances.append(out["fd_efficientnet_lite0"].value)
            steps = np.diff(distances)
            yield _above(
                f"{name}: fd_efficientnet_lite0 {', '.join(f'{d:.3g}' for d in distances[1:])}: smallest step",
                float(steps.min()),
                0.0,
            )


def _below(name: str, value: float, limit: float) -> Check:
    return Check(name=name, passed=bool(value <= limit), measured=float(value), limit=f"<= {limit:.3g}")


def _above(name: str, value: float, limit: float) -> Check:
    return Check(name=name, passed=bool(value > limit), measured=float(value), limit=f"> {limit:.3g}")


def self_test(*, images: int = 96, device: str = "cpu") -> list[Check]:
    """Run all checks, in about a minute on one core.

    Args:
        images: real images for the order of corruptions; 0 leaves that check out.
        device: where the extractor runs.
    """
    groups = [_gaussians(), _other_packages(), _kernels(), _manifolds(), _invariance()]
    if images:
        groups.append(_corruptions(images, device))
    return [check for group in groups for check in group]


def describe(checks: list[Check]) -> str:
    """The outcomes as text."""
    width = max(len(check.name) for check in checks)
    lines = [
        f"{'ok  ' if check.passed else 'FAIL'}  {check.name.ljust(width)}  {check.measured:.3g} (limit {check.limit})"
        for check in checks
    ]
    failed = sum(not check.passed for check in checks)
    lines.append(f"{len(checks)} checks, {failed} failed")
    return "\n".join(lines) + "\n"
