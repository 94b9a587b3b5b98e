"""Trackers that speak with a service: neither how long that takes nor whether it works matters to the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardtune.tracking.tracker import Histogram, Tracker

CLOSING_SECONDS = 120.0
"""How long the end of a run waits for what has not been sent."""
STOPPING_SECONDS = 10.0
"""The same of a run that does not come to its end: whoever stopped it may not wait long before it kills it."""


class Sending:
    """Implements Tracker: the same calls of another one, made in the same order by a thread of their own.

    The first call that fails is told of; the run, and the calls after it, go on.
    """

    def __init__(
        self, tracker: Tracker, name: str, say: Callable[[str], None], closing_seconds: float = CLOSING_SECONDS
    ) -> None:
        """`name`: the service's, for messages, which `say` is given."""
        self._tracker = tracker
        self._name = name
        self._say = say
        self._closing_seconds = closing_seconds
        self._failed = 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)

    def start(self, config: dict[str, Any]) -> None:
        """Waits, and raises what goes wrong: nothing has been done yet that would be lost."""
        errors: list[BaseException | None] = []
        begun = threading.Event()

        def start() -> None:
            try:
                self._tracker.start(config)
                errors.append(None)
            except BaseException as error:
                errors.append(error)
            begun.set()

        self._calls.put(start)
        self._thread.start()
        begun.wait()
        if errors[0] is not None:
            self._calls.put(None)
            raise errors[0]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        kept = dict(values)
        self._calls.put(lambda: self._tracker.scalars(step, kept))

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds sample texts."""
        kept = list(texts)
        self._calls.put(lambda: self._tracker.texts(step, name, kept))

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Adds a histogram to each series."""
        kept = dict(values)
        self._calls.put(lambda: self._tracker.histograms(step, kept))

    def close(self, final: Mapping[str, float] | None) -> None:
        """Waits for what has not been sent, but not for ever, and says what is missing there."""
        kept = None if final is None else dict(final)
        self._calls.put(lambda: self._tracker.close(kept))
        self._calls.put(None)
        seconds = self._closing_seconds if final is not None else min(self._closing_seconds, STOPPING_SECONDS)
        self._thread.join(seconds)
        if self._thread.is_alive():
            unsent = max(self._calls.qsize(), 1)
            self._say(f"warning: {self._name}: {unsent} records could not be sent in {seconds:.1f} s")
        elif self._failed > 1:
            self._say(f"warning: {self._name}: {self._failed} records in all could not be sent")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._failed += 1
                if self._failed == 1:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    self._say(f"warning: {self._name}: a record could not be sent ({reason[:300]}); the run goes on")
