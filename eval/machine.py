"""The machine that a bench runs on: one bench at a time, how busy it is, how much memory a piece of work took."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from genlab.data.cache import cache_folder

BUSY = 0.1
"""The share of the CPUs that others may use before times are off."""


def busy(seconds: float = 1.0) -> float:
    """Share of the CPUs that others use, 0 to 1, watched for a while; from the load average where there is no /proc."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 0.0

    def read() -> tuple[int, int]:
        fields = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, idle and waiting for disks

    mine, (total, idle) = time.process_time(), read()
    time.sleep(seconds)
    mine, (later, later_idle) = time.process_time() - mine, read()
    spent = max(1, later - total)
    own = mine * os.sysconf("SC_CLK_TCK") / spent
    return max(0.0, 1 - (later_idle - idle) / spent - own)


@contextmanager
def one_at_a_time() -> Iterator[float]:
    """Hold the lock of this user's benches, another's end awaited; gives what `busy` says, and warns if it is much."""
    path = cache_folder() / "bench.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        _lock(file)
        before = busy()
        if before > BUSY:
            print(f"the machine is busy ({before:.0%} of it, not by this bench): times will be off", file=sys.stderr)
        yield before


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"another bench holds {file.name}; waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def describe_load(before: float, after: float) -> str:
    """A line on what others took of the machine, `busy` before and behind the measurement."""
    state = "BUSY, times are off" if max(before, after) > BUSY else "otherwise idle"
    return f"machine {state}: others took {before:.0%} of it before, {after:.0%} behind"


class PeakMemory:
    """The most memory in use inside the block, MB: of a GPU's allocator, or all that the process holds."""

    def __init__(self, device: torch.device, every: float = 0.005) -> None:
        """Args: device: whose memory. every: seconds between looks, on a CPU."""
        self.device, self.every, self.megabytes = device, every, 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._done, self._most = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 2**20
            return
        self._done.set()
        self._thread.join()
        self.megabytes = max(self._most, _resident()) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self._most = max(self._most, _resident())


def _resident() -> float:
    """Bytes this process holds; 0 where the system doesn't say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0.0
