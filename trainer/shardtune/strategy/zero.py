"""DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), stages 1 to 3.

Stage 1 splits the optimizer's state over the ranks, stage 2 the gradients too, stage 3 the parameters too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from shardtune.protocols import VALUE, MakeOptimizer, Piece, Saved, Shard, Weights
from shardtune.strategy.gathering import plan_gathering
from shardtune.strategy.gradients import scale_in_place, set_learning_rate, sharded_norm
from shardtune.strategy.optimizer_state import Part, restore_state, state_pieces
from shardtune.strategy.parameters import (
    fill,
    fill_buffers,
    materialize,
    parts,
    replace_parameters,
    trained_parameters,
)
from shardtune.world import World

KEPT_WHOLE = 100_000
"""Elements of the largest parameter that stage 3 keeps whole on every rank, as it is DeepSpeed's default; less where a
frozen matrix is smaller, which is split in any case."""


class Zero:
    """Implements the Strategy protocol over a DeepSpeed engine.

    The loop counts targets, clips and schedules for every strategy alike, so the engine is told not to: no scaling by
    accumulation steps, no clipping, no schedule. In bfloat16 parameters are bfloat16, master weights float32, and
    gradients are summed in float32 over ranks and, but for stage 1, over micro-batches.

    Under stage 3 a layer of the model is gathered whole for its forward and for its backward, and what belongs to no
    layer part by part: what is computed in a layer may use any of its parameters, not only those of the module that
    computes.
    """

    model: nn.Module
    _module: nn.Module
    _engine: Any = None
    _accumulated = False
    evaluates = ""

    def __init__(
        self,
        world: World,
        compute_dtype: torch.dtype,
        stage: int,
        blocks: list[str],
        offload: str = "none",
        nvme: str | None = None,
    ) -> None:
        """`blocks`: names of the model's layers. `offload`: none; cpu (stage 2: the optimizer and its gradients are in
        the host's memory; stage 3: parameters too); or nvme (stage 3: parameters in the host's memory, the optimizer on
        disk, in the folder `nvme`)."""
        self._world = world
        self._blocks = blocks
        self._dtype = compute_dtype
        self._stage = stage
        self._offload = offload
        self._nvme = nvme
        self._kept_whole = KEPT_WHOLE
        self.in_step = stage == 3

    def prepare(self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer | None) -> None:
        """Fills the model (under stage 3 each parameter is split as soon as it is filled) and starts the engine."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        deepspeed.logger.setLevel(logging.ERROR)
        # On a CPU it would compile an all-reduce for inference now, for a minute, that training never calls; and before
        # that, try out which of its operations can be compiled here.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
        deepspeed.init_distributed(verbose=False)
        if self._stage == 3:
            self._fill_and_partition(model, weights)
            self._gather_by_part(model)
        else:
            materialize(model, weights, self._world.device)
        self._module = self.model = model
        if make_optimizer is None and self._stage < 3:
            return
        trained = trained_parameters(model)
        optimizer = make_optimizer(trained) if make_optimizer is not None else None
        if optimizer is not None and self._offload == "nvme":
            optimizer = _for_disk(optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            config=self._settings(),
            dist_init_required=False,
        )
        self.model = self._engine
        if optimizer is not None and self._dtype != torch.float32:
            self._restore_master_weights(trained, weights)

    def _settings(self) -> dict[str, Any]:
        # DeepSpeed's stage 1 takes another optimizer class, without a gradient to read, for float32 accumulation.
        accumulate_in = "bf16" if self._dtype == torch.bfloat16 and self._stage == 1 else "fp32"
        on_gpu = self._world.device.type == "cuda"
        resting: dict[str, Any] = {}
        if self._offload != "none":
            resting["offload_optimizer"] = {"device": self._offload, "pin_memory": on_gpu}
            if self._stage == 3:
                resting["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
        if self._nvme is not None:
            resting["offload_optimizer"]["nvme_path"] = self._nvme
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": on_gpu,
                "stage3_param_persistence_threshold": self._kept_whole,
                **resting,
            },
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": accumulate_in},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
        }

    def _fill_and_partition(self, model: nn.Module, weights: Weights) -> None:
        """Rank 0 reads one parameter after the other; `zero.Init` sends it out, and each rank keeps its part."""
        import deepspeed

        holder = nn.Module()
        frozen = [p.numel() for p in model.parameters() if p.dim() > 1 and not p.requires_grad]
        self._kept_whole = min([KEPT_WHOLE, *(numel - 1 for numel in frozen)])

        def make(name: str, parameter: nn.Parameter) -> nn.Parameter:
            data = torch.empty(parameter.shape, dtype=self._dtype, device=self._world.device)
            if self._world.is_first:
                fill(data, weights, name)
            holder.weight = nn.Parameter(data, requires_grad=parameter.requires_grad)
            deepspeed.zero.Init(module=holder, config_dict_or_path=self._settings(), dtype=self._dtype)
            return holder.weight

        replace_parameters(model, make)
        fill_buffers(model, weights, self._world.device)

    def _gather_by_part(self, model: nn.Module) -> None:
        """Has a module's parameters gathered for the whole of its forward and of its backward, down to the last
        submodule: they may be used outside of the submodules that they belong to.

        DeepSpeed's leaf modules do more than that: they hold gradients back until the module's inputs have theirs,
        which is too early where the inputs need none, as those of the first layer do not beside frozen embeddings.
        """
        import deepspeed

        for part in parts(model, self._blocks):
            own = set(part.parameters(recurse=False))
            for parameter in part.parameters():
                if parameter not in own:
                    deepspeed.zero.register_external_parameter(part, parameter)

    def _restore_master_weights(self, trained: list[tuple[str, nn.Parameter]], weights: Weights) -> None:
        """Master weights begin as copies of the rounded parameters; they should begin as the values themselves."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in trained:
            partition = getattr(parameter, "ds_tensor", None)
            if partition is None:
                value = torch.empty(parameter.shape, device=self._world.device)
                fill(value, weights, name)
                safe_set_full_fp32_param(parameter, value)
                continue
            local = torch.zeros(partition.ds_numel, device=self._world.device)
            own = self._range(parameter)
            fill(local[: len(own)], weights, name, own.start)
            safe_set_local_fp32_param(parameter, local)

    @contextmanager
    def forward(self, last: bool) -> Iterator[None]:
        """The engine reduces at the boundary (stage 1) or after every micro-batch (2 and 3)."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds gradients; the engine averages over ranks, which is undone here."""
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)
        self._accumulated = True

    def grad_norm(self) -> float:
        """Each rank squares its part."""
        return sharded_norm(self._gradients(), self._world)

    def step(self, lr: float, scale: float) -> None:
        """Updates this rank's part of the master weights, then the parameters everywhere."""
        optimizer = self._engine.optimizer
        set_learning_rate(optimizer, lr)
        if self._offload != "nvme":
            scale_in_place(self._gradients(), scale)
            self._engine.step()
        else:  # the gradients are on disk; when they are read, they are divided by the loss scale
            optimizer.override_loss_scale(1.0 / max(scale, torch.finfo(torch.float32).tiny))
            self._engine.step()
            optimizer.override_loss_scale(1.0)
        self._accumulated = False
        if self._offload == "cpu":
            for gradient in self._gradients():  # or that of a parameter that the next step does not use would stay
                gradient.zero_()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in eval mode. Under stage 3 all parameters are gathered meanwhile, where there is memory for them;
        else the engine's hooks gather them."""
        self._module.eval()
        with ExitStack() as ends:
            if self._stage == 3:
                gathering = plan_gathering(self._module, self._dtype, self._world, self._offload != "none")
                self.in_step, self.evaluates = not gathering.whole, gathering.why
                if gathering.whole:
                    self._gather(ends)
            with torch.no_grad():
                yield self._module
            self.in_step = self._stage == 3
        self._module.train()

    def _gather(self, ends: ExitStack) -> None:
        """Gathers all parameters, one at a time, until `ends`; so long DeepSpeed's hooks, which would split them again
        after each forward and compare the order of modules among ranks, are away. Others, such as those that put
        bottleneck adapters behind layers, stay."""
        import deepspeed

        for module in self._module.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = dict(hooks)
                ends.callback(_become, hooks, before)
                _become(hooks, {key: hook for key, hook in before.items() if not _is_of_deepspeed(hook)})
        for parameter in self._module.parameters():
            if not _is_whole(parameter):
                ends.enter_context(deepspeed.zero.GatheredParameters(parameter))

    def full_trained(self) -> Iterator[tuple[str, Tensor | None]]:
        """Trained parameters from the master weights, one at a time."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trained_parameters(self._module):
            whole = safe_get_full_fp32_param(parameter)
            assert whole is not None
            yield name, whole.detach().cpu().view(_full_shape(parameter)) if self._world.is_first else None

    def shards(self) -> Iterator[Shard]:
        """Under stage 3 a range of each parameter; before, what lies in this rank's range of all of them."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

        accumulated = self._accumulated
        if self._offload == "none":  # they may still wait for the last micro-batch
            accumulated = any(group for group in self._engine.optimizer.averaged_gradients.values())
        for _, parameter, part in self._parts():
            gradient = None
            if self._stage == 3:
                value = cast(Tensor, safe_get_local_fp32_param(parameter)).detach().view(-1)[: part.elements]
                if accumulated:
                    gradient = cast(Tensor, safe_get_local_grad(parameter)).view(-1)[: part.elements]
            else:
                value = part.values()
                if accumulated:
                    index = parameter._index_in_param_group  # pyright: ignore[reportAttributeAccessIssue]
                    gradient = _fragment(parameter).get_lp_grad_fragment(index).view(-1)
            yield Shard(part.name, part.start, value, gradient)

    def overwrite(self, name: str, value: Tensor) -> None:
        """Each rank sets its part of the master weight, and what it holds of the parameter."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = self._module.get_parameter(name)
        value = value.flatten().to(self._world.device)
        partition = getattr(parameter, "ds_tensor", None)
        if partition is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            local = torch.zeros(partition.ds_numel, device=self._world.device)
            own = self._range(parameter)
            local[: len(own)] = value[own.start : own.stop]
            safe_set_local_fp32_param(parameter, local)
            partition.data.copy_(local)
        if parameter.numel() == value.numel():  # a small one is whole on every rank under stage 3 too
            parameter.data.view(-1).copy_(value)

    def pieces(self) -> Iterator[Piece]:
        """Of the master weights, and what they are updated with."""
        optimizer = self._engine.optimizer.optimizer
        for index, own in self._groups():
            with self._at_hand(index):
                values = (Piece(part.name, VALUE, part.shape, part.start, part.values()) for part in own)
                for piece in (*values, *state_pieces(optimizer, own)):
                    if self._offload == "nvme":
                        # The memory is that of the next group; and torch's optimizer has its step in float32.
                        piece = piece._replace(values=piece.values.to(torch.float32, copy=True))
                    yield piece

    def restore(self, saved: Saved) -> None:
        """Each rank reads what it updates its part of the master weights with."""
        engine = self._engine.optimizer
        for index, own in self._groups():
            group = engine.optimizer.param_groups[engine.sub_group_to_group_id[index] if self._stage == 3 else index]
            held, before = own[0].held, group["params"]
            group["params"] = [held]  # only meanwhile, as in the step of DeepSpeed's stage 3
            with self._at_hand(index, changed=True):
                restore_state(engine.optimizer, own, saved)
                state = engine.optimizer.state[held]
                if self._offload == "nvme" and "step" in state:
                    state["step"] = int(state["step"])
            group["params"] = before

    def _groups(self) -> list[tuple[int, list[Part]]]:
        """This rank's parts of the trained parameters, by the group of master weights that DeepSpeed has them in."""
        groups: dict[int, list[Part]] = {}
        for index, _, part in self._parts():
            groups.setdefault(index, []).append(part)
        return list(groups.items())

    @contextmanager
    def _at_hand(self, index: int, changed: bool = False) -> Iterator[None]:
        """A group of master weights, and what the optimizer keeps of it, is in memory meanwhile; `changed`: where it
        rests on a disk, it is written there again."""
        engine = self._engine.optimizer
        on_disk = self._offload == "nvme" and engine._swappable_optimizer_subgroup(index)
        if on_disk:
            engine._optimizer_states_and_gradient_swap_in(index)
        yield
        if on_disk:
            (engine._optimizer_states_and_gradient_swap_out if changed else engine._release_swap_buffers)(index)

    def _parts(self) -> Iterator[tuple[int, nn.Parameter, Part]]:
        """Each trained parameter that this rank has a part of, with the number of the group of master weights that the
        part is in. Under stage 3 it is a range of the parameter; before, what lies in this rank's range of all."""
        engine = self._engine.optimizer
        for name, parameter in trained_parameters(self._module):
            if self._stage == 3:
                own = self._range(parameter)
                index, offset, _ = engine.grad_position[engine.get_param_id(parameter)]
                held = engine.fp32_partitioned_groups_flat[index]
                part = Part(name, tuple(_full_shape(parameter)), own.start, held, offset, len(own))
            elif (fragment := _fragment(parameter)) is not None:
                index = fragment.param_group_index
                held = engine.single_partition_of_fp32_groups[index]
                within, place = fragment.lp_fragment_address, fragment.hp_fragment_address
                part = Part(name, tuple(parameter.shape), within.start, held, place.start, place.numel)
            else:
                continue
            if part.elements:
                yield index, parameter, part

    def _range(self, parameter: nn.Parameter) -> range:
        """This rank's part of a flattened parameter under stage 3."""
        elements, part = int(parameter.ds_numel), int(parameter.ds_tensor.ds_numel)  # pyright: ignore
        start = min(part * self._world.rank, elements)
        return range(start, min(start + part, elements))

    def drop(self) -> None:
        """DeepSpeed holds on to a model that it has seen, so its parameters are emptied."""
        for parameter in self._module.parameters():
            for held in (parameter, getattr(parameter, "ds_tensor", None)):
                if held is not None:
                    held.data = held.data.new_empty(0)
        del self._module, self.model
        self._engine = None

    def _gradients(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        if self._offload == "nvme":
            # What was accumulated in the host's memory, before it was written to disk.
            return list(optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values())
        if self._offload == "cpu":
            in_stage_3 = self._stage == 3
            masters = (
                optimizer.fp32_partitioned_groups_flat if in_stage_3 else optimizer.single_partition_of_fp32_groups
            )
            return [master.grad for master in masters]
        groups = optimizer.averaged_gradients
        return [gradient for group in groups.values() for gradient in (group or ())]


def _for_disk(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW with the settings of torch's: all tensors of its state have the parameters' shapes, as what
    moves to a disk must. Compiled at first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(optimizer.param_groups, fp32_optimizer_states=True)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_whole(parameter: nn.Parameter) -> bool:
    return parameter.shape == _full_shape(parameter)


def _become(hooks: dict[int, Any], others: dict[int, Any]) -> None:
    """In their order, which is that of the calls."""
    hooks.clear()
    hooks.update(others)


def _is_of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "deepspeed"


def _fragment(parameter: nn.Parameter) -> Any:
    """Before stage 3: where this rank's part of the parameter lies among the master weights; None: it has none."""
    return getattr(parameter, "_hp_mapping", None)
