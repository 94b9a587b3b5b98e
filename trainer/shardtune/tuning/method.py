"""What most methods have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shardtune.protocols import Weights
from shardtune.quantization import Quantization
from shardtune.world import World

if TYPE_CHECKING:  # takes seconds to import, and most runs train no adapter
    from peft import PeftConfig


class Method:
    """Implements the Tuning protocol but for `apply`, for methods that need nothing more."""

    makes_adapter = False
    quantization: Quantization | None = None
    trained_dtype: torch.dtype = torch.float32

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """The values of the base and of the plain initialization."""
        return weights

    def result(self, state: dict[str, Tensor], settings: PeftConfig) -> tuple[dict[str, Tensor], PeftConfig]:
        """What was trained, as it is."""
        return state, settings

    def lr_scale(self, name: str) -> float:
        """The same learning rate for all."""
        return 1.0

    def notes(self) -> list[str]:
        """Nothing."""
        return []
