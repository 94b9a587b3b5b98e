"""The steps of an epoch, one after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardtune.data.order import Order


def epoch_of(order: Order, epoch: int, cursor: int = 0) -> list[NDArray[np.int64]]:
    """The steps of an epoch from `cursor` on."""
    found = []
    while cursor < order.examples_of(epoch):
        found.append(order.take(epoch, cursor))
        cursor += len(found[-1])
    assert cursor == order.examples_of(epoch)
    return found
