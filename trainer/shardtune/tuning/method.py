"""What most methods have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from shardtune.protocols import Weights
from shardtune.quantization import Quantization
from shardtune.world import World

if TYPE_CHECKING:  # takes seconds to import
    from peft import PeftConfig, PeftModel


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

    def result(
        self, model: nn.Module, trained: dict[str, Tensor], initial: Weights
    ) -> tuple[dict[str, Tensor], PeftConfig]:
        """The trained tensors as PEFT saves them, and the settings that `model` was wrapped with."""
        from peft.utils import get_peft_model_state_dict

        whole = cast("PeftModel", model)
        state = get_peft_model_state_dict(whole, state_dict=trained, save_embedding_layers=False)
        return state, whole.peft_config["default"]
