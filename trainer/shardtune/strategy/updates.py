"""How an optimizer updates parameters of which each rank holds some rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardtune.protocols import MakeOptimizer, Piece, Saved
from shardtune.strategy.gradients import averaged, set_learning_rate
from shardtune.strategy.optimizer_state import restore_state, state_pieces, whole_part
from shardtune.world import World

Named = list[tuple[str, nn.Parameter]]


class Updates(Protocol):
    """Updates this rank's rows of every parameter, from the gradients of all ranks' rows."""

    def step(self, lr: float) -> None:
        """One step with learning rate `lr`. All ranks call it."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the rows hold the values to evaluate and keep."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of what the optimizer keeps."""
        ...

    def restore(self, saved: Saved) -> None:
        """What the optimizer keeps, from a checkpoint."""
        ...


def make_updates(parameters: Named, make_optimizer: MakeOptimizer, world: World) -> Updates:
    """For `parameters` that are split by rows over all ranks."""
    kind = RowUpdates if make_optimizer.elementwise else WholeUpdates
    return kind(parameters, make_optimizer, world)


class RowUpdates:
    """Every rank updates the rows that it holds; for optimizers that treat each element by itself."""

    def __init__(self, parameters: Named, make_optimizer: MakeOptimizer, world: World) -> None:
        rows = [(name, parameter, local_rows(parameter)) for name, parameter in parameters]
        # A tensor of fewer rows than there are ranks leaves some without any.
        self._rows = [(parameter, nn.Parameter(local)) for _, parameter, local in rows if local.numel()]
        named = [name for name, _, local in rows if local.numel()]
        own = [(name, local) for name, (_, local) in zip(named, self._rows, strict=True)]
        self._optimizer = make_optimizer(own) if own else None
        self._parts = [
            whole_part(name, parameter.shape, rows_before(parameter, world), local)
            for name, (parameter, local) in zip(named, self._rows, strict=True)
        ]

    def step(self, lr: float) -> None:
        """No communication."""
        if self._optimizer is None:
            return
        for parameter, rows in self._rows:
            rows.grad = local_rows(parameter.grad) if parameter.grad is not None else None
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `averaged`."""
        with averaged(self._optimizer):
            yield

    def pieces(self) -> Iterator[Piece]:
        """Of its rows."""
        yield from state_pieces(self._optimizer, self._parts)

    def restore(self, saved: Saved) -> None:
        """Of its rows."""
        restore_state(self._optimizer, self._parts, saved)


class WholeUpdates:
    """Every parameter is updated whole, by the rank that it is assigned to; for optimizers that look at whole matrices.

    The update is then that of one process, bit for bit. The rows of each parameter and of its gradient are sent to one
    rank, and those of the new parameter back; in between a rank holds whole copies of its share of both.
    """

    def __init__(self, parameters: Named, make_optimizer: MakeOptimizer, world: World) -> None:
        self._world = world
        self._owned: dict[str, nn.Parameter] = {}
        load = [0] * world.size
        self._parameters: list[tuple[str, nn.Parameter, int]] = []
        # The largest first, each to the rank with the least so far.
        for name, parameter in sorted(parameters, key=lambda item: -item[1].numel()):
            owner = load.index(min(load))
            load[owner] += parameter.numel()
            self._parameters.append((name, parameter, owner))
            if owner == world.rank:
                self._owned[name] = nn.Parameter(local_rows(parameter).new_empty(parameter.shape))
        own = [(name, self._owned[name]) for name, _ in parameters if name in self._owned]
        self._optimizer = make_optimizer(own) if own else None
        self._parts = [whole_part(name, whole.shape, 0, whole) for name, whole in own]
        self._release()

    def step(self, lr: float) -> None:
        """Parameters and gradients go to their owners, whose new rows come back."""
        for name, parameter, owner in self._parameters:
            if parameter.grad is None:  # on all ranks alike
                continue
            whole, gradient = self._gather(parameter, owner), self._gather(parameter.grad, owner)
            if whole is not None:
                self._owned[name].data = whole
                self._owned[name].grad = gradient
        if self._optimizer is not None:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        for name, parameter, owner in self._parameters:
            if parameter.grad is not None:
                self._scatter(self._owned.get(name), parameter, owner)
        self._release()

    def _release(self) -> None:
        """The optimizer knows the parameters that it updates by these objects; their values are with all ranks. They
        keep their shapes, but no memory."""
        for whole in self._owned.values():
            whole.data = whole.data.new_empty(()).expand(whole.shape)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The optimizers that need whole parameters have no average."""
        yield

    def pieces(self) -> Iterator[Piece]:
        """Of the parameters that it is the owner of."""
        yield from state_pieces(self._optimizer, self._parts)

    def restore(self, saved: Saved) -> None:
        """Of the parameters that it is the owner of."""
        restore_state(self._optimizer, self._parts, saved)

    def _gather(self, sharded: Tensor, owner: int) -> Tensor | None:
        """The whole tensor, on its owner."""
        rows, shape = local_rows(sharded), sharded.shape
        most = -(-shape[0] // self._world.size)
        padded = rows.new_zeros(most, *shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self._world.size)] if self._world.rank == owner else None
        dist.gather(padded, parts, dst=owner)
        return torch.cat(parts)[: shape[0]].clone() if parts is not None else None

    def _scatter(self, whole: Tensor | None, sharded: nn.Parameter, owner: int) -> None:
        rows, shape = local_rows(sharded), sharded.shape
        most = -(-shape[0] // self._world.size)
        received = rows.new_empty(most, *shape[1:])
        parts = None
        if whole is not None:
            padded = whole.new_zeros(most * self._world.size, *shape[1:])
            padded[: shape[0]] = whole.detach()
            parts = list(padded.split(most))
        dist.scatter(received, parts, src=owner)
        rows.copy_(received[: rows.shape[0]])


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor: the memory itself, without a gradient."""
    return cast(DTensor, tensor.detach())._local_tensor


def rows_before(sharded: Tensor, world: World) -> int:
    """Where this rank's rows of a DTensor begin in the flattened whole."""
    return -(-sharded.shape[0] // world.size) * world.rank * sharded.shape[1:].numel()  # torch.chunk's split
