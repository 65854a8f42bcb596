"""How busy the machine is, and how much memory a piece of work took."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch


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
