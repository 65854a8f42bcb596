"""Counting arithmetic."""

from __future__ import annotations

from typing import Any

import torch


def flop_counter() -> Any:
    """Torch's counter of matrix products, convolutions and attention, that knows the CPU's own kinds too."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    def product(x: Any, *rest: Any, **_: Any) -> int:
        weight = rest[0] if isinstance(rest[2], str) else rest[1]  # with a second factor in front of it
        return 2 * x.numel() * weight[0]

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
            torch.ops.mkldnn._linear_pointwise: product,
        },
    )
