"""Initial values of which some come from other files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardtune.model.safetensors_files import Entry
from shardtune.protocols import Weights


class Readable(Protocol):
    """A tensor that is read by ranges."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D."""
        ...


@dataclass(frozen=True)
class MeanRepeated:
    """A tensor [n, …] whose every slice is the mean over the first dimension of the tensor in a file."""

    entry: Entry

    def read(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, float32; the file's is small and read whole."""
        slices = self.entry.shape[0]
        mean = self.entry.read(0, math.prod(self.entry.shape)).float().view(slices, -1).mean(dim=0)
        return mean[torch.arange(start, stop) % len(mean)]


class Overlay:
    """Implements the Weights protocol: other values for some parameters."""

    def __init__(self, weights: Weights, others: Mapping[str, Readable]) -> None:
        """`others`: the values of parameters by name, at least as many elements as the parameter has."""
        self._weights = weights
        self._others = others

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """From the other values where there are some."""
        other = self._others.get(name)
        return other.read(start, stop) if other is not None else self._weights.read(name, start, stop)

    def dtype(self, name: str) -> torch.dtype:
        """As without."""
        return self._weights.dtype(name)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """As without."""
        return self._weights.buffers(name)
