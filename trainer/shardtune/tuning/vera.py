"""Trained scales between random projections (VeRA, Kopiczko et al. 2023, arXiv:2310.11454), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardtune.protocols import Weights
from shardtune.tuning.peft_adapter import LinearAdapter, has_transposed
from shardtune.world import World

if TYPE_CHECKING:
    from peft import PeftModel, VeraConfig

PROJECTIONS = ("vera_A", "vera_B")


class Vera(LinearAdapter):
    """Implements the Tuning protocol: y = W x + b ∘ (B (d ∘ (A x))), b [d_out] and d [r] trained.

    A [r, largest d_in] and B [largest d_out, r] are random buffers that all layers share, each using the part of its
    own size. Every rank draws them whole, from PEFT's own seed, and they are saved with the adapter.
    """

    def __init__(self, task: str, rank: int, dropout: float, targets: str | Sequence[str]) -> None:
        super().__init__(task, targets)
        self._rank = rank
        self._dropout = dropout

    def peft_config(self, model: PreTrainedModel) -> VeraConfig:
        """PEFT's settings."""
        from peft import VeraConfig

        matched = self.match(model)
        return VeraConfig(
            r=self._rank,
            vera_dropout=self._dropout,
            target_modules=matched,
            fan_in_fan_out=has_transposed(model, matched),
            save_projection=True,
        )

    def apply(self, model: nn.Module) -> PeftModel:
        """Wraps `model` in a PeftModel, and draws the projections again, which PEFT has moved to the meta device."""
        wrapped = super().apply(model)
        config: Any = wrapped.peft_config["default"]
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name in PROJECTIONS:  # one after the other from one generator, as PEFT does
            buffers: Any = getattr(wrapped.base_model, name)
            drawn = torch.empty(buffers["default"].shape)
            buffers["default"] = nn.init.kaiming_uniform_(drawn, generator=generator)
        return wrapped

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """The values of the base and of the plain initialization; the projections get the dtype computed in."""
        frozen = next(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        for name in PROJECTIONS:
            buffers: Any = getattr(model.base_model, name)
            buffers["default"] = buffers["default"].to(weights.dtype(frozen))
        return weights
