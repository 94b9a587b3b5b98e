"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune.heads import HEADS
from shardtune.quantization import Quantization
from shardtune.tuning.method import Method
from shardtune.tuning.targets import describe, head, matching


class Lora(Method):
    """Implements the Tuning protocol: y = W x + s B A x, A [r, d_in] and B [d_out, r] trained.

    s is alpha / r, or alpha / √r if `rank_stabilized` (Kalajdzievski 2023, arXiv:2312.03732). `targets` as in
    `targets.matching`. A classification head is trained in full beside the adapters.
    """

    makes_adapter = True

    def __init__(
        self,
        task: str,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        trained_dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
        rank_stabilized: bool = False,
    ) -> None:
        self.trained_dtype = trained_dtype
        self.quantization = quantization
        self._task = task
        self._rank = rank
        self._alpha = alpha
        self._dropout = dropout
        self._targets = targets
        self._rank_stabilized = rank_stabilized
        self._matched: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps `model` in a PeftModel.

        Raises ConfigError where `targets` matches no linear layer, listing what could match.
        """
        from peft import LoraConfig, get_peft_model

        assert isinstance(model, PreTrainedModel)
        matched = self._matched = self.choose(model)
        config = LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            lora_dropout=self._dropout,
            target_modules=matched,
            fan_in_fan_out=any(isinstance(m, Conv1D) for n, m in model.named_modules() if n in set(matched)),
            use_rslora=self._rank_stabilized,
            task_type=HEADS[self._task].peft_task,
            modules_to_save=head(model, self._task),
            **self.options(),
        )
        return get_peft_model(model, config, low_cpu_mem_usage=True)  # pyright: ignore[reportReturnType]

    def choose(self, model: PreTrainedModel) -> list[str]:
        """Names of the linear layers that get an adapter. Raises ConfigError where there is none."""
        return matching(model, self._task, self._targets)

    def options(self) -> dict[str, Any]:
        """Arguments of PEFT's LoraConfig that a variant has beside the common ones."""
        return {}

    def notes(self) -> list[str]:
        """What was matched."""
        return [describe(self._matched)]


class LoraPlus(Lora):
    """LoRA with a learning rate for B that is `ratio` times that of A (Hayou et al. 2024, arXiv:2402.12354)."""

    def __init__(
        self,
        task: str,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        trained_dtype: torch.dtype = torch.float32,
        ratio: float = 16.0,
    ) -> None:
        super().__init__(task, rank, alpha, dropout, targets, trained_dtype)
        self._ratio = ratio
        self._faster: set[str] = set()

    def apply(self, model: nn.Module) -> nn.Module:
        """As LoRA, and notes whose learning rate is larger: B's, and as in PEFT's `create_loraplus_optimizer` that of
        vectors, which only a head trained beside the adapters has."""
        tuned = super().apply(model)
        self._faster = {
            name for name, parameter in tuned.named_parameters()
            if parameter.requires_grad and ("lora_B" in name or parameter.dim() == 1)
        }  # fmt: skip
        return tuned

    def lr_scale(self, name: str) -> float:
        """`ratio`, or 1 for A."""
        return self._ratio if name in self._faster else 1.0

    def notes(self) -> list[str]:
        """What was matched, and what learns faster."""
        return [*super().notes(), f"learning rate × {self._ratio:g} for {len(self._faster):,} B matrices and vectors"]
