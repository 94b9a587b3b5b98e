"""Where the examples of a packed micro-batch lie, for attention that keeps them apart.

A packed micro-batch is one row: all its examples, one after the other, without padding. Linear layers and norms compute
on the row as it is. Attention gathers the examples into a few rectangles of like length, computes on these, and puts
the results back: no example sees another, and only attention pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

RECTANGLES = 4
"""At most so many a micro-batch: each is a call of its own."""


class Rectangle(NamedTuple):
    """Examples of like length, side by side."""

    examples: int
    queries: int
    """The longest example's, as read by the attending side."""
    keys: int
    """The longest example's, as attended to."""
    hidden: Tensor | None
    """bool [examples, 1, 1, keys], True where there is no key; None where there is one everywhere."""


@dataclass(frozen=True)
class Spread:
    """From a row to rectangles and back, for one kind of attention."""

    rectangles: list[Rectangle]
    query_index: Tensor
    """int64 [slots]: the row's position for each slot of all rectangles; padding repeats an example's last one."""
    query_slots: Tensor
    """int64 [row]: the slot of each of the row's positions."""
    key_index: Tensor
    key_slots: Tensor


class Lengths(NamedTuple):
    """Lengths of the examples of a row, in order, and where each begins, as flash attention wants them."""

    longest: int
    offsets: Tensor
    """int32 [n + 1]."""
    positions: Tensor
    """int64 [row]: each token's position in its own example."""


@dataclass(frozen=True)
class Documents:
    """The examples of one micro-batch: sources in [1, s] and targets in [1, t]; a decoder has one row, the source's."""

    source: Lengths
    target: Lengths | None
    source_spread: Spread
    target_spread: Spread | None
    """Of the decoder's attention to itself."""
    cross_spread: Spread | None
    """Of the decoder's attention to the encoder."""

    def attending(self, decodes: bool, crossing: bool) -> tuple[Lengths, Lengths]:
        """Of what attends and of what is attended to; `crossing`: the decoder's attention to the encoder."""
        own = self.source if self.target is None or not decodes else self.target
        return own, self.source if crossing else own

    def to(self, device: torch.device) -> Documents:
        """The same documents, for a forward pass on `device`."""
        return self if device.type == "cpu" else _moved(self, device)


def make_documents(source: NDArray[np.int64], target: NDArray[np.int64] | None = None) -> Documents:
    """Documents of these lengths, in the order of the row; none is 0. `target`: with an encoder-decoder."""
    return Documents(
        _lengths(source),
        None if target is None else _lengths(target),
        _spread(source, source),
        None if target is None else _spread(target, target),
        None if target is None else _spread(target, source),
    )


def _lengths(lengths: NDArray[np.int64]) -> Lengths:
    import torch

    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return Lengths(int(lengths.max()), torch.from_numpy(offsets), torch.from_numpy(positions))


def _spread(queries: NDArray[np.int64], keys: NDArray[np.int64]) -> Spread:
    import torch

    order = np.lexsort((-queries, -keys))
    rectangles, query_index, key_index = [], [], []
    query_starts, key_starts = np.cumsum(queries) - queries, np.cumsum(keys) - keys
    for chosen in np.split(order, _cuts(queries[order] + keys[order])):
        width, height = int(queries[chosen].max()), int(keys[chosen].max())
        columns = np.arange(height)
        hidden = columns >= keys[chosen, None]
        query_index.append(_index(query_starts[chosen], queries[chosen], width))
        key_index.append(_index(key_starts[chosen], keys[chosen], height))
        shown = torch.from_numpy(hidden)[:, None, None, :] if hidden.any() else None
        rectangles.append(Rectangle(len(chosen), width, height, shown))
    query_all, key_all = np.concatenate(query_index), np.concatenate(key_index)
    return Spread(
        rectangles,
        torch.from_numpy(query_all),
        torch.from_numpy(_first_slots(query_all, int(queries.sum()))),
        torch.from_numpy(key_all),
        torch.from_numpy(_first_slots(key_all, int(keys.sum()))),
    )


def _cuts(longest_first: NDArray[np.int64]) -> list[int]:
    """Where a new rectangle begins: cut in turn where that saves most, as long as it saves a tenth of the area."""
    cuts: list[int] = []
    bounds = [0, len(longest_first)]
    for _ in range(RECTANGLES - 1):
        best, place = 0.0, 0
        for low, high in pairwise(bounds):
            sizes = longest_first[low:high].astype(float)
            # Rows low..i stay as long as the first of them, the rest shrink to the i-th.
            saved = (len(sizes) - np.arange(len(sizes))) * (sizes[0] ** 2 - sizes**2)
            at = int(saved.argmax())
            if saved[at] > best:
                best, place = float(saved[at]), low + at
        area = sum(float(longest_first[low]) ** 2 * (high - low) for low, high in pairwise(bounds))
        if best < area / 10:
            break
        cuts = sorted([*cuts, place])
        bounds = [0, *cuts, len(longest_first)]
    return cuts


def _index(starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    return (starts[:, None] + np.minimum(np.arange(width), lengths[:, None] - 1)).ravel()


def _first_slots(index: NDArray[np.int64], positions: int) -> NDArray[np.int64]:
    """The slot of each position; of the last one of an example, which padding repeats, the first."""
    slots = np.empty(positions, np.int64)
    slots[index[::-1]] = np.arange(len(index))[::-1]
    return slots


def _moved(part: Any, device: torch.device) -> Any:
    """The same with every tensor in it on `device`."""
    if isinstance(part, Documents | Spread):
        return type(part)(**{name: _moved(value, device) for name, value in vars(part).items()})
    if isinstance(part, Lengths | Rectangle):
        return type(part)(*(_moved(value, device) for value in part))
    if isinstance(part, list):
        return [_moved(item, device) for item in part]
    return part.to(device, non_blocking=True) if hasattr(part, "to") else part


_read: Documents | None = None


def read(documents: Documents | None) -> None:
    """From now on, forward passes of this process read a row of these documents; None: every row is one example.

    One value for the whole process, because attention functions are registered for the whole process, and because
    recomputing activations calls them again in the backward pass, on threads of autograd.
    """
    global _read
    _read = documents


def being_read() -> Documents | None:
    """What `read` was last told."""
    return _read
