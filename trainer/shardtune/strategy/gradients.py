"""The norm of a step's gradient, and what surrounds an optimizer: the same for every strategy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from shardtune.world import World

CHUNK = 2**18
"""Elements converted to float64 at once on a CPU: 2 MiB, so that they are summed while still in the cache."""

DEVICE_CHUNK = 2**24
"""The same on other devices: 128 MiB, so that large tensors do not become many small kernels."""


@torch.no_grad()
def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements: a float64 scalar on the tensors' device (CPU if none).

    Every square is computed and summed in float64: on a CPU a float32 sum is off by 1e-5 for a million
    elements and by 1e-2 for fifty million. Only a chunk of a tensor is copied to float64 at a time;
    `torch.linalg.vector_norm(t, dtype=torch.float64)` would copy all of it. The tensors are plain ones on one
    device: of a DTensor, the local part.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        size = CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
        for chunk in tensor.flatten().split(size):
            exact = chunk.double()
            sums.append(torch.dot(exact, exact))
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def sharded_norm(local: Iterable[Tensor], world: World) -> float:
    """The 2-norm of a gradient of which each rank holds a part, every element on one rank."""
    return math.sqrt(world.sum([float(squared_norm(local))])[0])


def scale_in_place(tensors: Iterable[Tensor], scale: float) -> None:
    """Multiplies each tensor by `scale`."""
    if scale != 1.0:
        for tensor in tensors:
            tensor.mul_(scale)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets that of the next step in every group, times the group's own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """The optimizer's parameters hold the values to evaluate and keep: schedule-free ones train at another point.

    Afterwards they are as before, bit for bit, from a copy: the optimizer itself comes back only nearly.
    """
    if optimizer is None or not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    cast(Any, optimizer).eval()
    yield
    cast(Any, optimizer).train()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.detach().copy_(value)
