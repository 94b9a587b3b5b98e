"""Strategies in which every rank holds the whole model: one process, or data parallel with gradients summed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardtune.protocols import VALUE, MakeOptimizer, Piece, Saved, Shard, Weights
from shardtune.strategy.gradients import averaged, scale_in_place, set_learning_rate, squared_norm
from shardtune.strategy.optimizer_state import Part, restore_state, state_pieces, whole_part
from shardtune.strategy.parameters import materialize, trained_parameters
from shardtune.world import World


class Replicated:
    """Implements the Strategy protocol for `single` (one rank) and `ddp` (any number of ranks).

    Trained parameters are float32; in bfloat16 the model computes under autocast.
    """

    in_step = False
    evaluates = ""
    model: nn.Module
    _module: nn.Module
    _optimizer: torch.optim.Optimizer | None = None

    def __init__(self, world: World, compute_dtype: torch.dtype) -> None:
        self._world = world
        self._dtype = compute_dtype

    def prepare(self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer | None) -> None:
        """Fills the model on this rank's device and wraps it for data parallelism where there are others."""
        materialize(model, weights, self._world.device)
        self._module = self.model = model
        trained = trained_parameters(model)
        if make_optimizer is None:
            return
        self._optimizer = make_optimizer(trained)
        if self._world.size > 1:
            # Every rank has read the same values, so nothing is broadcast.
            self.model = DistributedDataParallel(
                model,
                device_ids=[self._world.device] if self._world.device.type == "cuda" else None,
                broadcast_buffers=False,
                init_sync=False,
                gradient_as_bucket_view=True,
            )
            _settle_buckets(self.model)

    @contextmanager
    def forward(self, last: bool) -> Iterator[None]:
        """Gradients are summed over ranks after the step's last micro-batch only."""
        waiting = isinstance(self.model, DistributedDataParallel) and not last
        silent = cast(DistributedDataParallel, self.model).no_sync() if waiting else nullcontext()
        with silent, self._autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; data parallelism averages over ranks, which is undone here."""
        (loss * self._world.size).backward()

    def grad_norm(self) -> float:
        """The same on every rank, as each holds the whole gradient."""
        return math.sqrt(float(squared_norm(self._gradients())))

    def step(self, lr: float, scale: float) -> None:
        """Updates the parameters and clears the gradients."""
        assert self._optimizer is not None
        scale_in_place(self._gradients(), scale)
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=self._world.size == 1)

    def adopt(self, model: nn.Module) -> None:
        """Takes a model that has its values already, to evaluate it."""
        self._module = self.model = model.to(self._world.device)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The bare model in eval mode."""
        self._module.eval()
        with averaged(self._optimizer), torch.no_grad(), self._autocast():
            yield self._module
        self._module.train()

    def full_trained(self) -> Iterator[tuple[str, Tensor | None]]:
        """Rank 0 has them all."""
        with averaged(self._optimizer):
            for name, parameter in trained_parameters(self._module):
                # A copy: outside of this the parameter may have another value.
                yield name, parameter.detach().to("cpu", torch.float32, copy=True) if self._world.is_first else None

    def shards(self) -> Iterator[Shard]:
        """Every rank has all of it, and takes its share."""
        for name, parameter in trained_parameters(self._module):
            share = self._share(parameter.numel())
            gradient = parameter.grad.view(-1)[share] if parameter.grad is not None else None
            if share.start < share.stop:
                yield Shard(name, share.start, parameter.detach().view(-1)[share].float(), gradient)

    def overwrite(self, name: str, value: Tensor) -> None:
        """Every rank sets all of it."""
        self._module.get_parameter(name).data.copy_(value)

    def pieces(self) -> Iterator[Piece]:
        """Every rank has all of it, and takes its share of every tensor."""
        for piece in (*self._values(), *state_pieces(self._optimizer, self._parts())):
            share = self._share(piece.values.numel())
            if share.start < share.stop:
                yield piece._replace(start=share.start, values=piece.values[share])

    def restore(self, saved: Saved) -> None:
        """Every rank reads all of it."""
        restore_state(self._optimizer, self._parts(), saved)

    def _values(self) -> Iterator[Piece]:
        for name, parameter in trained_parameters(self._module):
            yield Piece(name, VALUE, tuple(parameter.shape), 0, parameter.detach().view(-1))

    def _parts(self) -> list[Part]:
        return [whole_part(name, p.shape, 0, p) for name, p in trained_parameters(self._module)]

    def _share(self, elements: int) -> slice:
        """Which of so many this rank takes; the first rank has the first."""
        rank, ranks = self._world.rank, self._world.size
        return slice(-(-elements * rank // ranks), -(-elements * (rank + 1) // ranks))

    def drop(self) -> None:
        """Nothing else holds it."""
        del self._module, self.model

    def _gradients(self) -> list[Tensor]:
        return [p.grad for _, p in trained_parameters(self._module) if p.grad is not None]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16)


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Has the buckets in which gradients are summed made now, and for good, with the gradients in them.

    DDP would sum the first step's gradients in one bucket, and then make smaller ones in the order in which it saw
    gradients come. On three ranks or more it depends on the buckets in which order the ranks' parts of an element are
    added, and gradients that are not in a bucket yet are not divided but multiplied by a rounded reciprocal: so a
    first step after a resume would differ in the last bit. A backward pass of zeros, in the order in which gradients
    are to be expected, takes the place of the first step.
    """
    model.reducer.prepare_for_backward([])
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for parameter in reversed(trained):
        parameter.backward(torch.zeros_like(parameter))
    model.reducer._rebuild_buckets()
