"""What ranks would keep in a checkpoint, held in memory and read as from one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardtune.protocols import Piece


class Kept:
    """Implements the Saved protocol. Fails where the pieces of all ranks do not hold every element exactly once."""

    def __init__(self, pieces: Iterable[Piece], step: int = 1, tuning: Mapping[str, Any] | None = None) -> None:
        self.step = step
        self.tuning: dict[str, Any] = json.loads(json.dumps(dict(tuning or {})))
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        times: dict[tuple[str, str], Tensor] = {}
        for name, what, shape, start, values in pieces:
            key, count = (name, what), math.prod(shape)
            assert self._shapes.setdefault(key, shape) == shape, key
            assert values.dim() == 1, key
            assert values.is_contiguous(), key
            whole = self._tensors.setdefault(key, torch.empty(count, dtype=values.dtype))
            assert whole.dtype == values.dtype, key
            whole[start : start + len(values)] = values.cpu()
            times.setdefault(key, torch.zeros(count))[start : start + len(values)] += 1
        for key, seen in times.items():
            assert bool((seen == 1).all()), f"{key}: elements are there {seen.unique().tolist()} times"

    def whats(self, name: str) -> dict[str, tuple[int, ...]]:
        return {what: shape for (owner, what), shape in self._shapes.items() if owner == name}

    def read(self, name: str, what: str, start: int, stop: int) -> Tensor:
        return self._tensors[name, what][start:stop].clone()

    def elements(self) -> int:
        return sum(map(len, self._tensors.values()))
