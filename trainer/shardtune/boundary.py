"""What the ranks agree on between two steps: whether to save, to stop, to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol

from shardtune.errors import DataError, FailedElsewhere, Stopped, StorageError
from shardtune.state import TrainingState
from shardtune.world import World


class Saves(Protocol):
    """How a run saves what it is at; `shardtune.checkpoint.saver` has the one that writes."""

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that it has made whole."""
        ...

    def asks(self) -> list[float]:
        """How this rank's writing goes, to be summed over the ranks."""
        ...

    def agreed(self, asked: list[float]) -> None:
        """Acts on the sums, on every rank alike: commits what all have written. Raises StorageError."""
        ...

    def save(self, hurried: bool = False) -> None:
        """Copies the state and begins to write it, after what was being written before; `hurried`: does not return
        before it is whole on the disk, and leaves older ones alone."""
        ...

    def finish(self) -> None:
        """Waits until what was begun is whole on the disk. Raises StorageError."""
        ...


class Boundaries:
    """Implements the Boundary protocol of the loop."""

    def __init__(
        self,
        state: TrainingState,
        world: World,
        saves: Saves,
        every_steps: int | None,
        every_seconds: float | None,
        seconds: float | None,
        told_to_stop: Callable[[], str | None],
        kept: Callable[[], str],
        begins_at: int,
        is_best: Callable[[], bool] = lambda: False,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Saves every so many steps or seconds; no step begins after `seconds` of training. `told_to_stop`: the signal
        that this process has had; `kept`: what to say of how to go on; `begins_at`: the step of the run's own
        checkpoint that it goes on from, 0 without one. `is_best`: whether what was judged last is to be kept;
        `is_enough`: whether training is to end here."""
        self._state = state
        self._world = world
        self._saves = saves
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._seconds = seconds
        self._told_to_stop = told_to_stop
        self._kept = kept
        self._is_best = is_best
        self._is_enough = is_enough
        self._failure: DataError | None = None
        self._began_at = self._saved_step = begins_at
        self._saved_at = state.seconds

    def asks(self, failure: DataError | None) -> list[float]:
        """Stopping, a lack of data, the end, the best evaluation so far, and what saving asks for."""
        self._failure = failure
        own = (self._told_to_stop() is not None, failure is not None, self._is_enough(), self._is_best())
        return [*map(float, own), *self._saves.asks()]

    def agreed(self, asked: list[float]) -> bool:
        """Saves where it is due or the run ends here."""
        stopping, failing, enough, best, *rest = asked
        self._saves.agreed(rest)
        if failing:
            self._save_now()
            self._fail()
        if stopping:
            self.stop()
        if enough or (self._seconds is not None and self._state.seconds >= self._seconds):
            return False
        if self._due(bool(best)):
            self._begin_save()
        return True

    def stop(self) -> NoReturn:
        """Saves, unless that was done, and ends the run. Raises Stopped, or StorageError."""
        self._save_now()
        raise Stopped(self._kept())

    def end(self) -> None:
        """After the last step: saves, unless that was done. The evaluation that follows may end in any way."""
        if self._state.step > self._saved_step:
            self._begin_save()
        self._saves.finish()

    def settle(self) -> None:
        """After `end`, before the weights become others: saves once more where the last save came to nothing. Raises
        StorageError."""
        if self._state.step > 0:
            self._save_now()

    def _due(self, best: bool) -> bool:
        if self._state.step == self._saved_step:
            return False
        if best:
            return True
        if self._every_steps is not None:
            return self._state.step % self._every_steps == 0
        return self._every_seconds is not None and self._state.seconds - self._saved_at >= self._every_seconds

    def _begin_save(self) -> None:
        self._saved_step, self._saved_at = self._state.step, self._state.seconds
        self._saves.save()

    def _save_now(self) -> None:
        """Whatever becomes of the processes that write: once more, then it is an error."""
        self._saves.finish()
        for _ in range(2):
            if not self._is_saved():
                self._saves.save(hurried=True)
        if not self._is_saved() and not self._world.is_first:
            raise FailedElsewhere(StorageError.exit_code)
        if not self._is_saved():
            raise StorageError(f"step {self._state.step} could not be saved, as the processes that write end too soon")

    def _is_saved(self) -> bool:
        return self._state.step in (self._began_at, self._saves.newest)

    def _fail(self) -> None:
        """Every rank has read the data, each perhaps from a file of its own; one of them says what is wrong."""
        if self._failure is None or not self._world.first_to_say("data"):
            raise FailedElsewhere(DataError.exit_code)
        raise DataError(f"{self._failure}\n{self._kept()}") from self._failure
