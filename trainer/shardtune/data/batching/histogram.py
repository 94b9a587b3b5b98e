"""Bin packing of a histogram: examples of one length are alike, so they are packed together.

Let length ℓ occur c_ℓ times and let bins hold C. A pattern is a way to fill one bin: u_ℓ examples of length ℓ,
Σ u_ℓ·ℓ <= C. First-fit decreasing (Johnson, Demers, Ullman, Garey and Graham 1974, SIAM J. Comput. 3(4)) fills bin
after bin with the longest examples that still fit: for ℓ from the longest down, u_ℓ = min(c_ℓ, ⌊room / ℓ⌋). The next
bin is filled in the same way for as long as the counts allow, so the pattern stands for min ⌊c_ℓ / u_ℓ⌋ bins at once.
The result is that of first-fit decreasing example by example (at most 11/9 of the fewest bins, and 6/9 of a bin:
Dósa 2007), but the work depends on the number of different lengths, not of examples.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SEARCH_STEPS = 7
"""Of MULTIFIT; Coffman, Garey and Johnson found no more to be of use."""
NEAR = 512
"""Bins are not packed again to make the fullest emptier by less than one part in so many."""


class Patterns(NamedTuple):
    """How p kinds of bins are filled, in e entries: each an amount of examples of one length in one kind of bin."""

    lengths: NDArray[np.int64]
    """[e], the entry's length."""
    uses: NDArray[np.int64]
    """[e], how many examples of that length are in each bin of the pattern."""
    entries: NDArray[np.int64]
    """[p], how many entries each pattern has; those of a pattern stand together."""
    times: NDArray[np.int64]
    """[p], how many bins are filled in this way."""


def first_fit_decreasing(
    lengths: list[int], counts: list[int], capacity: int, most: int | None = None
) -> Patterns | None:
    """Packs `counts[i]` examples of `lengths[i]` into bins of `capacity`; None if that takes more than `most` bins.

    `lengths` ascend strictly and are not negative; counts are positive. A length above `capacity` has bins to itself.
    """
    lengths, counts = lengths.copy(), counts.copy()
    found_lengths: list[int] = []
    found_uses: list[int] = []
    found_entries: list[int] = []
    found_times: list[int] = []
    bins = 0
    while lengths:
        room, at = capacity, len(lengths) - 1
        pattern = []
        times = counts[-1]
        while at >= 0:
            length, count = lengths[at], counts[at]
            uses = max(1, min(count, room // length)) if length else count  # 1: longer than the whole bin, and alone
            room -= uses * length
            times = min(times, count // uses)
            pattern.append((at, uses))
            found_lengths.append(length)
            found_uses.append(uses)
            at = bisect_right(lengths, room, 0, at) - 1  # the longest that fits, of those shorter than this one
        for at, uses in pattern:  # from the longest down, so that deleting moves none that is still to come
            counts[at] -= uses * times
            if not counts[at]:
                del lengths[at], counts[at]
        found_entries.append(len(pattern))
        found_times.append(times)
        bins += times
        if most is not None and bins > most:
            return None
    columns = (found_lengths, found_uses, found_entries, found_times)
    return Patterns(*(np.array(column, np.int64) for column in columns))


def multifit(lengths: list[int], counts: list[int], capacity: int, bins: int, known: Patterns) -> Patterns:
    """Packs into at most `bins` bins, the fullest as empty as it finds; `known` does so with `capacity`.

    MULTIFIT (Coffman, Garey and Johnson 1978, SIAM J. Comput. 7(1)): a binary search for the smallest capacity with
    which first-fit decreasing needs no more than `bins`. It begins at what no packing can go below: the mean of the
    bins, without those taken by examples longer than it; and the shortest two of the `bins` + 1 longest examples, of
    which two share a bin.
    """
    low = max(_mean(lengths, counts, bins), _pair(lengths, counts, bins))
    for _ in range(SEARCH_STEPS):
        if (capacity - low) * NEAR <= capacity:
            break
        middle = (low + capacity) // 2
        found = first_fit_decreasing(lengths, counts, middle, bins)
        if found is None:
            low = middle + 1
        else:
            known, capacity = found, middle
    return known


def _mean(lengths: list[int], counts: list[int], bins: int) -> int:
    """What `bins` bins hold on average, rounded up, without examples that are longer and the bins they have alone."""
    total = sum(length * count for length, count in zip(lengths, counts, strict=True))
    mean = -(-total // bins)
    for length, count in zip(reversed(lengths), reversed(counts), strict=True):
        if length <= mean:
            break
        total -= length * count
        bins -= count  # stays positive: so many examples above the mean are fewer than the bins
        mean = -(-total // bins)
    return mean


def _pair(lengths: list[int], counts: list[int], bins: int) -> int:
    """The examples number `bins` and number `bins` + 1, from the longest down, together; 0 if there are fewer."""
    sums, before = 0, 0
    for length, count in zip(reversed(lengths), reversed(counts), strict=True):
        after = before + count
        sums += length * ((before < bins <= after) + (before < bins + 1 <= after))
        if after > bins:
            return sums
        before = after
    return 0


def fill(patterns: Patterns, ascending: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Puts real examples into the bins: the examples in the order of the bins, [n], and each bin's number of them.

    `ascending` [n] names the examples by ascending length; those of one length go to the bins in that order.
    """
    pattern_of = np.repeat(np.arange(len(patterns.times)), patterns.entries)
    before = _sums_before(patterns.uses)  # of each entry, over all entries
    first_entry = _sums_before(patterns.entries)
    size = np.add.reduceat(patterns.uses, first_entry) if len(first_entry) else patterns.entries
    start = _sums_before(size * patterns.times)[pattern_of] + before - before[first_entry][pattern_of]

    # Entry by entry along `ascending`; within it, a cell is what one bin gets.
    by_length = np.argsort(patterns.lengths, kind="stable")
    pattern_of, start, uses = pattern_of[by_length], start[by_length], patterns.uses[by_length]
    cells, stride = patterns.times[pattern_of], size[pattern_of]
    first_cell = _sums_before(cells)
    cell_start = np.repeat(start - first_cell * stride, cells) + np.arange(cells.sum()) * np.repeat(stride, cells)
    cell_size = np.repeat(uses, cells)
    slots = np.repeat(cell_start - _sums_before(cell_size), cell_size) + np.arange(len(ascending))
    examples = np.empty_like(ascending)
    examples[slots] = ascending
    return examples, np.repeat(size, patterns.times)


def _sums_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each the sum of those before it."""
    return np.cumsum(values) - values
