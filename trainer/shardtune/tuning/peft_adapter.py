"""What the adapters that PEFT builds have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.tuning.method import Method
from shardtune.tuning.targets import describe, head, matching

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import PeftConfig, PeftModel


class PeftAdapter(Method, ABC):
    """Implements the Tuning protocol for a method that PEFT builds from a config of its own.

    A classification head is trained in full beside the adapter.
    """

    makes_adapter = True

    def __init__(self, task: str) -> None:
        self._task = task
        self._notes: list[str] = []

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's settings for `model`, but for the task and the head. Raises ConfigError where nothing matches."""

    def apply(self, model: nn.Module) -> PeftModel:
        """Wraps `model` in a PeftModel.

        Raises ConfigError where nothing matches, or the method does not exist for such a model.
        """
        from peft import PeftModel, get_peft_model

        assert isinstance(model, PreTrainedModel)
        config = self.peft_config(model)
        config.task_type = HEADS[self._task].peft_task
        config.modules_to_save = head(model, self._task)  # pyright: ignore[reportAttributeAccessIssue]
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        assert isinstance(wrapped, PeftModel)
        return wrapped

    def notes(self) -> list[str]:
        """What was matched."""
        return self._notes


class LinearAdapter(PeftAdapter):
    """A PeftAdapter beside linear layers; `targets` as in `targets.matching`."""

    transposed = True
    """Whether the method exists for layers that store their weight as [in, out] (GPT-2's Conv1D)."""

    def __init__(self, task: str, targets: str | Sequence[str]) -> None:
        super().__init__(task)
        self._targets = targets

    def match(self, model: PreTrainedModel) -> list[str]:
        """Names of the layers that `targets` means. Raises ConfigError where there are none, or PEFT cannot adapt
        such layers."""
        matched = matching(model, self._task, self._targets)
        if not self.transposed and has_transposed(model, matched):
            raise ConfigError(
                f"tuning.method: {type(self).__name__.lower()} does not exist for a {model.config.model_type} model, "
                "whose layers are of the class Conv1D; lora, adalora, ia3, vera and ln_tuning do"
            )
        self._notes = [describe(matched)]
        return matched


def has_transposed(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether one of the layers `names` stores its weight as [in, out]."""
    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)
