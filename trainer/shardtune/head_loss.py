"""Where a task and a model's output layer meet: one that computes the loss itself is told what is to be learned.

An output layer that gives the summed loss in place of the logits never needs memory for logits. The loss leaves the
model as its `logits`, so that whatever a strategy attaches to a model's outputs is attached to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Awaited:
    """The labels of the forward pass under way."""

    labels: Tensor
    """int64 [b, t], of the rows that the output layer is given, in order."""
    computed: bool = False
    """The output layer has given their summed loss."""


_awaited: Awaited | None = None


def awaited() -> Awaited | None:
    """What the forward pass under way is to learn; None outside of `summed_loss`."""
    return _awaited


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The summed loss of `labels`: as the model's output layer gives it, or else `of_logits(logits, labels)`."""
    global _awaited
    mine = _awaited = Awaited(labels)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        _awaited = None
    return logits if mine.computed else of_logits(logits, labels)
