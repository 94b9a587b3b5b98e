"""What every optimizer is made from: the groups of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


def _same_for_all(name: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """Keys that every optimizer has. The recipes below it implement the MakeOptimizer protocol."""

    lr: float
    """Until the first step sets it."""
    weight_decay: float
    lr_scale: Callable[[str], float] = _same_for_all
    """What the learning rate of a parameter is multiplied by, from its name."""

    elementwise = True
    """An element's update depends on that element alone."""

    def groups(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """See `parameter_groups`."""
        return parameter_groups(named_parameters, self.weight_decay, self.lr_scale)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: for each learning rate the parameters with weight decay, then biases and norms.

    Biases and norms are the parameters of fewer than two dimensions and those whose name ends in "bias"; they have no
    weight decay. A group's `lr_scale` is what its learning rate is multiplied by, see `set_learning_rate`. A group
    without parameters is left out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        # Under ZeRO-3 a parameter is empty until it is gathered; DeepSpeed keeps its shape beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decay = 0.0 if len(shape) < 2 or name.endswith("bias") else weight_decay
        groups.setdefault((lr_scale(name), decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1]))
    ]
