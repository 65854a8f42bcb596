"""The ways evaluators bring an image to their network's input size. Each is its own measurement.

`tf1-bilinear` samples without antialiasing on TensorFlow 1's grid (ADM, torch-fidelity, the original FID),
`torch-bilinear` samples without antialiasing on the half-pixel grid (pytorch-fid), `pil-bicubic` filters each
channel in float32 with antialiasing, cut to 0..255 and not rounded to 8 bits (clean-fid, arXiv 2104.11222),
`pil-bicubic-8bit` is Pillow's resize of the 8-bit image (torchvision, CLIP, CMMD's own reader), and
`torch-bicubic` is an antialiased bicubic on tensors, clipped to the 8-bit range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

RESIZES = ("tf1-bilinear", "torch-bilinear", "pil-bicubic", "pil-bicubic-8bit", "torch-bicubic")


def resize_images(images_B3HW: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    """Resize uint8 images (B, 3, H, W) to float32 (B, 3, size, size) in 0..255, never rounded back to 8 bits.

    Raises:
        ValueError: unknown kind, or the images are not uint8 (B, 3, H, W).
    """
    import torch
    import torch.nn.functional as F

    if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 (B, 3, H, W), got {images_B3HW.dtype} {tuple(images_B3HW.shape)}; "
            "quantise floats in [-1, 1] with ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)"
        )
    if kind in ("pil-bicubic", "pil-bicubic-8bit"):
        return _pil_bicubic(images_B3HW, size, quantised=kind == "pil-bicubic-8bit")
    x = images_B3HW.float()
    if kind == "tf1-bilinear":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(x, size=(size, size), align_corners=False)
    if kind == "torch-bilinear":
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    if kind == "torch-bicubic":
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        return x.clamp(0.0, 255.0)
    raise ValueError(f"unknown resize {kind!r}; known: {', '.join(RESIZES)}")


def _pil_bicubic(images_B3HW: torch.Tensor, size: int, *, quantised: bool) -> torch.Tensor:
    import torch
    from PIL import Image

    array = images_B3HW.cpu().numpy()
    kind = np.uint8 if quantised else np.float32  # Pillow's modes L and F
    out = np.empty((len(array), 3, size, size), dtype=np.float32)
    for b, c in np.ndindex(len(array), 3):
        channel = Image.fromarray(array[b, c].astype(kind))
        out[b, c] = np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC))
    np.clip(out, 0.0, 255.0, out=out)  # a bicubic filter overshoots; clean-fid cuts it off
    return torch.from_numpy(out).to(images_B3HW.device)
