"""Micro-batches for this rank, step after step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shardtune.data.order import Order
from shardtune.data.tables import TokenTable
from shardtune.examples import Batch, Budget, Tokens
from shardtune.protocols import Batching


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


class Layout(NamedTuple):
    """How a rank gets its part of a step."""

    batching: Batching
    collate: Callable[[Sequence[Tokens], bool], Batch]
    rank: int
    ranks: int
    budget: Budget

    def micro_batches(self, lengths: NDArray[np.int64], example: Callable[[int], Tokens]) -> list[Batch]:
        """This rank's micro-batches of a step's examples, given their `lengths` [n, 2], and each by its position."""
        layout = self.batching.layout(lengths, self.ranks, self.budget)
        return [self._batch(positions.tolist(), example) for positions in layout[self.rank]]

    def _batch(self, positions: list[int], example: Callable[[int], Tokens]) -> Batch:
        if positions:
            return self.collate([example(position) for position in positions], self.batching.packed)
        # Sharded models compute together, so a rank without examples computes on something that does not count.
        return self.collate([example(0)], self.batching.packed).blank()


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
        self._layout = Layout(batching, collate, rank, ranks, budget)

    def at(self, epoch: int, cursor: int) -> Step:
        """The step that begins at example `cursor` of the epoch's order."""
        examples = self.order.take(epoch, cursor)
        micro_batches = self._layout.micro_batches(
            self._table.lengths[examples], lambda position: self._table[int(examples[position])]
        )
        return Step(examples, micro_batches, cursor + len(examples) == self.order.examples_of(epoch))

    def close(self) -> None:
        """Nothing was begun."""
