"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune.errors import ConfigError

PEFT_TASKS = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "classification": "SEQ_CLS"}


class Lora:
    """Implements the Tuning protocol: y = W x + (alpha / r) B A x, A [r, d_in] and B [d_out, r] trained.

    `targets` is all-linear (every linear layer but the output layer and the classification head), a list of module
    name endings, or a regular expression over whole module names. A classification head is trained in full beside the
    adapters.
    """

    makes_adapter = True

    def __init__(self, task: str, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]) -> None:
        self._task = task
        self._rank = rank
        self._alpha = alpha
        self._dropout = dropout
        self._targets = targets

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps `model` in a PeftModel.

        Raises ConfigError where `targets` matches no linear layer, listing what could match.
        """
        from peft import LoraConfig, get_peft_model

        assert isinstance(model, PreTrainedModel)
        matched = self._matching(model)
        config = LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,  # pyright: ignore[reportArgumentType] - a float scales as well
            lora_dropout=self._dropout,
            target_modules=matched,
            fan_in_fan_out=any(isinstance(m, Conv1D) for n, m in model.named_modules() if n in set(matched)),
            task_type=PEFT_TASKS[self._task],
            modules_to_save=self._head(model),
        )
        return get_peft_model(model, config, low_cpu_mem_usage=True)  # pyright: ignore[reportReturnType]

    def _head(self, model: PreTrainedModel) -> list[str] | None:
        """What stands beside the base model; PEFT by itself knows only some of the names that heads have."""
        if self._task != "classification":
            return None
        beside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
        return [name for name, child in beside if any(True for _ in child.parameters())]

    def _matching(self, model: PreTrainedModel) -> list[str]:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        output = model.get_output_embeddings()
        base = model.base_model_prefix + "."
        candidates = [
            name
            for name in linear
            if model.get_submodule(name) is not output and (self._task != "classification" or name.startswith(base))
        ]
        if self._targets == "all-linear":
            matched = candidates
        elif isinstance(self._targets, str):
            try:
                matched = [name for name in linear if re.fullmatch(self._targets, name)]
            except re.error as error:
                raise ConfigError(f"tuning.targets: {self._targets!r} is no regular expression: {error}") from None
        else:
            endings = tuple(f".{target}" for target in self._targets)
            matched = [name for name in linear if f".{name}".endswith(endings)]
        if not matched:
            kinds = sorted({name.rpartition(".")[2] for name in candidates})
            raise ConfigError(
                f"tuning.targets: {self._targets!r} matches no linear layer; there are {', '.join(kinds)}"
            )
        return matched
