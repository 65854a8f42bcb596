"""Models too large for one process: their blocks recomputed, compiled, or split over processes (FSDP2).

All three go by a model's blocks: the members of its module lists that are made of parts (a transformer's layers).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model that training spends itself on; those inside others are left out."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            members = [m for m in module if any(True for _ in m.children())]
            found += members
            inside |= {id(part) for m in members for part in m.modules()}
    return found


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing: a block keeps its input alone, and computes the rest again in the backward pass.

    Raises:
        ValueError: if the model has no blocks.
    """
    from torch.utils.checkpoint import checkpoint

    def twice(forward: Any, *inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    for block in _some(model, "--recompute"):
        block.forward = functools.partial(twice, block.forward)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block; blocks of one shape share the compiled code.

    Raises:
        ValueError: if the model has no blocks.
    """
    for block in _some(model, "--compile"):
        block.compile()


def _some(model: nn.Module, option: str) -> list[nn.Module]:
    found = blocks(model)
    if not found:
        raise ValueError(f"{option} works on a model's repeated blocks, and a {type(model).__name__} has none")
    return found


def shard(task: nn.Module, device: torch.device) -> None:
    """Split parameters, gradients and with them the optimiser over all processes (FSDP2, arXiv 2304.11277).

    A unit that is gathered for its turn and let go again is a part of a block (attention, MLP, modulation), since
    models also call these on their own; what lies outside of blocks is gathered for the whole step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for p in task.parameters():
        p.data = p.data.contiguous()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks(task):
        for part in _parts(block):
            if any(p.ndim >= 2 for p in part.parameters()):
                fully_shard(part, mesh=mesh)
    fully_shard(task, mesh=mesh)


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """The modules that a block is made of and calls; lists of such are looked into."""
    for part in block.children():
        if isinstance(part, nn.ModuleList):
            yield from _parts(part)
        else:
            yield part


def shard_average(ema: nn.Module, task_model: nn.Module) -> None:
    """Split the parameters of the averaged model as those of the model in training are split, without its hooks."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = dict(task_model.named_parameters(remove_duplicate=False))
    for prefix, module in ema.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            model_p = like[f"{prefix}.{name}" if prefix else name]
            if isinstance(model_p, DTensor):
                part = distribute_tensor(p.detach(), model_p.device_mesh, model_p.placements, src_data_rank=None)
                module.register_parameter(name, nn.Parameter(part, requires_grad=False))


def local(p: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, or its part."""
    return p.to_local() if hasattr(p, "to_local") else p


def whole(model: M, keep: bool) -> M | None:
    """A copy of a model with all its weights, on the processes that `keep` it; all take part in gathering."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return copy.deepcopy(model) if keep else None
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if isinstance(p, DTensor):
            full = p.full_tensor()
            if keep:
                memo[id(p)] = nn.Parameter(full, requires_grad=False)
    return copy.deepcopy(model, memo) if keep else None


def optimizer_places(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict of AdamW as it is after a step, to be read into: moments are split as their parameters are."""
    numbered: Iterator[torch.Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    return {
        "state": {
            str(i): {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for i, p in enumerate(numbered)
        }
    }
