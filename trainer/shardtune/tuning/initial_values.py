"""Initial values that a method computes from those of the base: given, or lowered by a product of two factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shardtune.protocols import Weights
from shardtune.world import World


class Factors(NamedTuple):
    """A product of low rank, float32."""

    down: Tensor
    """A [r, d_in]."""
    up: Tensor
    """B [d_out, r]."""


class OverWeights:
    """Implements the Weights protocol as another does, for decorators that change some of the values."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def dtype(self, name: str) -> torch.dtype:
        """As it was."""
        return self._weights.dtype(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """As they were."""
        return self._weights.read(name, start, stop)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """As they were."""
        return self._weights.buffers(name)


class InitialValues(OverWeights):
    """Some parameters have values of their own, and from others a product of factors is taken away."""

    def __init__(
        self, weights: Weights, given: Mapping[str, Tensor], lowered: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> None:
        """`given`: values by parameter name; `lowered`: [rows, r] and [r, columns] in the order that the parameter is
        stored in."""
        super().__init__(weights)
        self._given = given
        self._lowered = lowered or {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter; lowered ones are float32."""
        if name in self._given:
            return self._given[name].reshape(-1)[start:stop]
        values = self._weights.read(name, start, stop)
        if name not in self._lowered:
            return values
        left, right = self._lowered[name]
        first, last = start // right.shape[1], -(-stop // right.shape[1])
        product = (left[first:last] @ right).view(-1)
        begin = start - first * right.shape[1]
        return values.float() - product[begin : begin + stop - start]


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer that has an adapter."""

    name: str
    """Of the adapted layer in the model, for `<name>.lora_A.default.weight`."""
    weight: str
    """The name by which the weight of the layer itself is read."""
    ins: int
    outs: int
    rank: int
    scale: float
    """What the product of the factors is multiplied by."""
    transposed: bool
    """Whether the weight is stored as [d_in, d_out]."""
    quantized: bool

    def rows(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of W [d_out, d_in], in the dtype that the model computes in."""
        if self.transposed:
            whole = weights.read(self.weight, 0, self.ins * self.outs).view(self.ins, self.outs)
            values = whole.T[start:stop]
        else:
            values = weights.read(self.weight, start * self.ins, stop * self.ins).view(-1, self.ins)
        return values.to(weights.dtype(self.weight))

    def matrix(self, weights: Weights) -> Tensor:
        """W [d_out, d_in], float32, unrounded."""
        stored = weights.read(self.weight, 0, self.ins * self.outs).float()
        return stored.view(self.ins, self.outs).T if self.transposed else stored.view(self.outs, self.ins)

    @property
    def down(self) -> str:
        """The name of A."""
        return f"{self.name}.lora_A.default.weight"

    @property
    def up(self) -> str:
        """The name of B."""
        return f"{self.name}.lora_B.default.weight"

    @property
    def magnitude(self) -> str:
        """The name of DoRA's magnitudes [d_out]."""
        return f"{self.name}.lora_magnitude_vector.default.weight"


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of a PeftModel that have low-rank factors."""
    from peft.tuners.lora import LoraLayer  # takes seconds, and most runs train no adapter

    names = {parameter: name for name, parameter in model.named_parameters()}  # a shared one has one name
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            weight: nn.Parameter = base.weight
            found.append(
                AdaptedLayer(
                    name, names[weight], module.in_features or 0, module.out_features or 0, module.r["default"],
                    module.scaling["default"], bool(getattr(module, "fan_in_fan_out", False)),
                    hasattr(weight, "unpacked_shape"),
                )
            )  # fmt: skip
    return found


def factorize(
    layers: Sequence[AdaptedLayer], factors: Callable[[AdaptedLayer], Factors], world: World
) -> list[Factors]:
    """`factors` of each layer, of its rank, on the CPU: the ranks divide the work, and all get the same.

    A collective.
    """
    mine = {index: factors(layers[index]) for index in range(world.rank, len(layers), world.size)}
    found = []
    for index, layer in enumerate(layers):
        own = mine.pop(index, None) or Factors(torch.empty(layer.rank, layer.ins), torch.empty(layer.outs, layer.rank))
        found.append(Factors(*(world.send(part.float().cpu().contiguous(), index % world.size) for part in own)))
    return found


def singular_factors(matrix: Tensor, rank: int, scale: float) -> Factors:
    """A and B such that `scale` B A is the nearest matrix of that rank to `matrix` [d_out, d_in] (Eckart and Young
    1936)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return weighted(left, values, right, rank, scale)


def weighted(left: Tensor, values: Tensor, right: Tensor, rank: int, scale: float) -> Factors:
    """A = √(S/s) Vᵀ and B = U √(S/s) of the `rank` largest singular values S, with s = `scale`.

    `left` U [d_out, k], `values` S [k], falling, and `right` Vᵀ [k, d_in].
    """
    root = (values[:rank] / scale).sqrt()
    return Factors(root[:, None] * right[:rank], left[:, :rank] * root)
