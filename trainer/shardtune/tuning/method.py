"""What most methods have in common."""

from __future__ import annotations

import torch
from torch import nn

from shardtune.protocols import Strategy, Task, Weights
from shardtune.quantization import Quantization
from shardtune.world import World


class Method:
    """Implements the Tuning protocol but for `apply`, for methods that need nothing more."""

    makes_adapter = False
    quantization: Quantization | None = None
    trained_dtype: torch.dtype = torch.float32

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """The values of the base and of the plain initialization."""
        return weights

    def lr_scale(self, name: str) -> float:
        """The same learning rate for all."""
        return 1.0

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def in_training(self, task: Task, strategy: Strategy, total_steps: int, world: World) -> tuple[Task, Strategy]:
        """The task and the strategy themselves."""
        return task, strategy
