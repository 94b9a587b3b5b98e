"""Partial fine-tuning: some parameters keep their pretrained values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.layers import layer_stacks
from shardtune.tuning.method import Method


class Freeze(Method):
    """Implements the Tuning protocol.

    Frozen are the first `layers` layers of every stack (encoder and decoder each), the input embeddings and whatever
    is tied to them if `embeddings`, and the parameters whose names a regular expression of `patterns` finds.
    """

    def __init__(self, layers: int, embeddings: bool, patterns: Sequence[str]) -> None:
        self._layers = layers
        self._embeddings = embeddings
        self._patterns = [_compiled(pattern) for pattern in patterns]

    def apply(self, model: nn.Module) -> nn.Module:
        """Freezes what the options name.

        Raises ConfigError where an option matches nothing, or where nothing is left to train.
        """
        model.requires_grad_(True)
        if self._layers:
            stacks = layer_stacks(model).values()
            longest = max((len(stack) for stack in stacks), default=0)
            if self._layers > longest:
                raise ConfigError(f"tuning.layers: cannot freeze {self._layers} layers of the model's {longest}")
            for stack in stacks:
                for layer in list(stack)[: self._layers]:
                    layer.requires_grad_(False)
        if self._embeddings and isinstance(model, PreTrainedModel):
            embeddings = model.get_input_embeddings()
            if isinstance(embeddings, nn.Module):
                embeddings.requires_grad_(False)
        for pattern in self._patterns:
            found = [parameter for name, parameter in model.named_parameters() if pattern.search(name)]
            if not found:
                names = [name for name, _ in model.named_parameters()]
                raise ConfigError(
                    f"tuning.patterns: {pattern.pattern!r} finds none of the {len(names)} parameters, "
                    f"such as {', '.join(names[:: max(1, len(names) // 5)][:5])}"
                )
            for parameter in found:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("tuning: everything is frozen, so there is nothing to train")
        return model


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"tuning.patterns: {pattern!r} is no regular expression: {error}") from None
