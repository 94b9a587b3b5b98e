"""What each rank holds of the model after it was prepared: bytes of quantized weights, of their scales, of the rest."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from shardtune.model.quantized import QuantizedLinear
from shardtune.strategy.parameters import held_bytes
from shardtune.text_table import table


class Stored(NamedTuple):
    """Bytes that one rank holds of the model, without gradients and the optimizer."""

    quantized: int
    """The bits of 4- and 8-bit weights."""
    scales: int
    """Their scales, which every rank holds whole."""
    nested_scales: int
    """The scales of scales."""
    frozen: int
    """Other parameters that are not trained."""
    trained: int
    """As the model computes with them; where the optimizer keeps unrounded ones, without these."""


def stored(model: nn.Module) -> Stored:
    """What this rank holds of a prepared model."""
    bits, scales, nested, frozen, trained = 0, 0, 0, 0, 0
    quantized = set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            quantized.add(module.weight)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "absmax":
                    scales += buffer.nbytes
                else:
                    nested += buffer.nbytes
    for parameter in model.parameters():
        size = held_bytes(parameter)
        if parameter in quantized:
            bits += size
        elif parameter.requires_grad:
            trained += size
        else:
            frozen += size
    return Stored(bits, scales, nested, frozen, trained)


def describe_stored(ranks: list[Stored]) -> str:
    """A table of what each rank holds, in megabytes; without empty columns, ranks alike in one line."""
    names = [name for name in Stored._fields if any(getattr(rank, name) for rank in ranks)]
    alike: dict[Stored, list[str]] = {}
    for index, rank in enumerate(ranks):
        alike.setdefault(rank, []).append(str(index))
    rows = [[" ".join(which), *(_megabytes(getattr(rank, name)) for name in names)] for rank, which in alike.items()]
    return table(rows, ["rank", *(f"{name.replace('_', ' ')} MB" for name in names)])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{1 if size >= 1e8 else 4}f}"
