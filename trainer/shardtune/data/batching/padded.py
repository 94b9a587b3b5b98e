"""Micro-batches in the step's own order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shardtune.examples import Budget


def deal(positions: NDArray[np.int64], ranks: int, micro_examples: int) -> list[list[NDArray[np.int64]]]:
    """Cuts `positions` into near-equal runs and deals them to the ranks in turn: layout[rank][micro-batch].

    Every rank gets as many micro-batches, of at most `micro_examples`; where examples run out they are empty.
    """
    rounds = max(1, -(-len(positions) // (ranks * micro_examples)))
    return _in_turn(np.array_split(positions, rounds * ranks), ranks)


def deal_slots(
    positions: NDArray[np.int64], lengths: NDArray[np.int64], ranks: int, micro_slots: int
) -> list[list[NDArray[np.int64]]]:
    """Cuts `positions` into runs of at most `micro_slots` slots and deals them to the ranks in turn.

    A run of c examples takes c · (longest source + longest target) slots; an example that alone takes more than
    `micro_slots` is a run of its own. There are as few rounds as that allows, and within them the largest run is as
    small as it can be, so that ranks finish together. `lengths` is [n, 2] and is indexed by `positions`.
    """
    sources, targets = lengths[positions].T.tolist()
    runs = len(positions)
    rounds = max(1, -(-len(_greedy_cuts(sources, targets, micro_slots, runs) or ()) // ranks))
    # The greedy cut has the fewest runs of any, so their number never grows with the limit: bisection is exact.
    low, high = 0, micro_slots
    while low < high:
        limit = (low + high) // 2
        if _greedy_cuts(sources, targets, limit, rounds * ranks) is None:
            low = limit + 1
        else:
            high = limit
    cuts = _greedy_cuts(sources, targets, high, rounds * ranks)
    assert cuts is not None
    # Runs that begin where all examples are used up are empty.
    starts = cuts + [len(positions)] * (rounds * ranks - len(cuts) + 1)
    return _in_turn([positions[start:stop] for start, stop in pairwise(starts)], ranks)


def _greedy_cuts(sources: list[int], targets: list[int], limit: int, most: int) -> list[int] | None:
    """Where runs of at most `limit` slots begin, each as long as can be; None if there are more than `most`."""
    starts = []
    count = source = target = 0
    for position, (s, t) in enumerate(zip(sources, targets, strict=True)):
        source, target = max(source, s), max(target, t)
        count += 1
        if position and count * (source + target) <= limit:
            continue
        if len(starts) == most:
            return None
        starts.append(position)
        count, source, target = 1, s, t
    return starts


def _in_turn(runs: list[NDArray[np.int64]], ranks: int) -> list[list[NDArray[np.int64]]]:
    """Neighbours go to different ranks in the same round."""
    return [runs[rank::ranks] for rank in range(ranks)]


def lay_out(
    positions: NDArray[np.int64], lengths: NDArray[np.int64], ranks: int, budget: Budget
) -> list[list[NDArray[np.int64]]]:
    """Consecutive runs of `positions` within the budget, dealt to the ranks in turn."""
    if budget.examples is not None:
        return deal(positions, ranks, budget.examples)
    assert budget.tokens is not None
    return deal_slots(positions, lengths, ranks, budget.tokens)


class Padded:
    """Implements the Batching protocol."""

    packed = False

    def layout(self, lengths: NDArray[np.int64], ranks: int, budget: Budget) -> list[list[NDArray[np.int64]]]:
        """The step's order, cut into runs."""
        return lay_out(np.arange(len(lengths)), lengths, ranks, budget)
