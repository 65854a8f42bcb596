"""Small layers that several papers share: timestep embedding, modulation, gated MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def number(module: nn.Module, name: str, value: float) -> None:
    """Give a module a learned number: of one element, since FSDP2 splits no scalars; scalars are loaded as such."""

    def widen(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if (key := prefix + name) in state:
            state[key] = state[key].reshape(1)

    module.register_parameter(name, nn.Parameter(torch.tensor([value])))
    module.register_load_state_dict_pre_hook(widen)


def sinusoid(t: torch.Tensor, dim: int, max_period: float = 1e4) -> torch.Tensor:
    """Sinusoidal embedding of t, (...,), cosines first: (..., dim), float32."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device).float() / (dim // 2))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimestepEmbedding(nn.Module):
    """Time in units of the caller's choice to a vector: sinusoid, then Linear-SiLU-Linear (as DiT's)."""

    def __init__(self, dim: int, frequencies: int = 256, max_period: float = 1e4) -> None:
        """Args: dim: size of the vector. frequencies: size of the sinusoid. max_period: of its slowest wave."""
        super().__init__()
        self.frequencies, self.max_period = frequencies, max_period
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(...,) to (..., dim)."""
        waves = sinusoid(t, self.frequencies, self.max_period)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive normalisation: x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth (arXiv 1603.09382): in training, leave a residual branch (B, ...) out for a share of rows."""
    if rate == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


class Linear(nn.Linear):
    """`nn.Linear`, quick on a CPU where weights are not trained: for few rows, and for many.

    The two to four rows of guided decoding of one image have the weights' way from memory as their whole cost, and the
    usual product makes it once for each row. For many rows oneDNN's product adds the bias as it goes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out); the result of few rows lies in memory column by column."""
        rows = x.numel() // x.shape[-1]
        if fusible(x, self.weight):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "none")
        if not 1 < rows <= 4 or self.bias is not None or x.device.type != "cpu" or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        # the product is quick for rows that lie one behind the other, four times as slow for columns
        return (self.weight @ x.reshape(rows, -1).contiguous().T).T.view(*x.shape[:-1], -1)


def fusible(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN's fused product serves x (..., in): float32 on a CPU, no gradients, rows enough to be worth it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= 128 * x.shape[-1]
        and type(weight) is nn.Parameter  # not FSDP's
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # which fuses by itself
        and torch.backends.mkldnn.is_available()
    )


class GatedMLP(nn.Module):
    """fc2(act(fc1_g x) * fc1_x x): SwiGLU with SiLU, GEGLU with GELU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, act: str = "silu", bias: bool = True, dropout: float = 0.0) -> None:
        """Args: dim, hidden: widths. act: `silu` or `gelu`. bias: of the three layers. dropout: behind the gate."""
        super().__init__()
        acts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}
        self.act, self.fused = acts[act], {"silu": "swish", "gelu": "gelu"}[act]
        self.fc1_g = Linear(dim, hidden, bias=bias)
        self.fc1_x = Linear(dim, hidden, bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) to (..., dim)."""
        g, v = self.fc1_g, self.fc1_x
        if fusible(x, g.weight) and not self.training:  # gate and product on the way out of the two products
            product = torch.ops.mkldnn._linear_pointwise
            h = product.binary(x, product(x, g.weight, g.bias, self.fused, [], "none"), v.weight, v.bias, "mul")
            return self.fc2(h)
        h = self.act(g(x)) * v(x)
        return self.fc2(self.dropout(h) if self.training else h)
