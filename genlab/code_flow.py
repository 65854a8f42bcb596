"""The deterministic map of Distilled Decoding (Liu et al., arXiv 2412.17153): Gaussian noise to a token.

A categorical distribution p over codes c_j is the end, at t = 0, of the rectified flow x_t = (1 - t) c + t eps, and
its velocity has a closed form: no network, no training.

    w_j  proportional to  p_j exp(-|x - (1 - t) c_j|^2 / (2 t^2)),     c^ = sum_j w_j c_j,     dx/dt = (x - c^) / t

Solved from t = 1, where x is standard normal, down to 0, it lands on code j with probability p_j: exactly in the
continuum, up to the solver's steps otherwise. Token after token it makes of an autoregressive model a function from
noise to images, which a student can learn.

Where the codes lie doesn't matter in the continuum: scaling them all, or moving them all, bends the paths but moves
no end. So they are brought to mean 0 and unit variance, on which even steps in t serve well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from genlab.distributions import Categorical


def code_vectors(tokenizer: Any) -> torch.Tensor:
    """The codes (V, C) of a tokenizer, at mean 0 and unit variance, float32.

    Args:
        tokenizer: one of binary tokens (a sub-token's bits, as -1 and 1), or of ids with a `codebook`, its own or its
            `quantiser`'s. VQ's codes lie on the unit sphere.

    Raises:
        ValueError: for tokens without codes.
    """
    spec = tokenizer.spec
    if spec.kind == "binary":
        bits = (spec.vocab - 1).bit_length()
        shifts = torch.arange(bits - 1, -1, -1)
        return ((torch.arange(spec.vocab)[:, None] >> shifts) & 1) * 2.0 - 1.0
    codes = getattr(tokenizer, "codebook", None)
    if codes is None:
        codes = getattr(getattr(tokenizer, "quantiser", None), "codebook", None)
    if spec.kind != "discrete" or codes is None or codes.ndim != 2:
        raise ValueError(
            f"a {tokenizer.kind} has no codes for noise to flow to ({spec.describe()}): "
            "Distilled Decoding takes ids of a codebook, or binary tokens"
        )
    codes = codes.detach().float()
    if tokenizer.kind == "vq":
        codes = F.normalize(codes, dim=1)
    codes = codes - codes.mean(0)
    return codes / codes.square().mean().sqrt().clamp_min(1e-12)


@dataclass(frozen=True, eq=False)
class CodeFlow:
    """The map from noise to ids.

    Args:
        codes_VC: the codes, the same for each of a token's K heads.
        method: `heun` (2 steps - 1 evaluations) or `euler`.
        steps: even steps in t. Heun wants 25, Euler 100: then the law of the ids is off by less than 0.01 in total
            variation (16 codes of 8 channels).
    """

    codes_VC: torch.Tensor
    method: Literal["heun", "euler"] = "heun"
    steps: int = 25

    def __post_init__(self) -> None:
        if self.steps < 1 or self.method not in ("heun", "euler"):
            raise ValueError(f"the map needs method heun or euler and at least 1 step, got {self.method}, {self.steps}")

    @property
    def channels(self) -> int:
        """Channels C of a code; a token of K heads takes K C numbers of noise."""
        return self.codes_VC.shape[1]

    def ids(self, dist: Categorical, noise_BGM: torch.Tensor) -> torch.Tensor:
        """Ids (B, G, K) that the noise (B, G, K C), standard normal, leads to; all tokens at once.

        Raises:
            ValueError: for another vocabulary, or noise of another shape.
        """
        if dist.check is not None:
            dist.check()
        B, G, K, V = dist.logits_BGKV.shape
        if len(self.codes_VC) != V or noise_BGM.shape != (B, G, K * self.channels):
            raise ValueError(
                f"logits {(B, G, K, V)} and {len(self.codes_VC)} codes of {self.channels} channels need noise "
                f"{(B, G, K * self.channels)}, got {tuple(noise_BGM.shape)}"
            )
        log_p = dist.logits_BGKV.float().log_softmax(-1).flatten(0, 2)
        x = noise_BGM.to(log_p).reshape(-1, self.channels)
        rows = max(1, 2**22 // V)  # a few at a time: what is held is rows x V
        return torch.cat([self._solve(p, e) for p, e in zip(log_p.split(rows), x.split(rows), strict=True)]).view(
            B, G, K
        )

    def _solve(self, log_p_NV: torch.Tensor, x_NC: torch.Tensor) -> torch.Tensor:
        times = [1 - i / self.steps for i in range(self.steps)]
        x = follow_flow(self.codes_VC, log_p_NV, x_NC, times, heun=self.method == "heun")
        x = mean_code(self.codes_VC, log_p_NV, x, times[-1])  # the last step, which lands on c^
        # a mean over codes that noise of size t can't tell apart: take the nearest that has mass
        near = x @ self.codes_VC.T - self.codes_VC.square().sum(1) / 2
        return near.masked_fill(log_p_NV == -torch.inf, -torch.inf).argmax(-1)


def bend(codes_VC: torch.Tensor, x: torch.Tensor, t: float) -> torch.Tensor:
    """What (x, t) adds to log p: -|x - (1 - t) c_j|^2 / (2 t^2) up to a constant, (..., C) to (..., V); 0 at t = 1."""
    a = (1 - t) / t**2
    return torch.matmul(a * x, codes_VC.T) - a * (1 - t) / 2 * codes_VC.square().sum(1)


def mean_code(codes_VC: torch.Tensor, log_p_NV: torch.Tensor, x_NC: torch.Tensor, t: float) -> torch.Tensor:
    """c^ at (x, t), (N, C)."""
    a = (1 - t) / t**2
    shifted = log_p_NV - a * (1 - t) / 2 * codes_VC.square().sum(1)
    return torch.addmm(shifted, x_NC, codes_VC.T, alpha=a).softmax(-1) @ codes_VC


def follow_flow(
    codes_VC: torch.Tensor, log_p_NV: torch.Tensor, x_NC: torch.Tensor, times: Sequence[float], *, heun: bool
) -> torch.Tensor:
    """Solve dx/dt = (x - c^) / t over `times`, which fall from 1 to above 0, by Heun's or Euler's method: (N, C)."""
    x = x_NC
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = (x - mean_code(codes_VC, log_p_NV, x, t)) / t
        y = x + (s - t) * v
        if heun:
            y = x + (s - t) / 2 * (v + (y - mean_code(codes_VC, log_p_NV, y, s)) / s)
        x = y
    return x


__all__ = ["CodeFlow", "bend", "code_vectors", "follow_flow", "mean_code"]
