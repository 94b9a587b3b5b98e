"""PiSSA: adapters that begin as the principal part of a weight (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.protocols import Adapter, Piece, Saved, Weights
from shardtune.tuning.initial_values import (
    AdaptedLayer,
    Factors,
    InitialValues,
    adapted_layers,
    factorize,
    singular_factors,
    weighted,
)
from shardtune.tuning.lora import Lora
from shardtune.world import World

OVERSAMPLING = 10
"""Directions that a randomized decomposition finds beside those asked for, which makes these more exact."""
BEGAN = "pissa.began"
"""What a checkpoint calls A₀ and B₀."""


class Pissa(Lora):
    """Implements the Tuning protocol: s B₀ A₀ is the nearest matrix of rank r to W, and W - s B₀ A₀ is frozen.

    The result is beside W itself: a LoRA of rank 2 r that adds s (B A - B₀ A₀).
    """

    def __init__(
        self,
        task: str,
        rank: int,
        alpha: float,
        targets: str | Sequence[str],
        trained_dtype: torch.dtype = torch.float32,
        iterations: int | None = None,
    ) -> None:
        """`iterations`: of a randomized decomposition (Halko et al. 2009, arXiv:0909.4061); None: an exact one."""
        super().__init__(task, rank, alpha, 0.0, targets, trained_dtype)
        self._iterations = iterations
        self._began: dict[str, Tensor] = {}
        self._saved: Saved | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """As LoRA. Raises ConfigError where a layer has fewer singular values than the rank."""
        tuned = super().apply(model)
        check_rank(adapted_layers(tuned))
        return tuned

    def choose(self, model: PreTrainedModel) -> list[str]:
        """As LoRA. Raises ConfigError for a layer that shares its weight, as the other would lose the principal part,
        too."""
        places = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        chosen = super().choose(model)
        for name in chosen:
            if places[model.get_parameter(f"{name}.weight")] > 1:
                raise ConfigError(f"tuning.targets: {name} shares its weight with another; leave it out, or use lora")
        return chosen

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """A₀ and B₀ by singular value decompositions that the ranks divide, or those of the run that is gone on with;
        and the base without their product."""
        layers = adapted_layers(model)
        rounded = self.trained_dtype  # so that exactly what is added is taken away
        if self._saved is not None:
            found = [_began(layer, self._saved) for layer in layers]
        else:
            found = factorize(layers, self._principal(weights, world), world)
        given, lowered = {}, {}
        for layer, factors in zip(layers, found, strict=True):
            down, up = (part.to(rounded) for part in factors)
            given |= {layer.down: down, layer.up: up}
            product = (layer.scale * up.float(), down.float())
            lowered[layer.weight] = (product[1].T, product[0].T) if layer.transposed else product
        self._began = given
        return InitialValues(weights, given, lowered)

    def recall(self, saved: Saved) -> None:
        """A₀ and B₀ are read: found anew, by other software or on another device, they would be others, and so would
        the frozen base."""
        self._saved = saved

    def pieces(self, world: World) -> Iterator[Piece]:
        """A₀ and B₀, of which each rank brings its share."""
        for name, value in self._began.items():
            start, stop = (value.numel() * rank // world.size for rank in (world.rank, world.rank + 1))
            yield Piece(name, BEGAN, tuple(value.shape), start, value.view(-1)[start:stop])

    def result(self, model: nn.Module, trained: dict[str, Tensor], initial: Weights) -> Adapter:
        """[A; A₀] and [B, -B₀], as PEFT's `path_initial_model_for_weight_conversion` gives."""
        plain = super().result(model, trained, initial)
        converted = dict(plain.tensors)
        for name, value in self._began.items():
            saved = name.replace(".default.", ".")
            both = converted[saved].float(), value.float() if ".lora_A." in name else -value.float()
            converted[saved] = torch.cat(both, dim=0 if ".lora_A." in name else 1)
        settings: Any = copy.copy(plain.settings)
        settings.r, settings.lora_alpha = 2 * self._rank, 2 * self._alpha
        return plain._replace(settings=settings, tensors=converted)

    def notes(self) -> list[str]:
        """What was matched, and what it begins as."""
        how = "exact" if self._iterations is None else f"randomized, {self._iterations} iterations"
        return [*super().notes(), f"adapters begin as the {self._rank} principal directions of the weights ({how})"]

    def _principal(self, weights: Weights, world: World) -> Callable[[AdaptedLayer], Factors]:
        def factors(layer: AdaptedLayer) -> Factors:
            matrix = layer.matrix(weights).to(world.device)
            if self._iterations is None:
                return singular_factors(matrix, layer.rank, layer.scale)
            with torch.random.fork_rng():  # seeded by the name, so that it does not matter which rank draws
                torch.manual_seed(int.from_bytes(hashlib.sha256(layer.name.encode()).digest()[:7], "big"))
                sketched = min(layer.rank + OVERSAMPLING, *matrix.shape)
                left, values, right = torch.svd_lowrank(matrix, sketched, self._iterations)
            return weighted(left, values, right.T, layer.rank, layer.scale)

        return factors


def _began(layer: AdaptedLayer, saved: Saved) -> Factors:
    """A₀ and B₀ of a layer as a checkpoint has them."""
    return Factors(
        saved.read(layer.down, BEGAN, 0, layer.rank * layer.ins).view(layer.rank, layer.ins),
        saved.read(layer.up, BEGAN, 0, layer.outs * layer.rank).view(layer.outs, layer.rank),
    )


def check_rank(layers: Sequence[AdaptedLayer]) -> None:
    """Raises ConfigError where a layer has fewer singular values than the rank."""
    for layer in layers:
        if layer.rank > (most := min(layer.ins, layer.outs)):
            name = layer.name.removeprefix("base_model.model.")
            raise ConfigError(
                f"tuning.rank: {layer.rank} directions are more than the {layer.outs} x {layer.ins} weight of {name} "
                f"has; at most {most}"
            )
