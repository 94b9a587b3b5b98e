"""LoftQ: adapters that begin as the correction of quantization's error (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from torch import nn

from shardtune.protocols import Saved, Weights
from shardtune.tuning.initial_values import (
    AdaptedLayer,
    Factors,
    InitialValues,
    adapted_layers,
    factorize,
    singular_factors,
)
from shardtune.tuning.lora import Lora
from shardtune.tuning.pissa import check_rank
from shardtune.world import World


class Loftq(Lora):
    """Implements the Tuning protocol: the base is q(W), and s B A begins as the nearest matrix of rank r to W - q(W).

    One iteration of the paper's algorithm 1: with more of them the base would be the quantized W - s B A, which is
    not the quantized model that others load. Targets that are not quantized begin as in LoRA.
    """

    _gone_on_with = False

    def apply(self, model: nn.Module) -> nn.Module:
        """As LoRA. Raises ConfigError where a layer has fewer singular values than the rank."""
        tuned = super().apply(model)
        check_rank([layer for layer in adapted_layers(tuned) if layer.quantized])
        return tuned

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """A and B by singular value decompositions that the ranks divide."""
        if self._gone_on_with:
            return weights
        quantization = self.quantization
        assert quantization is not None

        def correction(layer: AdaptedLayer) -> Factors:
            stored = layer.rows(weights, 0, layer.outs).to(world.device)
            error = layer.matrix(weights).to(world.device) - quantization.round_trip(stored).float()
            return singular_factors(error, layer.rank, layer.scale)

        layers = [layer for layer in adapted_layers(model) if layer.quantized]
        given = {}
        for layer, factors in zip(layers, factorize(layers, correction, world), strict=True):
            given |= {layer.down: factors.down, layer.up: factors.up}
        return InitialValues(weights, given)

    def recall(self, saved: Saved) -> None:
        """A and B are in the checkpoint, and need not be computed."""
        self._gone_on_with = True

    def notes(self) -> list[str]:
        """What was matched, and what it begins as."""
        return [*super().notes(), "adapters begin as the largest part of the quantization's error"]
