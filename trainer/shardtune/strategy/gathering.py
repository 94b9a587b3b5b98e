"""Whether the ranks of a sharded model can each hold all of it while it is judged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from shardtune.world import World

USABLE_SHARE = 0.5
"""Of the memory that is free, what gathered parameters may take; the rest is for activations, and for the keys and
values of texts that are being written."""


class Gathering(NamedTuple):
    """How parameters are gathered for an evaluation."""

    whole: bool
    """All of them, once; otherwise layer by layer, in every forward pass."""
    why: str
    """For people."""


def plan_gathering(model: nn.Module, dtype: torch.dtype, world: World, offloaded: bool) -> Gathering:
    """The same answer on all ranks, which all call it; `dtype`: what the model computes in."""
    if offloaded:
        return Gathering(False, "parameters are gathered layer by layer, as they rest outside of the device")
    needed = sum(
        getattr(parameter, "ds_numel", parameter.numel())  # stage 3 leaves nothing of a parameter that it has split
        * (dtype.itemsize if parameter.is_floating_point() else parameter.element_size())
        for parameter in model.parameters()
    )
    free = free_bytes(world)
    whole = world.sum([float(needed > USABLE_SHARE * free)])[0] == 0
    sizes = f"they take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free for each rank"
    return Gathering(whole, f"parameters are gathered {'once' if whole else 'layer by layer'}: {sizes}")


def free_bytes(world: World) -> float:
    """Of the memory that models are in: a GPU's, or a rank's share of what the machine has left."""
    if world.device.type == "cuda":
        cached = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return torch.cuda.mem_get_info(world.device)[0] + cached
    return _available() / world.size


def _available() -> int:
    """Linux counts what it could take back from its caches; others tell what is free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
