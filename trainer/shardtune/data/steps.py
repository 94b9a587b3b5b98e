"""Micro-batches for this rank, step after step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardtune.data.order import Order
from shardtune.data.tables import TokenTable
from shardtune.protocols import Batch, Batching, Budget, Tokens


class Step(NamedTuple):
    """One optimizer step: which examples, and this rank's part of them."""

    examples: NDArray[np.int64]
    """Positions in the training data, over all ranks."""
    micro_batches: list[Batch]
    """As many on every rank; one without examples is blank."""
    ends_epoch: bool
    """Whether the next step begins an epoch."""


class StepSource(Protocol):
    """Gives the steps of a run to one rank."""

    def at(self, epoch: int, cursor: int) -> Step:
        """The step that begins after `cursor` examples of the epoch. Raises DataError where its data is wrong."""
        ...

    def close(self) -> None:
        """Ends what was begun for later steps."""
        ...


class Steps:
    """Lays out the examples of any step for one rank; implements StepSource."""

    def __init__(
        self,
        table: TokenTable,
        order: Order,
        batching: Batching,
        collate: Callable[[Sequence[Tokens], bool], Batch],
        rank: int,
        ranks: int,
        budget: Budget,
    ) -> None:
        self.order = order
        self._table = table
        self._batching = batching
        self._collate = collate
        self._rank = rank
        self._ranks = ranks
        self._budget = budget

    def at(self, epoch: int, cursor: int) -> Step:
        """The step that begins at example `cursor` of the epoch's order."""
        examples = self.order.take(epoch, cursor)
        lengths = self._table.lengths[examples]
        layout = self._batching.layout(lengths, self._ranks, self._budget)
        micro_batches = [self._batch(examples, positions) for positions in layout[self._rank]]
        return Step(examples, micro_batches, cursor + len(examples) == self.order.examples_of(epoch))

    def close(self) -> None:
        """Nothing was begun."""

    def _batch(self, examples: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        if len(positions):
            chosen = [self._table[int(examples[position])] for position in positions]
            return self._collate(chosen, self._batching.packed)
        # Sharded models compute together, so a rank without examples computes on something that does not count.
        return self._collate([self._table[int(examples[0])]], self._batching.packed).blank()
