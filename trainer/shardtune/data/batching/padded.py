"""Micro-batches in the step's own order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardtune.protocols import Budget


def deal(positions: NDArray[np.int64], ranks: int, micro_examples: int) -> list[list[NDArray[np.int64]]]:
    """Cuts `positions` into near-equal runs and deals them to the ranks in turn: layout[rank][micro-batch].

    Every rank gets as many micro-batches, of at most `micro_examples`; where examples run out they are empty.
    """
    rounds = max(1, -(-len(positions) // (ranks * micro_examples)))
    runs = np.array_split(positions, rounds * ranks)
    return [[runs[turn * ranks + rank] for turn in range(rounds)] for rank in range(ranks)]


class Padded:
    """Implements the Batching protocol."""

    packed = False

    def layout(self, lengths: NDArray[np.int64], ranks: int, budget: Budget) -> list[list[NDArray[np.int64]]]:
        """The step's order, cut into runs."""
        return deal(np.arange(len(lengths)), ranks, budget.examples or 1)
