"""What becomes of a run between two steps: saving where it is due, stopping, and the end."""

import pytest
import torch

from shardtune.boundary import Boundaries
from shardtune.errors import Stopped, StorageError
from shardtune.state import TrainingState
from shardtune.world import World


class Saves:
    """Notes what it is asked for; of what it saves, the first `lost` ones are not to be found."""

    def __init__(self, state: TrainingState, lost: int) -> None:
        self.asked: list[str] = []
        self.newest: int | None = None
        self._state = state
        self._lost = lost
        self._coming: int | None = None

    def asks(self) -> list[float]:
        return []

    def agreed(self, asked: list[float]) -> None: ...

    def save(self, hurried: bool = False) -> None:
        self.asked.append(f"save {self._state.step}" + " now" * hurried)
        self._coming, self._lost = self._state.step if self._lost <= 0 else None, self._lost - 1
        if hurried:
            self._arrives()

    def finish(self) -> None:
        self.asked.append("finish")
        self._arrives()

    def _arrives(self) -> None:
        self.newest, self._coming = self._coming or self.newest, None


class Run:
    def __init__(
        self,
        step: int,
        begins_at: int,
        told: str | None = None,
        lost: int = 0,
        best: bool = False,
        enough: bool = False,
    ) -> None:
        self.state = TrainingState(step=step)
        self.saves = Saves(self.state, lost)
        alone = World(0, 1, 0, torch.device("cpu"))
        self.boundaries = Boundaries(
            self.state, alone, self.saves, 10, None, None, lambda: told, lambda: "kept", begins_at, lambda: best,
            lambda: enough,
        )  # fmt: skip

    def boundary(self) -> bool:
        return self.boundaries.agreed(self.boundaries.asks(None))


def test_the_last_checkpoint_is_whole_before_anything_else() -> None:
    run = Run(12, 0)
    run.boundaries.end()
    assert run.saves.asked == ["save 12", "finish"]
    assert run.saves.newest == 12


def test_what_the_runs_folder_has_is_not_saved_again() -> None:
    run = Run(20, 20, told="SIGTERM")
    with pytest.raises(Stopped, match="kept"):
        run.boundary()
    assert "save" not in " ".join(run.saves.asked)


def test_what_another_folder_has_is_saved() -> None:
    run = Run(20, 0)
    assert run.boundary()
    assert run.saves.asked == ["save 20"]
    told = Run(23, 0, told="SIGTERM")
    with pytest.raises(Stopped):
        told.boundary()
    assert told.saves.newest == 23


@pytest.mark.parametrize("lost", [1, 2])
def test_told_to_stop_in_the_last_evaluation_with_the_last_save_lost(lost: int) -> None:
    run = Run(12, 0, lost=lost)
    run.boundaries.end()
    with pytest.raises(Stopped):
        run.boundaries.stop()
    assert run.saves.newest == 12
    run = Run(12, 0, lost=3)
    run.boundaries.end()
    with pytest.raises(StorageError, match="step 12 could not be saved"):
        run.boundaries.stop()


def test_the_best_is_saved_once() -> None:
    run = Run(7, 0, best=True)
    assert run.boundary()
    assert run.boundary()
    assert run.saves.asked == ["save 7"]
    run = Run(7, 7, best=True)
    assert run.boundary()
    assert run.saves.asked == [], "it is there"
    run = Run(7, 0)
    assert run.boundary()
    assert run.saves.asked == []


def test_enough_ends_training_but_a_signal_comes_first() -> None:
    run = Run(7, 0, enough=True)
    assert not run.boundary()
    assert run.saves.asked == [], "the end saves"
    with pytest.raises(Stopped):
        Run(7, 0, told="SIGTERM", enough=True).boundary()


def test_one_rank_that_has_enough_ends_all() -> None:
    run = Run(7, 0)
    asked = [first + second for first, second in zip(run.boundaries.asks(None), [0, 0, 1, 0], strict=True)]
    assert not run.boundaries.agreed(asked)


def test_before_weights_change_the_last_step_is_saved_after_all() -> None:
    run = Run(12, 0, lost=1)
    run.boundaries.end()
    assert run.saves.newest is None
    run.boundaries.settle()
    assert run.saves.newest == 12
    run = Run(0, 0)
    run.boundaries.settle()
    assert run.saves.newest is None, "there is nothing to save before the first step"
