"""Sharing out work evenly: examples over bins, and bins over ranks."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def spread(descending: list[int], bins: int, most: int) -> list[int]:
    """A bin for each example: the one with the smallest sum so far of those that hold fewer than `most`.

    `descending` are the examples' sizes, the largest first, at most `bins` · `most` of them. This is the longest
    processing time rule (Graham 1969, SIAM J. Appl. Math. 17(2)): the largest sum is at most 4/3 of the smallest
    possible if `most` does not bind. Ties go to the bin that comes first.
    """
    heap = list(range(bins))  # sum · bins + bin: one number is compared faster than a pair
    room = [most] * bins
    found = []
    for size in descending:
        least = heap[0]
        to = least % bins
        found.append(to)
        room[to] -= 1
        if room[to]:
            heapq.heapreplace(heap, least + size * bins)
        else:
            heapq.heappop(heap)
    return found


def deal_evenly(costs: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Gives each rank one bin of every round: [ranks, rounds], indices into `costs`, of which there are as many.

    Bins of like cost meet in a round, the costliest in the first. Who gets which is settled for the rounds with the
    largest differences first: the rank with the least so far takes the most.
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    of_rounds = costs[rounds]
    widest_first = np.argsort(of_rounds[:, -1] - of_rounds[:, 0], kind="stable").tolist()
    sums = [0] * ranks
    taken: list[list[int]] = [[]] * len(rounds)
    values = of_rounds.tolist()
    for turn in widest_first:
        poorest_first = sorted(range(ranks), key=sums.__getitem__)
        taken[turn] = poorest_first
        for rank, value in zip(poorest_first, values[turn], strict=True):
            sums[rank] += value
    layout = np.empty_like(rounds)
    np.put_along_axis(layout, np.array(taken, np.int64), rounds, axis=1)
    return layout.T
