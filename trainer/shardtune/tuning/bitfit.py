"""Training of the biases only (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.tuning.method import Method
from shardtune.tuning.targets import head


class Bitfit(Method):
    """Implements the Tuning protocol: biases are trained, and a classification head in full; the rest is frozen."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._biases = 0

    def apply(self, model: nn.Module) -> nn.Module:
        """Freezes all but the biases. Raises ConfigError where the model has none."""
        assert isinstance(model, PreTrainedModel)
        model.requires_grad_(False)
        heads = head(model, self._task) or []
        biases = [
            parameter for name, parameter in model.named_parameters()
            if name.rpartition(".")[2] == "bias" and name.partition(".")[0] not in heads
        ]  # fmt: skip
        if not biases:
            raise ConfigError(
                f"tuning.method: bitfit trains biases, and a {model.config.model_type} model has none; bart, gpt2, "
                "bert, roberta, distilbert and qwen2 models have some. Use ln_tuning or lora"
            )
        for parameter in biases:
            parameter.requires_grad_(True)
        for part in heads:
            model.get_submodule(part).requires_grad_(True)
        self._biases = len(biases)
        return model

    def notes(self) -> list[str]:
        """How many biases there are."""
        return [f"{self._biases:,} biases"]
