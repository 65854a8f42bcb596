"""How well a machine is used: the model's arithmetic a second, against what matrix products alone reach on it."""

from __future__ import annotations

import ctypes
import json
import platform
import time
from contextlib import suppress

import torch

from genlab.data.cache import cache_folder
from genlab.hub import write_atomic


def keep_memory() -> bool:
    """Have glibc keep freed memory instead of handing it back to the kernel; whether it could be told to.

    A step on a CPU allocates and frees the same large tensors over and over, and each time the kernel has to zero and
    map their pages anew. Other C libraries, and allocators put in place of glibc's, are left alone.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    most = 2**31 - 1  # the options are ints
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    done = [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, most), mallopt(M_TOP_PAD, 1 << 28)]
    return done == [1, 1, 1]


def peak_flops(device: torch.device, precision: str, seconds: float = 0.5) -> float:
    """Floating-point operations a second of matrix products on one device in bf16 or fp32, measured once and cached.

    The best of several products of the largest square matrices that a twentieth of the time allows; the key is
    precision, device, threads and torch's version. Other work on the machine makes it smaller: delete peak.json to
    measure again.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = f"{precision} {device.type} {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = cache_folder() / "peak.json"
    try:
        known = json.loads(path.read_text())
        return float(known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    peak = measure_peak(device, seconds, torch.bfloat16 if precision == "bf16" else torch.float32)
    with suppress(OSError):  # a cache that can't be written: measured again next time
        write_atomic(path, json.dumps({**known, key: peak}, indent=2))
    return peak


def measure_peak(device: torch.device, seconds: float, dtype: torch.dtype) -> float:
    """See `peak_flops`."""

    def product(x: torch.Tensor, y: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.mm(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    n, best, stop = 128, 0.0, time.perf_counter() + seconds
    x = y = torch.empty(0)
    while time.perf_counter() < stop:
        if len(x) != n:
            x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            product(x, y)  # the first call sets things up
        took = product(x, y)
        best = max(best, 2 * n**3 / took)
        if took < seconds / 20 and n < 8192:
            n *= 2
    return best
