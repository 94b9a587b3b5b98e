"""Steps prepared ahead by a thread, while the one before is computed."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from shardtune.data.steps import Step, StepSource

if TYPE_CHECKING:
    import torch

LONGEST_WAIT = 10.0
"""Seconds that closing waits for the step under way; a thread that hangs longer ends with the process."""


class Prefetch:
    """Works ahead along the steps of another source; implements StepSource.

    Where the next step is follows from the one before. If another one is asked for, work begins anew from there.
    """

    def __init__(self, steps: StepSource, ahead: int, total_steps: int, device: torch.device) -> None:
        """`ahead`: steps prepared before they are asked for, at least 1. `total_steps`: how many will be asked for;
        none is prepared beyond them. `device`: for a GPU the batches' memory is pinned."""
        self._steps = steps
        self._ahead = ahead
        self._left = total_steps
        self._device = device
        self._changed = threading.Condition()
        # All below is read and written under the lock only.
        self._ready: deque[tuple[tuple[int, int], Step | BaseException]] = deque()
        self._next: tuple[int, int] | None = None
        """What is to be prepared next, or is being prepared; None: nothing until asked."""
        self._turn = 0
        """Changes when work begins anew, so that what was under way is thrown away."""
        self._waited_for = False
        """Whether `at` waits for a step; that one is prepared in any case."""
        self._closed = False
        self._thread: threading.Thread | None = None

    def at(self, epoch: int, cursor: int) -> Step:
        """The step that begins after `cursor` examples of the epoch; raises what preparing it raised."""
        position = epoch, cursor
        with self._changed:
            if (self._ready[0][0] if self._ready else self._next) != position:
                self._ready.clear()
                self._next = position
                self._turn += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._thread.start()
            self._waited_for = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            self._waited_for = False
            _, found = self._ready.popleft()
            self._left -= 1
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(LONGEST_WAIT)
        self._steps.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_work())
                if self._closed:
                    return
                position, turn = self._next, self._turn
            assert position is not None
            found, following = self._prepared(*position)
            with self._changed:
                if turn == self._turn:
                    self._ready.append((position, found))
                    self._next = following
                    self._changed.notify_all()

    def _may_work(self) -> bool:
        wanted = max(int(self._waited_for), min(self._ahead, self._left))
        return self._next is not None and len(self._ready) < wanted

    def _prepared(self, epoch: int, cursor: int) -> tuple[Step | BaseException, tuple[int, int] | None]:
        """A step, or why there is none, and where the next one begins."""
        try:
            step = self._steps.at(epoch, cursor)
            if self._device.type == "cuda":
                import torch

                torch.cuda.set_device(self._device)  # else pinning would wake up the first GPU in every process
                step = step._replace(micro_batches=[batch.pin() for batch in step.micro_batches])
        except BaseException as error:
            return error, None
        return step, (epoch + 1, 0) if step.ends_epoch else (epoch, cursor + len(step.examples))
