"""Which examples make which optimizer step: decided by (seed, epoch, cursor) and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OF_A_PASS = 1
"""Ends the seed of a pass over one source, whose numbers could otherwise be those of an epoch's seed."""


class Portion(NamedTuple):
    """A source's part of the training data: consecutive examples."""

    examples: int
    weight: float = 1.0
    """How often an epoch visits each of them, on average: 2 is twice, 0.5 each in one of two epochs. An epoch visits
    at least one: weight x examples >= 1."""


class TokenLimit(NamedTuple):
    """A step takes the next examples until one more would exceed `limit`, and at least one."""

    limit: int
    lengths: NDArray[np.int64]
    """[n]: source and target tokens of each example."""


class Order:
    """The examples of every step of every epoch.

    Each source is an endless stream of passes over its examples, each pass in an order drawn from (seed, source, pass).
    Epoch e takes the next weight x examples of every stream, so that all are visited equally often in the long run, and
    shuffles them by (seed, epoch). Without shuffling, streams are in file order, and an epoch takes one source's part
    after the other. A step takes the next ones of the epoch; the epoch's last step takes what is left.
    """

    def __init__(
        self,
        examples: int,
        per_step: int | TokenLimit,
        seed: int,
        shuffle: bool,
        sources: Sequence[Portion] = (),
    ) -> None:
        """`per_step`: examples of a step, or the tokens it may have. `sources`: whose examples they are, in order; by
        default all are of one source that is visited once an epoch."""
        self._sources = list(sources) or [Portion(examples)]
        assert sum(source.examples for source in self._sources) == examples
        assert all(source.weight * source.examples >= 1 for source in self._sources if source.examples)
        self._per_step = per_step
        self._seed = seed
        self._shuffle = shuffle
        self._drawn: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def examples(self) -> int:
        """Examples of the first epoch."""
        return self.examples_of(0)

    def examples_of(self, epoch: int) -> int:
        """How many examples the epoch visits; epochs differ by at most one for each source."""
        return sum(stop - start for start, stop in self._slices(epoch))

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of the epoch."""
        examples = self.examples_of(epoch)
        if isinstance(self._per_step, int):
            return math.ceil(examples / self._per_step)
        steps = cursor = 0
        totals = self._epoch(epoch)[1]
        while cursor < examples:
            cursor = self._stop(totals, cursor)
            steps += 1
        return steps

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs; a part of an epoch is rounded up to whole steps."""
        whole = math.floor(epochs)
        steps = sum(self.steps_of(epoch) for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil(round((epochs - whole) * self.steps_of(whole), 6))
        return steps

    def take(self, epoch: int, cursor: int) -> NDArray[np.int64]:
        """The indices of the examples that make the step beginning at `cursor` of `epoch`."""
        visited, totals = self._epoch(epoch)
        return visited[cursor : self._stop(totals, cursor)]

    def _stop(self, totals: NDArray[np.int64], cursor: int) -> int:
        """Where the step that begins at `cursor` ends."""
        if isinstance(self._per_step, int):
            return cursor + self._per_step
        before = int(totals[cursor - 1]) if cursor else 0
        return max(cursor + 1, int(np.searchsorted(totals, before + self._per_step.limit, side="right")))

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's examples in order, and how many tokens they have up to each one (empty if that is not asked)."""
        if self._drawn is None or self._drawn[0] != epoch:
            visited, totals = self._visited(epoch), np.zeros(0, np.int64)
            if isinstance(self._per_step, TokenLimit):
                totals = np.cumsum(self._per_step.lengths[visited])
            self._drawn = epoch, visited, totals
        return self._drawn[1:]

    def _visited(self, epoch: int) -> NDArray[np.int64]:
        parts, first = [], 0
        for number, (source, (start, stop)) in enumerate(zip(self._sources, self._slices(epoch), strict=True)):
            parts += [first + part for part in self._stream(number, source.examples, start, stop)]
            first += source.examples
        visited = np.concatenate(parts)
        if self._shuffle:  # sorted before, so that an epoch that visits all once depends on (seed, epoch) only
            visited = np.sort(visited)[self._permutation(len(visited), epoch)]
        return visited

    def _slices(self, epoch: int) -> list[tuple[int, int]]:
        """The part of each source's stream that the epoch takes."""
        edges = [(epoch * size, (epoch + 1) * size) for size in (s.weight * s.examples for s in self._sources)]
        return [(math.floor(start + 0.5), math.floor(stop + 0.5)) for start, stop in edges]

    def _stream(self, source: int, examples: int, start: int, stop: int) -> list[NDArray[np.int64]]:
        """Elements `start` to `stop` of the endless stream of passes over a source."""
        parts = []
        while start < stop:
            number, first = divmod(start, examples)
            last = min(examples, first + stop - start)
            part = np.arange(first, last)
            if self._shuffle and last - first < examples:  # of a whole pass the order does not matter
                part = self._permutation(examples, source, number, OF_A_PASS)[first:last]
            parts.append(part)
            start += last - first
        return parts

    def _permutation(self, length: int, *seed: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([self._seed, *seed])).permutation(length)
