"""Rotated weights (Qiu et al. 2023, arXiv:2306.07280), by PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.tuning.peft_adapter import LinearAdapter

if TYPE_CHECKING:
    from peft import OFTConfig, PeftModel


class Oft(LinearAdapter):
    """Implements the Tuning protocol: y = W R x, R a block-diagonal rotation whose blocks are [block, block].

    A block is a rotation by the Cayley transform of a trained skew-symmetric matrix (its upper triangle is the
    parameter), the inverse in it replaced by five terms of a Neumann series, as is PEFT's default. All layers have the
    same block size, as PEFT's saved settings know only one: the largest up to `block_size` that divides every layer's
    input size.
    """

    transposed = False

    def __init__(self, task: str, block_size: int, dropout: float, targets: str | Sequence[str]) -> None:
        super().__init__(task, targets)
        self._block_size = block_size
        self._dropout = dropout

    def peft_config(self, model: PreTrainedModel) -> OFTConfig:
        """PEFT's settings. Raises ConfigError where no block size fits all layers."""
        from peft import OFTConfig

        matched = self.match(model)
        sizes = sorted({int(getattr(model.get_submodule(name), "in_features")) for name in matched})  # noqa: B009
        common = math.gcd(*sizes)
        block_size = max(size for size in range(1, self._block_size + 1) if common % size == 0)
        if block_size == 1:
            raise ConfigError(
                f"tuning.block_size: no size from 2 to {self._block_size} divides the inputs of all target layers, "
                f"which have {', '.join(map(str, sizes))} elements; name other tuning.targets, or a larger block_size"
            )
        if block_size < self._block_size:
            self._notes.append(
                f"rotations of size {block_size}, not {self._block_size}: the largest that divides the inputs of all "
                f"layers, which have {', '.join(map(str, sizes))} elements"
            )
        return OFTConfig(
            r=0,
            oft_block_size=block_size,
            module_dropout=self._dropout,
            target_modules=matched,
            use_cayley_neumann=True,
        )

    def apply(self, model: nn.Module) -> PeftModel:
        """Wraps `model` in a PeftModel, and gives the indices of the triangles their values again."""
        from peft.tuners.oft.layer import OFTRotationModule

        wrapped = super().apply(model)
        for module in wrapped.modules():
            if isinstance(module, OFTRotationModule):  # PEFT has moved them to the meta device with the rest
                module.rows, module.cols = torch.triu_indices(module.block_size, module.block_size, 1)
        return wrapped
