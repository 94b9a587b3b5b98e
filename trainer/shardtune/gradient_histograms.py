"""Histograms of gradients while a run goes on: the same intervals always, so that ranks' counts can be added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardtune.protocols import Strategy
from shardtune.tracking.tracker import Histogram
from shardtune.world import World

SMALLEST, LARGEST, IN_DECADE = -12, 6, 10
CHUNK = 2**20
"""Elements sorted into intervals at once: 12 MiB."""
SUMMED_AT_ONCE = 64
"""Parameters whose counts are summed over ranks in one exchange."""


def edges() -> NDArray[np.float64]:
    """Of the intervals: ten a decade from 1e-12 to 1e6 on both sides of 0, one around it, and one for what is beyond
    on each side; float32 numbers, as gradients are."""
    sizes = np.logspace(SMALLEST, LARGEST, (LARGEST - SMALLEST) * IN_DECADE + 1).astype(np.float32)
    most = np.finfo(np.float32).max
    return np.concatenate([[-most], -sizes[::-1], sizes, [most]]).astype(np.float64)


def counted(values: Tensor, inner: Tensor) -> Tensor:
    """Of finite 1-D `values`: how many lie in each interval, their sum and the sum of their squares; float64 [k + 2].

    `inner`: float32 [k - 1], the edges but for the outermost, on the device of `values`.
    """
    intervals = len(inner) + 1
    found = torch.zeros(intervals + 2, dtype=torch.float64, device=values.device)
    for chunk in values.split(CHUNK):
        numbers = chunk.float()
        found[:intervals] += torch.bincount(torch.bucketize(numbers, inner, right=True), minlength=intervals)
        exact = numbers.double()
        found[intervals] += exact.sum()
        found[intervals + 1] += exact.square().sum()
    return found


class GradientHistograms:
    """Implements the Strategy protocol: the same strategy, whose step begins with histograms where they are due.

    They are of the step's gradients before clipping, one for each trained parameter, of its elements on all ranks.
    """

    def __init__(
        self,
        strategy: Strategy,
        names: Sequence[str],
        every: int,
        step: Callable[[], int],
        world: World,
        write: Callable[[int, Mapping[str, Histogram]], None],
    ) -> None:
        """`names`: the trained parameters', the same on every rank. `every`: steps between two of a parameter.
        `step`: the steps done before the present one. `write` is called on every rank."""
        self._strategy = strategy
        self._rows = {name: row for row, name in enumerate(names)}
        self._every = every
        self._step_done = step
        self._world = world
        self._write = write
        self._edges = edges()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the strategy's own."""
        return getattr(self._strategy, name)

    def step(self, lr: float, scale: float) -> None:
        """The strategy's step."""
        number = self._step_done() + 1
        if number % self._every == 0:
            self._write(number, self._histograms())
        self._strategy.step(lr, scale)

    @torch.no_grad()
    def _histograms(self) -> dict[str, Histogram]:
        intervals = len(self._edges) - 1
        own = np.zeros((len(self._rows), intervals + 2))
        inner: dict[torch.device, Tensor] = {}
        for shard in self._strategy.shards():
            gradient = shard.gradient
            if gradient is None:
                continue
            if gradient.device not in inner:
                inner[gradient.device] = torch.tensor(self._edges[1:-1], dtype=torch.float32, device=gradient.device)
            own[self._rows[shard.name]] += counted(gradient, inner[gradient.device]).cpu().numpy()
        found = {}
        names = list(self._rows)
        for start in range(0, len(names), SUMMED_AT_ONCE):
            part = own[start : start + SUMMED_AT_ONCE]
            sums = np.array(self._world.sum(part.ravel().tolist())).reshape(part.shape)
            for name, row in zip(names[start : start + SUMMED_AT_ONCE], sums, strict=True):
                if row[:intervals].any():
                    found[f"gradients/{name}"] = Histogram(self._edges, row[:intervals], row[-2], row[-1])
        return found
