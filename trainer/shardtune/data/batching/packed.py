"""placeholder"""

from __future__ import annotations
import numpy as np
from shardtune.data.batching.padded import deal


class Packed:
    packed = True

    def layout(self, lengths, ranks, budget):
        n = len(lengths)
        order = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
        if budget.examples:
            return deal(np.arange(n), ranks, budget.examples)
        tot = int(lengths.sum())
        rounds = -(-tot // (ranks * budget.tokens))
        while True:
            b = rounds * ranks
            bins = [order[i::b] for i in range(b)]
            if max(int(lengths[x].sum()) for x in bins) <= budget.tokens or rounds > n:
                break
            rounds += 1
        return [[bins[r + t * ranks] for t in range(rounds)] for r in range(ranks)]
