"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune.quantization import Quantization
from shardtune.tuning.method import Method
from shardtune.tuning.targets import PEFT_TASKS, describe, head, matching


class Lora(Method):
    """Implements the Tuning protocol: y = W x + (alpha / r) B A x, A [r, d_in] and B [d_out, r] trained.

    `targets` as in `targets.matching`. A classification head is trained in full beside the adapters.
    """

    makes_adapter = True

    def __init__(
        self,
        task: str,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        quantization: Quantization | None = None,
    ) -> None:
        self.quantization = quantization
        self._task = task
        self._rank = rank
        self._alpha = alpha
        self._dropout = dropout
        self._targets = targets
        self._matched: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps `model` in a PeftModel.

        Raises ConfigError where `targets` matches no linear layer, listing what could match.
        """
        from peft import LoraConfig, get_peft_model

        assert isinstance(model, PreTrainedModel)
        matched = self._matched = matching(model, self._task, self._targets)
        config = LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            lora_dropout=self._dropout,
            target_modules=matched,
            fan_in_fan_out=any(isinstance(m, Conv1D) for n, m in model.named_modules() if n in set(matched)),
            task_type=PEFT_TASKS[self._task],
            modules_to_save=head(model, self._task),
        )
        return get_peft_model(model, config, low_cpu_mem_usage=True)  # pyright: ignore[reportReturnType]

    def notes(self) -> list[str]:
        """What was matched."""
        return [describe(self._matched)]
