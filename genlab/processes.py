"""The processes of a `torchrun` or `accelerate launch`, as code that shares work sees them.

One process is the usual case: then nothing here loads `torch.distributed` or waits for anyone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

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


# -- one batch in parts -------------------------------------------------------------------------------------------
# Training averages losses and gradients over processes. That gives the loss of the whole batch where it is a mean over
# images, as many in each part. A loss of another form asks here for what it has to know of the other parts.

_parted = False


@contextmanager
def parts_of_a_batch() -> Iterator[None]:
    """Within, the processes hold equal parts of one batch, and compute the same things of them in the same order."""
    global _parted
    before, _parted = _parted, True
    try:
        yield
    finally:
        _parted = before


def _alone() -> bool:
    return not _parted or processes()[1] == 1


def mean_of_parts(x: torch.Tensor) -> torch.Tensor:
    """The mean over a batch's parts of what each has in this place. A batch in one part: x.

    A process passes the gradient on to its own x, in full: training divides by the number of processes.
    """
    if _alone():
        return x
    import torch.distributed as dist

    total = x.detach().clone()
    dist.all_reduce(total)
    return total / processes()[1] + (x - x.detach())


def batch_mean(values: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over a batch of as many values as its parts happen to hold; 0 of none.

    What a process gets is its share: the mean over processes, which training takes, is that over the whole batch.

    Args:
        values: of any shape.
        where: which count, or how much (weights), of the same shape; None: all.
    """
    if where is None:
        total, n = values.sum(), values.new_tensor(values.numel())
    else:
        total, n = (values * where).sum(), where.sum().to(values)
    return total / mean_of_parts(n).clamp_min(1e-9)


def of_the_first_part(x: torch.Tensor) -> torch.Tensor:
    """What a batch's first part has in this place, without gradient. A batch in one part: x."""
    if _alone():
        return x
    import torch.distributed as dist

    first = x.detach().clone()
    dist.broadcast(first, 0)
    return first


def rows_of_all_parts(x: torch.Tensor) -> torch.Tensor:
    """The rows of the whole batch, in order: for a loss that compares them, which every process computes alike.

    Own rows pass the gradient on, times the number of processes, by which training divides.
    """
    if _alone():
        return x
    import torch
    import torch.distributed as dist

    rank, world = processes()
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own)
    if x.requires_grad:
        parts[rank] = own + world * (x - own)
    return torch.cat(parts)
