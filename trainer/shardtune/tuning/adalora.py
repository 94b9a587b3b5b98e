"""Low-rank adapters whose ranks move to where they matter (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from shardtune.protocols import Saved, Strategy, Task
from shardtune.tuning.orthogonality import Orthogonal
from shardtune.tuning.peft_adapter import LinearAdapter, has_transposed
from shardtune.tuning.rank_allocation import Allocating, Allocator, Schedule, Update
from shardtune.world import World

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftModel


class Adalora(LinearAdapter):
    """Implements the Tuning protocol: y = W x + (alpha / initial rank) B (E ∘ (A x)), with A [r, d_in], E [r, 1] and
    B [d_out, r] trained.

    The layers and what is saved are PEFT's; which ranks are kept is decided by `rank_allocation`, as PEFT's own code
    needs whole gradients on every rank.
    """

    def __init__(
        self,
        task: str,
        rank: int,
        initial_rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        begin: float,
        end: float,
        interval: int,
        betas: tuple[float, float],
        orthogonality: float,
    ) -> None:
        """`begin`, `end`: shares of the run's steps."""
        super().__init__(task, targets)
        self._rank = rank
        self._initial_rank = initial_rank
        self._alpha = alpha
        self._dropout = dropout
        self._begin = begin
        self._end = end
        self._interval = interval
        self._betas = betas
        self._orthogonality = orthogonality
        self._model: Any = None
        self._steps: int | None = None

    def peft_config(self, model: PreTrainedModel) -> AdaLoraConfig:
        """PEFT's settings, but for the steps of the schedule, which are not known yet."""
        from peft import AdaLoraConfig

        matched = self.match(model)
        return AdaLoraConfig(
            target_r=self._rank,
            init_r=self._initial_rank,
            lora_alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            lora_dropout=self._dropout,
            deltaT=self._interval,
            beta1=self._betas[0],
            beta2=self._betas[1],
            orth_reg_weight=self._orthogonality,
            total_step=1,
            target_modules=matched,
            fan_in_fan_out=has_transposed(model, matched),
        )

    def apply(self, model: nn.Module) -> PeftModel:
        """Wraps `model` in a PeftModel."""
        wrapped = super().apply(model)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if (
                    ".ranknum." in name
                ):  # a constant, which loses its value and is thawed by the move to the meta device
                    parameter.requires_grad_(False).fill_(float(self._initial_rank))
        self._model = wrapped
        return wrapped

    def remembered(self) -> dict[str, Any]:
        """The steps whose shares the schedule is."""
        return {"steps": self._steps}

    def recall(self, saved: Saved) -> None:
        """Takes the steps."""
        self._steps = saved.tuning["steps"]

    def in_training(self, task: Task, strategy: Strategy, total_steps: int, world: World) -> tuple[Task, Strategy]:
        """The same with the penalty and the allocation of ranks; the settings learn the steps of the schedule.

        A run that is gone on with, and may be longer now, keeps the schedule that it began with.
        """
        from peft.tuners.adalora import SVDLinear

        if not total_steps:
            return task, strategy
        scheduled = self._steps = self._steps or total_steps
        end = min(max(1, round(self._end * scheduled)), scheduled)
        begin = min(round(self._begin * scheduled), end - 1)
        layers: dict[str, Any] = {
            name: module for name, module in self._model.named_modules() if isinstance(module, SVDLinear)
        }
        updates = {
            f"{name}.%s.default": Update(module.in_features, module.out_features) for name, module in layers.items()
        }
        schedule = Schedule(begin, end, self._interval)
        allocator = Allocator(updates, self._initial_rank, self._rank, schedule, self._betas, world)
        config = self._model.peft_config["default"]
        config.total_step, config.tinit, config.tfinal = scheduled, begin, scheduled - end

        def remember(kept: Mapping[str, list[bool]]) -> None:
            named = {(name % "lora_E").removeprefix("base_model.model."): which for name, which in kept.items()}
            config.rank_pattern = named or None

        if self._orthogonality:
            task = cast(Task, Orthogonal(task, list(layers.values()), self._orthogonality))
        return task, cast(Strategy, Allocating(strategy, allocator, remember))
