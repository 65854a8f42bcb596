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
        codes, x = self.codes_VC, x_NC
        half = codes.square().sum(1) / 2

        def mean_code(x: torch.Tensor, t: float) -> torch.Tensor:
            """c^ at (x, t); |x|^2 is common to all codes and falls out of the softmax."""
            a = (1 - t) / t**2
            w = torch.addmm(log_p_NV - a * (1 - t) * half, x, codes.T, alpha=a).softmax(-1)
            return w @ codes

        times = [1 - i / self.steps for i in range(self.steps)] + [0.0]
        for t, s in zip(times[:-1], times[1:], strict=True):
            c = mean_code(x, t)
            y = x + (s - t) / t * (x - c)
            if self.method == "heun" and s > 0:  # at t = 0 the velocity is 0 / 0; the last step lands on c^
                y = x + (s - t) / 2 * ((x - c) / t + (y - mean_code(y, s)) / s)
            x = y
        # c^ of the last step is a mean over codes that noise of size t can't tell apart: the nearest that has mass
        return (x @ codes.T - half).masked_fill(log_p_NV == -torch.inf, -torch.inf).argmax(-1)


__all__ = ["CodeFlow", "code_vectors"]
