"""Where a task and a model's output layer meet: one that computes the loss itself is told what is to be learned.

An output layer that computes the summed loss never needs memory for logits. In their place it returns `0 · loss`: what
the model does to its logits does nothing to that, and what a strategy attaches to the model's outputs, to be told when
the backward pass begins, is told.
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
    by_row: bool = False
    """Whether the loss is wanted of each row."""
    loss: Tensor | None = None
    """The summed loss, by the output layer: a scalar, or [b]."""


_awaited: Awaited | None = None


def awaited() -> Awaited | None:
    """What the forward pass under way is to learn; None outside of `summed_loss` and `losses_by_row`."""
    return _awaited


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The summed loss of `labels`: as the model's output layer computes it, or else `of_logits(logits, labels)`."""
    return _loss(model, inputs, Awaited(labels), of_logits)


def losses_by_row(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The summed loss of each row of `labels`, [b], likewise."""
    return _loss(model, inputs, Awaited(labels, by_row=True), of_logits)


def _loss(
    model: nn.Module, inputs: Mapping[str, Tensor], mine: Awaited, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    global _awaited
    _awaited = mine
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        _awaited = None
    return of_logits(logits, mine.labels) if mine.loss is None else mine.loss + 0.0 * logits.sum()
