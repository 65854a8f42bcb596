"""Which arithmetic is fast on a device: bfloat16 where its hardware multiplies it faster than float32, else float32.

A CPU without such units emulates bfloat16, and its matrix products then take tens of times longer than in float32.
Intel's AVX512-BF16 without AMX takes longer than its float32 too; AMD's does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16"]
"""`auto` is the faster one of the two, see `has_bf16`."""
UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""What a CPU that multiplies bfloat16 calls it: x86's three, Arm's two."""


def cpu_units() -> Mapping[str, Any]:
    """What torch says of this CPU; a torch before `get_capabilities` knows x86's units only."""
    import torch

    if known := getattr(torch.cpu, "get_capabilities", None):
        return known()
    asks = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {unit: getattr(torch.cpu, ask, bool)() for unit, ask in asks.items()}


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether a device's hardware multiplies bfloat16, and faster than float32."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    units = cpu_units()
    slow = ("avx512_bf16",) if str(units.get("cpu_name", "")).startswith("Intel") else ()
    return any(units.get(unit) for unit in UNITS if unit not in slow)


def torch_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """A torch dtype by name; `auto` is bfloat16 where `has_bf16`, else float32.

    Raises:
        ValueError: for another name.
    """
    import torch

    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype takes auto, float32 or bfloat16, got {name!r}")
    if name == "auto":
        name = "bfloat16" if has_bf16(device) else "float32"
    return getattr(torch, name)
