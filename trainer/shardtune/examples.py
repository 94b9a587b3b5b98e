"""An example on its way: as people read it, as the model reads it, and in a batch of what one rank computes at once.

Shape legend, used wherever tensors are named: b batch, s source length, t target length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # so that reading and checking data does not wait for torch
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from shardtune.documents import Documents
    from shardtune.ragged import Ragged

IGNORED = -100
"""The label of a position that is no target."""


class Text(NamedTuple):
    """One example as people read it, and where it comes from."""

    place: str
    """FILE:LINE of the row, for messages."""
    source: str
    """What the model reads."""
    target: str
    """What it should write: a text, a class label, or nothing where the source holds all; see the task."""
    beside: Sequence[str] = ()
    """Values of further fields, that examples are told apart by."""


class Tokens(NamedTuple):
    """One example as the model reads it: int32 token ids, [s] and [t]."""

    source: NDArray[np.int32]
    target: NDArray[np.int32]
    """The tokens to write with their end token, or one class index: each is a target of the loss. Between the turns
    of a conversation stand tokens that are read but not learned, as `~id`, so negative. Where targets are of places in
    the source, it has such tokens in all other places."""
    origin: int = 0
    """Which source of the training data it is from."""
    number: int = 0
    """Its place in the split that is judged."""


class Encoded(NamedTuple):
    """The result of tokenizing one text; `source` and `target` as in Tokens."""

    source: Sequence[int]
    target: Sequence[int]
    source_cut: bool
    """The source was longer than allowed."""
    target_cut: bool
    """The target was longer than allowed."""


class Budget(NamedTuple):
    """What one rank may compute at once; one of the two is None."""

    examples: int | None
    """At most so many examples."""
    tokens: int | None
    """At most so many source and target slots, padding included; a longer example is alone."""


@dataclass(frozen=True)
class Batch:
    """What one rank computes at once."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward, int64, [b, s] and [b, t]; of a packed batch, [1, s] and [1, t]."""
    labels: Tensor
    """int64, [b, t], or [b] for classification; IGNORED where there is no target. Or float32, NaN where there is
    none."""
    tokens: int
    """Source and target tokens that are not padding."""
    targets: int
    """Targets of the loss."""
    slots: int
    """Source and target positions computed on, padding included."""
    documents: Documents | None = None
    """Where each example lies in a packed batch; None if every row is one example."""
    ragged: Ragged | None = None
    """What `to` makes inputs of, and labels unless there are some: till then they are not there."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, complete."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        documents = self.documents.to(device) if self.documents is not None else None
        made, labels = self.ragged.laid_out(device) if self.ragged is not None else ({}, None)
        if labels is None:
            labels = self.labels.to(device, non_blocking=True)
        return replace(self, inputs=made | inputs, labels=labels, documents=documents, ragged=None)

    def pin(self) -> Batch:
        """The same batch in memory from which a GPU copies while it computes."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        ragged = self.ragged.pin() if self.ragged is not None else None
        return replace(self, inputs=inputs, labels=self.labels.pin_memory(), ragged=ragged)

    def blank(self) -> Batch:
        """The same shapes with nothing to learn: for a rank that has no examples while others compute."""
        labels = self.labels.new_full(self.labels.shape, math.nan if self.labels.is_floating_point() else IGNORED)
        ragged = self.ragged.blank() if self.ragged is not None else None
        return replace(self, labels=labels, tokens=0, targets=0, ragged=ragged)
