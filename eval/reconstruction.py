"""How near a reconstruction is to its original: PSNR, SSIM, and learned perceptual distances."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

WHITE = 250
CAP_DB = 100.0

Distance = Callable[["torch.Tensor", "torch.Tensor"], np.ndarray]
Pairs = Iterable[tuple["torch.Tensor", "torch.Tensor"]]


def decibels(mean_square: torch.Tensor) -> torch.Tensor:
    """PSNR of mean squared errors of 8-bit values; no error gives 100 dB, where the figure is capped."""
    return (10.0 * (255.0**2 / mean_square).log10()).clamp(max=CAP_DB)


def psnr(original_B3HW: torch.Tensor, reconstruction_B3HW: torch.Tensor, *, foreground: bool = False) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of uint8 images, in dB, shape (B,).

    Args:
        original_B3HW: uint8 originals.
        reconstruction_B3HW: uint8 reconstructions.
        foreground: leave out background pixels: those whose original is white (all channels >= 250); an image
            without any other pixel gives NaN.

    Identical images give 100 dB, where the figure is capped.
    """
    _check(original_B3HW, reconstruction_B3HW)
    error = (original_B3HW.double() - reconstruction_B3HW.double()).square().mean(dim=1)
    if foreground:
        inside = (original_B3HW < WHITE).any(dim=1)
        count = inside.sum(dim=(1, 2))
        mse = (error * inside).sum(dim=(1, 2)) / count  # 0/0 is NaN: nothing to measure
    else:
        mse = error.mean(dim=(1, 2))
    return decibels(mse).cpu().numpy()


def ssim(original_B3HW: torch.Tensor, reconstruction_B3HW: torch.Tensor) -> np.ndarray:
    """Structural similarity of each pair (Wang et al. 2004; 11x11 Gaussian window, σ 1.5), shape (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(original_B3HW, reconstruction_B3HW)
    value = structural_similarity_index_measure(
        reconstruction_B3HW.double(), original_B3HW.double(), data_range=255.0, reduction="none"
    )
    return np.asarray(value.cpu())  # type: ignore[union-attr]


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    import torch

    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"need uint8 originals and reconstructions (B, 3, H, W) of one shape, "
            f"got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )


def stlpips(device: str = "cpu") -> Distance:
    """Shift-tolerant LPIPS (arXiv 2207.13686), from installed weights. Not comparable with LPIPS figures."""
    import torch

    from genlab.nn.perceptual import PerceptualDistance

    network = PerceptualDistance().to(device)

    def distance(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return network(a.to(device) / 127.5 - 1.0, b.to(device) / 127.5 - 1.0).cpu().numpy()

    return distance


def lpips(device: str = "cpu", *, net: Literal["alex", "vgg", "squeeze"] = "alex") -> Distance:
    """LPIPS v0.1 (arXiv 1801.03924) through torchmetrics; the backbone comes from torchvision's cache.

    Raises:
        FileNotFoundError: the backbone's weights are neither cached nor to be downloaded, with the command.
    """
    import torch
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        network = _LPIPS(pretrained=True, net=net, eval_mode=True).to(device)
    except OSError as error:
        import torchvision

        name = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}[net]
        url = getattr(torchvision.models, name).DEFAULT.url
        target = f"{torch.hub.get_dir()}/checkpoints/{url.rsplit('/', 1)[-1]}"
        raise FileNotFoundError(
            f"LPIPS needs its backbone's weights, and the download failed ({error}). Fetch them with\n"
            f"  curl -L --create-dirs -o {target} {url}\n"
            "Without them there is stlpips, whose figures are not LPIPS."
        ) from error

    def distance(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            value = network(a.to(device) / 127.5 - 1.0, b.to(device) / 127.5 - 1.0)
            return value.reshape(-1).cpu().numpy()

    return distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFigure:
    """A mean over images with its standard error."""

    value: float
    """Mean over images."""
    standard_error: float
    """Of the mean."""
    values_N: np.ndarray
    """One value an image."""


METRICS = ("psnr", "psnr_foreground", "ssim", "stlpips", "lpips")
SMALLEST = {"ssim": 11, "stlpips": 32, "lpips": 32}
"""Side in pixels below which a metric's window or network has nothing to look at."""


def reconstruction_figures(
    pairs: Pairs, *, metrics: tuple[str, ...] = ("psnr", "psnr_foreground", "ssim"), device: str = "cpu"
) -> dict[str, MeanFigure]:
    """Means over pairs of (originals, reconstructions), batches of uint8 (B, 3, H, W).

    Args:
        pairs: an iterable of batches.
        metrics: out of `METRICS`.
        device: where the perceptual networks run.

    Raises:
        ValueError: unknown metric, no images, or shapes that differ.
    """
    functions: dict[str, Callable[[Any, Any], np.ndarray]] = {}
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
        if name == "psnr":
            functions[name] = psnr
        elif name == "psnr_foreground":
            functions[name] = lambda a, b: psnr(a, b, foreground=True)
        elif name == "ssim":
            functions[name] = ssim
        else:
            functions[name] = stlpips(device) if name == "stlpips" else lpips(device)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in functions}
    for original, reconstruction in pairs:
        for name, function in functions.items():
            if min(original.shape[-2:]) < SMALLEST.get(name, 1):
                raise ValueError(
                    f"{name} needs images of at least {SMALLEST[name]} pixels a side, got {tuple(original.shape[-2:])}"
                )
            parts[name].append(function(original, reconstruction))
    out = {}
    for name, values in parts.items():
        joined = np.concatenate(values) if values else np.empty(0)
        finite = joined[np.isfinite(joined)]  # foreground PSNR of an all-white image
        if not len(finite):
            raise ValueError(f"no image to measure {name} on")
        error = float(finite.std(ddof=1) / np.sqrt(len(finite))) if len(finite) > 1 else float("nan")
        out[name] = MeanFigure(value=float(finite.mean()), standard_error=error, values_N=joined)
    return out
