"""Fully sharded data parallelism with PyTorch's `fully_shard`: every parameter is split over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardtune.protocols import VALUE, MakeOptimizer, Piece, Saved, Shard, Weights
from shardtune.strategy.gathering import plan_gathering
from shardtune.strategy.gradients import scale_in_place, sharded_norm
from shardtune.strategy.parameters import fill, fill_buffers, replace_parameters, trained_parameters
from shardtune.strategy.updates import Updates, local_rows, make_updates, rows_before
from shardtune.world import World


class Fsdp2:
    """Implements the Strategy protocol.

    Each layer of the model is gathered for its own forward and backward; what belongs to no layer (embeddings, output,
    last norms) is gathered together. Parameters are split along their first dimension, so a rank's part is one range
    of the flattened parameter, and only that range is read. With offload the parts, their gradients and the optimizer
    are in the host's memory.
    """

    in_step = True
    evaluates = ""
    model: nn.Module
    _updates: Updates | None = None

    def __init__(self, world: World, compute_dtype: torch.dtype, blocks: list[str], offload: bool = False) -> None:
        """`blocks`: names of the model's layers; `offload`: what is sharded rests in the host's memory."""
        self._world = world
        self._dtype = compute_dtype
        self._blocks = blocks
        self._offload = offload

    def prepare(self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer | None) -> None:
        """Shards the model on the meta device, then fills this rank's part of every parameter."""
        device = self._world.device
        mesh = init_device_mesh(device.type, (self._world.size,))
        on_gpu = device.type == "cuda"
        policies: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(self._dtype, torch.float32)}
        if self._offload:
            policies["offload_policy"] = CPUOffloadPolicy(pin_memory=on_gpu)
        resting = torch.device("cpu") if self._offload else device

        def with_dtype(name: str, parameter: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(parameter.data.to(weights.dtype(name)), parameter.requires_grad)

        replace_parameters(model, with_dtype)
        for name in self._blocks:
            fully_shard(model.get_submodule(name), mesh=mesh, **policies)
        fully_shard(model, mesh=mesh, **policies)

        def materialized(name: str, parameter: nn.Parameter) -> nn.Parameter:
            sharded = cast(DTensor, parameter.data)
            meta = sharded.to_local()
            local = torch.empty(meta.shape, dtype=meta.dtype, device=resting)
            fill(local, weights, name, rows_before(sharded, self._world))
            whole = DTensor.from_local(
                local, mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
            )
            return nn.Parameter(whole, parameter.requires_grad)

        replace_parameters(model, materialized)
        fill_buffers(model, weights, device)
        self.model = model
        if make_optimizer is not None:
            self._set_up()
            self._updates = make_updates(trained_parameters(model), make_optimizer, self._world)

    def _set_up(self) -> None:
        """What FSDP does before the first forward: a rank's rows move to memory of its choice."""
        cast(FSDPModule, self.model)._get_fsdp_state()._lazy_init()

    @contextmanager
    def forward(self, last: bool) -> Iterator[None]:
        """Gradients are reduced after every micro-batch: no rank ever holds a whole gradient."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; FSDP averages over ranks, which is undone here."""
        (loss * self._world.size).backward()

    def grad_norm(self) -> float:
        """Each rank squares its part."""
        return sharded_norm(self._gradients(), self._world)

    def step(self, lr: float, scale: float) -> None:
        """Updates this rank's part of the parameters."""
        assert self._updates is not None
        scale_in_place(self._gradients(), scale)
        self._updates.step(lr)
        for _, parameter in trained_parameters(self.model):
            parameter.grad = None

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The sharded model in eval mode. What belongs to no layer stays gathered meanwhile, and the layers too where
        there is memory for them.

        `generate` calls the encoder alone, outside of the model's own forward.
        """
        layers = [cast(FSDPModule, self.model.get_submodule(name)) for name in self._blocks]
        self.model.eval()
        with self._averaged(), ExitStack() as ends:
            self._set_up()  # the root, before a layer runs on its own
            gathering = plan_gathering(self.model, self._dtype, self._world, self._offload)
            for module in (cast(FSDPModule, self.model), *(layers if gathering.whole else [])):
                module.unshard()
                ends.callback(module.reshard)
            for layer in layers:
                layer.set_reshard_after_forward(not gathering.whole, recurse=False)
                ends.callback(layer.set_reshard_after_forward, True, recurse=False)
                ends.callback(cast(nn.Module, layer).register_forward_hook(_forget_order).remove)
            self.in_step, self.evaluates = not gathering.whole, gathering.why
            with torch.no_grad():
                yield self.model
            self.in_step = True
        self.model.train()

    def full_trained(self) -> Iterator[tuple[str, Tensor | None]]:
        """Gathered one at a time."""
        with self._averaged():
            for name, parameter in trained_parameters(self.model):
                whole = cast(DTensor, parameter.detach()).full_tensor()
                yield name, whole.cpu().float() if self._world.is_first else None

    def _averaged(self) -> AbstractContextManager[None]:
        return self._updates.averaged() if self._updates is not None else nullcontext()

    def shards(self) -> Iterator[Shard]:
        """Rows of each parameter; a rank may have none of a small one."""
        for name, parameter in trained_parameters(self.model):
            local = local_rows(parameter).view(-1)
            gradient = local_rows(parameter.grad).view(-1) if parameter.grad is not None else None
            if local.numel():
                yield Shard(name, rows_before(parameter, self._world), local.float(), gradient)

    def overwrite(self, name: str, value: Tensor) -> None:
        """Each rank sets its rows."""
        parameter = self.model.get_parameter(name)
        local = local_rows(parameter).view(-1)
        start = min(rows_before(parameter, self._world), value.numel())
        local.copy_(value.flatten().narrow(0, start, local.numel()))

    def pieces(self) -> Iterator[Piece]:
        """The rows of each parameter that this rank has, and what it updates them with."""
        assert self._updates is not None
        for name, parameter in trained_parameters(self.model):
            local = local_rows(parameter).view(-1)
            if local.numel():
                yield Piece(name, VALUE, tuple(parameter.shape), rows_before(parameter, self._world), local)
        yield from self._updates.pieces()

    def restore(self, saved: Saved) -> None:
        """Each rank reads what it updates its rows with."""
        assert self._updates is not None
        self._updates.restore(saved)

    def drop(self) -> None:
        """Nothing else holds it."""
        del self.model

    def _gradients(self) -> list[Tensor]:
        return [local_rows(p.grad) for _, p in trained_parameters(self.model) if p.grad is not None]


def _forget_order(layer: nn.Module, inputs: Any, output: Any) -> None:
    """FSDP remembers every forward pass of a layer for the backward pass, which does not come."""
    for group in cast(FSDPModule, layer)._get_fsdp_state()._fsdp_param_groups:
        group._post_forward_indices.clear()
        group.comm_ctx.post_forward_order.clear()
