"""How near one clip is to another, and one set of clips to another.

`motion_correlation`: do the same pixels change at the same moment? `fd_frames_…` and `fd_motion_…`: Fréchet distances
over an image extractor's features of every frame, and over their differences from one frame to the next. They are not
FVD, which is another network's (I3D) on whole clips; no published figure compares with them. `fvd` takes that network's
weights from whoever has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .frechet import frechet_of_features
from .reconstruction import psnr

if TYPE_CHECKING:
    import torch

    from .features import Extractor


def motion_correlation(a_BTCHW: torch.Tensor, b_BTCHW: torch.Tensor) -> np.ndarray:
    """Pearson's correlation of the frame differences of each pair of uint8 clips, over all pixels: (B,).

    A clip that stands still has no motion to compare: NaN.

    Raises:
        ValueError: unless both are uint8 (B, T, C, H, W) of one shape, T at least 2.
    """
    import torch

    if a_BTCHW.dtype != torch.uint8 or b_BTCHW.dtype != torch.uint8 or a_BTCHW.shape != b_BTCHW.shape:
        raise ValueError(
            f"need uint8 clips of one shape, got {a_BTCHW.dtype} {tuple(a_BTCHW.shape)} and {b_BTCHW.dtype} "
            f"{tuple(b_BTCHW.shape)}"
        )
    if a_BTCHW.ndim != 5 or a_BTCHW.shape[1] < 2:
        raise ValueError(f"need clips (B, T, C, H, W) of at least two frames, got {tuple(a_BTCHW.shape)}")
    d, e = (x.double().diff(dim=1).flatten(1) for x in (a_BTCHW, b_BTCHW))
    d, e = d - d.mean(1, keepdim=True), e - e.mean(1, keepdim=True)
    return ((d * e).sum(1) / (d.norm(dim=1) * e.norm(dim=1))).cpu().numpy()


def frame_features(extractor: Extractor, clips_BTCHW: torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """The extractor's default layer of every frame of uint8 clips: (B, T, D)."""
    layer = next(iter(extractor.layers))
    parts = [extractor(part)[layer] for part in clips_BTCHW.flatten(0, 1).split(batch_size)]
    return np.concatenate(parts).reshape(*clips_BTCHW.shape[:2], -1)


def frechet_of_clips(extractor: Extractor, a_BTCHW: torch.Tensor, b_BTCHW: torch.Tensor) -> dict[str, float]:
    """`fd_frames_NAME` and `fd_motion_NAME` between two sets of uint8 clips.

    Frames of one clip resemble each other: both figures count for fewer than B T images, and few clips bias them up.
    """
    a, b = (frame_features(extractor, x) for x in (a_BTCHW, b_BTCHW))
    name = extractor.name.replace("-", "_")
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return {
        f"fd_frames_{name}": frechet_of_features(flat(a), flat(b)),
        f"fd_motion_{name}": frechet_of_features(flat(np.diff(a, axis=1)), flat(np.diff(b, axis=1))),
    }


class I3D:
    """The I3D of FVD (Unterthiner et al., arXiv 1812.01717): whole clips to the 400 numbers before its last softmax."""

    FRAMES = 16
    """The least it is shown; its strides leave nothing of far fewer."""

    def __init__(self, path: str | Path) -> None:
        """Args: path: the network in TorchScript, as StyleGAN-V hands it around (`i3d_torchscript.pt`). A program, not
        only weights: take it from where you trust.

        Raises:
            ValueError: if there is no such file, or it isn't TorchScript.
        """
        import torch

        if not Path(path).is_file():
            raise ValueError(f"no I3D in {path}: FVD needs that network in TorchScript (i3d_torchscript.pt)")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file (i3d_torchscript.pt is wanted): {error}") from None

    def __call__(self, clips_BTCHW: torch.Tensor, batch_size: int = 8) -> np.ndarray:
        """Features (B, 400) of uint8 clips; of fewer than 16 frames each is shown as often as makes 16."""
        import torch

        times = -(-self.FRAMES // clips_BTCHW.shape[1])
        parts = []
        with torch.inference_mode():
            for part in clips_BTCHW.split(batch_size):
                x = part.repeat_interleave(times, 1).transpose(1, 2).float()
                parts.append(self.network(x, rescale=True, resize=True, return_features=True))
        return torch.cat(parts).cpu().numpy()


def fvd(i3d: I3D, a_BTCHW: torch.Tensor, b_BTCHW: torch.Tensor) -> float:
    """Fréchet video distance of two sets of uint8 clips: the Fréchet distance of I3D's features."""
    return frechet_of_features(i3d(a_BTCHW), i3d(b_BTCHW))


def reconstruction(
    originals_BTCHW: torch.Tensor, decoded_BTCHW: torch.Tensor, extractor: Extractor | None = None
) -> dict[str, Any]:
    """PSNR over frames, motion correlation over clips (means, their standard errors), Fréchet distances."""
    db = psnr(originals_BTCHW.flatten(0, 1), decoded_BTCHW.flatten(0, 1))
    corr = motion_correlation(originals_BTCHW, decoded_BTCHW)
    known = corr[~np.isnan(corr)]
    figures: dict[str, Any] = {
        "clips": len(originals_BTCHW),
        "psnr": float(db.mean()),
        "motion_correlation": float(known.mean()) if len(known) else None,
        "motion_correlation_error": float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None,
        "clips_that_move": len(known),
    }
    if extractor is not None:
        figures |= frechet_of_clips(extractor, originals_BTCHW, decoded_BTCHW)
    return figures
