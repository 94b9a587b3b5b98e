"""What a run writes of itself while it goes: metrics.jsonl and the trackers, on the first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from shardtune.errors import StorageError
from shardtune.tracking.metrics_file import MetricsFile
from shardtune.tracking.tracker import Histogram, Tracker
from shardtune.world import World

OWN = (None, "best")
"""What is judged that is a result of the run: the model at a step, and the best one."""


class Records:
    """Writes on the first rank and is silent on the others."""

    def __init__(self, folder: Path, world: World, trackers: Sequence[Tracker], after: int | None = None) -> None:
        """`folder`: the run's. `trackers`: started, on the first rank. `after`: the step up to which the figures of an
        earlier part of the run stay; all ranks then wait for the first. Raises StorageError, as all methods do."""
        self._trackers = list(trackers)
        self._file: MetricsFile | None = None
        self._final: dict[str, float] = {}
        self.evaluations: list[dict[str, Any]] = []
        """The lines of evaluations that were there and stay, on every rank."""
        self.joules = 0.0
        """What devices had used by the last line that was there and stays; on the first rank."""

        def opened() -> list[dict[str, Any]]:
            self._file = MetricsFile(folder / "metrics.jsonl", after)
            for line in self._file.kept:
                self.joules = line.get("energy_joules", self.joules)
                if "split" in line:
                    self._remember({key: line[key] for key in line if key not in ("step", "split", "of")}, line)
            return [line for line in self._file.kept if "split" in line]

        if after is not None:
            self.evaluations = world.first_does("metrics", opened)
        elif world.is_first:
            opened()

    def training(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of the step's figures, and a point train/<figure> of each but for digests."""
        if self._file is None:
            return
        self._file.write({"step": step, **figures})
        points = {f"train/{name}": value for name, value in figures.items() if name != "examples_digest"}
        for tracker in self._trackers:
            tracker.scalars(step, points)

    def evaluation(
        self, step: int, split: str, scores: Mapping[str, float], of: str | None = None, shown: Sequence[str] = ()
    ) -> None:
        """A line of a split's scores, and their points <split>/<score>. `of`: what was judged, where that is not the
        model as it is at the step; its points are <of>/<split>/<score>. `shown`: texts for people to look at."""
        if self._file is None:
            return
        self._file.write({"step": step, "split": split, **({} if of is None else {"of": of}), **scores})
        prefix = _prefix({"split": split, "of": of})
        self._remember(scores, {"split": split, "of": of})
        for tracker in self._trackers:
            tracker.scalars(step, {f"{prefix}/{name}": value for name, value in scores.items()})
            tracker.texts(step, f"{prefix}/predictions", shown)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """A histogram to the series of each name."""
        for tracker in self._trackers:
            tracker.histograms(step, values)

    def _remember(self, scores: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
        """The run's own scores: what it is compared with is the same in each run."""
        if judged.get("of") not in OWN:
            return
        prefix = _prefix(judged)
        self._final |= {f"{prefix}/{name}": value for name, value in scores.items() if value is not None}

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes; after an error, it is that one which is to be said, not one that comes of it."""
        with suppress(StorageError) if error is not None else nullcontext():
            self.close(ended=error is None)

    def close(self, ended: bool = True) -> None:
        """Writes out what trackers hold; `ended`: the run came to its end, and its last scores are final."""
        try:
            for tracker in self._trackers:
                tracker.close(self._final if ended else None)
        finally:
            if self._file is not None:
                self._file.close()


def _prefix(judged: Mapping[str, Any]) -> str:
    """Of the names of curves: of a line of an evaluation, its split; where `of` says what was judged, after that."""
    of = judged.get("of")
    return judged["split"] if of is None else f"{of}/{judged['split']}"
