"""The processes of a `torchrun` or `accelerate launch`, as code that shares work sees them.

One process is the usual case: then nothing here loads `torch.distributed` or waits for anyone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """Rank and number of processes; those that a launcher started are joined (over gloo, if nobody has yet)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    _leave_at_the_end()
    return dist.get_rank(), dist.get_world_size()


@lru_cache
def _leave_at_the_end() -> None:
    """Have the group of processes taken apart as this one ends, as torch wants it."""
    import torch.distributed as dist

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, for all; it decides alone, the others wait.

    Raises:
        ValueError: in all processes, where the first one raised it.
    """
    rank, world = processes()
    if world == 1:
        return decide()
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if rank == 0:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(value: T) -> list[T]:
    """Everyone's value, in the order of ranks, for all."""
    _, world = processes()
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
