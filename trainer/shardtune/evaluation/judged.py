"""What is judged, in which way, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from shardtune.examples import Text
from shardtune.protocols import Task

if TYPE_CHECKING:
    from torch import nn

    from shardtune.data.tables import TokenTable


class Split(NamedTuple):
    """The examples that are judged: the first ones of a split."""

    name: str
    table: TokenTable
    examples: int
    texts: Sequence[Text]
    """As people read them, on the first rank; empty elsewhere."""


class Prediction(NamedTuple):
    """One line of a predictions file."""

    source: str
    reference: str
    prediction: str


SPEEDS = ("examples_per_second", "generated_tokens_per_second")
"""Figures of an evaluation's line that say nothing of the model's quality."""


class Judged(NamedTuple):
    """What the judgement of a split gave."""

    scores: dict[str, float]
    """The loss and the metrics, on every rank."""
    predictions: list[Prediction]
    """The first ones of the split, on the first rank; empty elsewhere, and where the task writes none."""
    speeds: dict[str, float]
    """SPEEDS, the second where texts are generated; on every rank."""
    notes: Sequence[str] = ()
    """To be said: how the model was judged, where that is not as it was last time."""


class Way(NamedTuple):
    """How a model is judged where that is not simply as it is."""

    within: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext
    """From the model at hand to the one that is judged."""
    task: Task | None = None
    """In place of the run's own."""
    stop: Sequence[str] = ()
    """A text also ends before one of these."""


AS_IT_IS = Way()


class Contender(NamedTuple):
    """Something that tuning is compared with."""

    name: str
    judge: Callable[[Split, Callable[[int], None]], Judged | None]
    """As `Evaluator.run`, of the contender."""
