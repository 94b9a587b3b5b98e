"""What most methods have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from shardtune.protocols import Adapter, Piece, Saved, Strategy, Task, Weights
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

    def result(self, model: nn.Module, trained: dict[str, Tensor], initial: Weights) -> Adapter:
        """What PEFT itself would save of the trained parameters."""
        from peft.utils import get_peft_model_state_dict

        parameters = dict(model.named_parameters(remove_duplicate=False))
        kept = {  # VeRA's projections, for one
            name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name not in parameters
        }
        tensors = get_peft_model_state_dict(model, state_dict={**trained, **kept}, save_embedding_layers=False)
        return Adapter(tensors, settings_of(model))

    def lr_scale(self, name: str) -> float:
        """The same learning rate for all."""
        return 1.0

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def remembered(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def recall(self, saved: Saved) -> None:
        """Nothing is sought."""

    def pieces(self, world: World) -> Iterator[Piece]:
        """Nothing."""
        return iter(())

    def in_training(self, task: Task, strategy: Strategy, total_steps: int, world: World) -> tuple[Task, Strategy]:
        """The task and the strategy themselves."""
        return task, strategy


def settings_of(model: nn.Module) -> PeftConfig:
    """PEFT's settings of the adapter in a tuned model."""
    return cast(Any, model).peft_config["default"]


def heads_of(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The modules beside an adapter that are trained whole, by the names that PEFT gives them in files."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside = {n.removeprefix(f"{name}."): t for n, t in trained.items() if n.startswith(f"{name}.")}
            saved: dict[str, Tensor] = cast(Any, module).adapter_state_dict("default", inside)
            found |= {f"{name}.{key}": tensor for key, tensor in saved.items()}
    return found
