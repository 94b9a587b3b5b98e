"""Which examples make which optimizer step: decided by (seed, epoch, cursor) and nothing else."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class Order:
    """The examples of every step of every epoch.

    An epoch visits each example once, in an order drawn from (seed, epoch), or in file order without shuffling. A step
    takes the next `per_step` of it; the epoch's last step takes what is left.
    """

    def __init__(self, examples: int, per_step: int, seed: int, shuffle: bool) -> None:
        self._examples = examples
        self._per_step = per_step
        self._seed = seed
        self._shuffle = shuffle
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    @property
    def examples(self) -> int:
        """Examples of one epoch."""
        return self._examples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self._examples / self._per_step)

    def take(self, epoch: int, cursor: int) -> NDArray[np.int64]:
        """The indices of the examples that make the step beginning at `cursor` of `epoch`."""
        if self._drawn is None or self._drawn[0] != epoch:
            order = np.arange(self._examples)
            if self._shuffle:
                order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self._examples)
            self._drawn = epoch, order
        return self._drawn[1][cursor : cursor + self._per_step]
