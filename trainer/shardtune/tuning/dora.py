"""DoRA: weights as a direction, tuned by LoRA, and a trained magnitude (Liu et al. 2024, arXiv:2402.09353), by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from shardtune.protocols import Weights
from shardtune.quantization import Quantization
from shardtune.tuning.initial_values import AdaptedLayer, OverWeights, adapted_layers
from shardtune.tuning.lora import Lora
from shardtune.world import World


class Dora(Lora):
    """Implements the Tuning protocol: row i of the weight is m_i v_i / |v_i| with V = W + s B A, and m trained too.

    m [d_out] begins as the rows' norms of W as the model computes with it, so that the model begins as the base.
    """

    def options(self) -> dict[str, Any]:
        """Also the magnitudes."""
        return {"use_dora": True}

    def apply(self, model: nn.Module) -> nn.Module:
        """As LoRA; magnitudes get their values later, as there are none on the meta device."""
        with _without_norms():
            tuned = super().apply(model)
        for layer in adapted_layers(tuned):
            nn.init.ones_(tuned.get_parameter(layer.magnitude))
        return tuned

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """Magnitudes from the rows of the base."""
        return _WithMagnitudes(weights, {layer.magnitude: layer for layer in adapted_layers(model)}, self.quantization)


@contextmanager
def _without_norms() -> Iterator[None]:
    """PEFT takes the norms when it makes the layer, and a quantized layer has no matrix on the meta device."""
    from peft.tuners.lora.dora import DoraLinearLayer

    def update_layer(self: Any, *, lora_B: Tensor, **others: Any) -> None:
        self.weight = nn.Parameter(torch.empty(len(lora_B), device=lora_B.device))

    with mock.patch.object(DoraLinearLayer, "update_layer", update_layer):
        yield


class _WithMagnitudes(OverWeights):
    """The rows' norms, computed when they are asked for: at most one matrix is held."""

    def __init__(self, weights: Weights, layers: dict[str, AdaptedLayer], quantization: Quantization | None) -> None:
        super().__init__(weights)
        self._layers = layers
        self._quantization = quantization

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Magnitudes are float32, from W as it is stored: rounded to the compute dtype, or quantized."""
        layer = self._layers.get(name)
        if layer is None:
            return self._weights.read(name, start, stop)
        if layer.quantized and self._quantization is not None:
            whole = layer.rows(self._weights, 0, layer.outs)
            return self._quantization.round_trip(whole)[start:stop].float().norm(dim=1)
        return layer.rows(self._weights, start, stop).float().norm(dim=1)
