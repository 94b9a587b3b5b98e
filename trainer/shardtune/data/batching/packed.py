"""Micro-batches of one row without padding."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardtune.data.batching.balance import deal_evenly, spread
from shardtune.data.batching.histogram import fill, first_fit_decreasing, multifit
from shardtune.examples import Budget

MANY_ROUNDS = 32
"""From so many on, ranks come out even by taking turns, whatever single bins hold."""

Bins: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64]]"
"""Positions of the examples, bin after bin, [n], and how many each bin holds."""


class Packed:
    """Implements the Batching protocol.

    An example takes w = s + t places, its source's and its target's. Bins are micro-batches: there are as few rounds
    as first-fit decreasing needs. What is left of the budget makes the bins alike: where there are few, examples are
    dealt to them longest first, which evens out tokens and squares; where that exceeds the budget, or there are many,
    MULTIFIT lowers the fullest.
    """

    packed = True

    def layout(self, lengths: NDArray[np.int64], ranks: int, budget: Budget) -> list[list[NDArray[np.int64]]]:
        """Bins of like cost in the same round, the costliest first, and the ranks' sums of costs even.

        The cost of an example is s² + t² + s·t: self-attention on both sides, and cross-attention.
        """
        sources, targets = lengths[:, 0].astype(np.int64), lengths[:, 1].astype(np.int64)
        sizes = sources + targets
        ascending = _argsort(sizes)
        if budget.examples is not None:
            bins = ranks * max(1, -(-len(lengths) // (ranks * budget.examples)))
            examples, counts = _spread(sizes, ascending, bins, budget.examples)
        else:
            assert budget.tokens is not None
            examples, counts = _pack(sizes, ascending, ranks, budget.tokens)
        costs = sources * sources + targets * (targets + sources)
        taken = deal_evenly(_sums(costs, (examples, counts)), ranks)
        ends = np.cumsum(counts)
        starts, stops = (ends - counts)[taken].tolist(), ends[taken].tolist()
        return [
            [examples[start:stop] for start, stop in zip(*of_rank, strict=True)]
            for of_rank in zip(starts, stops, strict=True)
        ]


def _argsort(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stable, so that all ranks agree; numpy sorts 16 bits by radix, several times as fast."""
    fits = len(sizes) and int(sizes.max()) < 2**16
    return np.argsort(sizes.astype(np.uint16) if fits else sizes, kind="stable")


def _spread(sizes: NDArray[np.int64], ascending: NDArray[np.int64], bins: int, most: int) -> Bins:
    """Bins with even sums, of at most `most` examples each."""
    descending = ascending[::-1]
    bin_of = np.array(spread(sizes[descending].tolist(), bins, most), np.int64)
    return descending[np.argsort(bin_of, kind="stable")], np.bincount(bin_of, minlength=bins)


def _pack(sizes: NDArray[np.int64], ascending: NDArray[np.int64], ranks: int, tokens: int) -> Bins:
    """Bins with even sums of at most `tokens`, as many as fill whole rounds; a longer example is alone."""
    histogram = np.bincount(sizes)
    found = np.flatnonzero(histogram)
    different, occurrences = found.tolist(), histogram[found].tolist()
    patterns = first_fit_decreasing(different, occurrences, tokens)
    assert patterns is not None
    rounds = max(1, -(-int(patterns.times.sum()) // ranks))
    bins = rounds * ranks
    if rounds < MANY_ROUNDS:
        shared = _spread(sizes, ascending, bins, len(sizes))
        if not ((_sums(sizes, shared) > tokens) & (shared[1] > 1)).any():
            return shared
    examples, counts = fill(multifit(different, occurrences, tokens, bins, patterns), ascending)
    return examples, np.concatenate([counts, np.zeros(bins - len(counts), np.int64)])


def _sums(values: NDArray[np.int64], bins: Bins) -> NDArray[np.int64]:
    """Of each bin; exact, for they are integers."""
    examples, counts = bins
    sums = np.concatenate([[0], np.cumsum(values[examples])])
    ends = np.cumsum(counts)
    return sums[ends] - sums[ends - counts]
