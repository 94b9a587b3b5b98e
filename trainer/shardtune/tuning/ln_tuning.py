"""Only the normalization layers are trained (Zhao et al. 2023, arXiv:2312.11420), by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.tuning.peft_adapter import PeftAdapter
from shardtune.tuning.targets import head

if TYPE_CHECKING:
    from peft import LNTuningConfig


class LnTuning(PeftAdapter):
    """Implements the Tuning protocol: a trained copy of each normalization layer takes its place."""

    def peft_config(self, model: PreTrainedModel) -> LNTuningConfig:
        """PEFT's settings. Raises ConfigError where there are no such layers."""
        from peft import LNTuningConfig

        beside = tuple(f"{name}." for name in head(model, self._task) or ())
        found = {name: module for name, module in normalization_layers(model).items() if not name.startswith(beside)}
        if not found:
            raise ConfigError(
                f"tuning.method: ln_tuning does not exist for {type(model).__name__}, which has no normalization "
                "layers with weights"
            )
        classes = ", ".join(sorted({type(module).__name__ for module in found.values()}))
        self._notes = [f"on {len(found):,} normalization layers ({classes})"]
        return LNTuningConfig(target_modules=list(found))


def normalization_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that normalize, whatever their class, by name.

    They have no parts, a weight (and perhaps a bias) of one dimension, and a small number that keeps them from dividing
    by zero, by which they differ from activations with a trained slope.
    """
    found = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        flat = "weight" in own and all(parameter.dim() == 1 for parameter in own.values())
        if flat and next(module.children(), None) is None and any("eps" in attribute for attribute in vars(module)):
            found[name] = module
    return found
