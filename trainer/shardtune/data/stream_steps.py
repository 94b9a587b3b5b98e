"""The steps of a stream: which of its examples come next, and this rank's part of them."""

from __future__ import annotations

import numpy as np

from shardtune.data.steps import Layout, Step
from shardtune.data.stream import Ahead, Example, Stream, lengths_of
from shardtune.errors import DataError


class StreamSteps:
    """Takes the next examples of a stream, `per_step` of them or as many as have `tokens`; implements StepSource.

    A step's set depends on (seed, epoch, cursor) as elsewhere; going on from another position reads the epoch again.
    """

    def __init__(self, stream: Stream, per_step: int | None, tokens: int | None, layout: Layout) -> None:
        self._stream = stream
        self._per_step = per_step
        self._tokens = tokens
        self._layout = layout
        self._coming: Ahead[Example] = Ahead(iter(()))
        self._peeked: list[Example] = []
        """The example after the step before, or nothing at the end."""
        self._next: tuple[int, int] | None = None

    def at(self, epoch: int, cursor: int) -> Step:
        """The step that begins after `cursor` examples of the epoch.

        Raises DataError where a row that it needs is wrong, or the stream has no example there.
        """
        if self._next != (epoch, cursor) or cursor == 0:
            self._coming = Ahead(self._stream.examples(epoch, cursor))
            self._peeked = self._coming.take(1)
        taken: list[Example] = []
        tokens = 0
        while self._peeked:
            tokens += len(self._peeked[0].tokens.source) + len(self._peeked[0].tokens.target)
            if taken and (len(taken) == self._per_step or (self._tokens is not None and tokens > self._tokens)):
                break
            taken += self._peeked
            self._peeked = self._coming.take(1)
        failure = self._coming.failure
        if failure is not None and not self._peeked and (not taken or len(taken) != self._per_step):
            self._next = None
            raise failure
        if not taken:
            raise DataError(f"the stream holds no training example after the first {cursor:,} of its pass {epoch + 1}")
        ends_epoch = not self._peeked and failure is None
        self._next = (epoch + 1, 0) if ends_epoch else (epoch, cursor + len(taken))
        micro_batches = self._layout.micro_batches(lengths_of(taken), lambda position: taken[position].tokens)
        return Step(np.array([example.number for example in taken]), micro_batches, ends_epoch)

    def close(self) -> None:
        """Forgets what was read ahead."""
        self._coming, self._peeked, self._next = Ahead(iter(())), [], None
