"""Examples of like length share a micro-batch, so that less of it is padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardtune.data.batching.padded import lay_out
from shardtune.examples import Budget


class Grouped:
    """Implements the Batching protocol.

    Sorting happens within a step: which examples make a step stays as it is. Ranks get neighbours in the order, so
    they compute on like lengths at the same time.
    """

    packed = False

    def layout(self, lengths: NDArray[np.int64], ranks: int, budget: Budget) -> list[list[NDArray[np.int64]]]:
        """Longest first (a step that does not fit in memory fails at once), by source and then target length."""
        longest_first = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
        return lay_out(longest_first, lengths, ranks, budget)
