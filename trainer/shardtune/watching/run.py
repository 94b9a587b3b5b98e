"""What a run's folder says of how far the run is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import yaml

from shardtune.errors import ConfigError
from shardtune.overfitting import PARTED, TRAINING
from shardtune.watching.tail import Tail

SILENCE_SECONDS, SILENCE_LINES = 60.0, 10.0
"""A run that has written nothing for so long, and for so many times what it took from line to line, is silent."""


class WatchedRun:
    """A run's folder, looked at now and then."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there is no run in `folder`."""
        self.folder = folder
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            config = None
        if not isinstance(config, dict):
            raise ConfigError(f"command line --run: {folder} is no run's folder (no config.yaml)")
        self._duration: dict[str, Any] = config.get("duration") or {}
        self._tail = Tail(folder / "metrics.jsonl")
        self.training: list[dict[str, Any]] = []
        """Lines of steps, in order."""
        self.judged: dict[str, dict[str, Any]] = {}
        """The last line of each split, and of each that `of` says what was judged of, by what to call it."""
        self.checkpoints: list[str] = []
        self._changed = time.time()

    def look(self) -> list[dict[str, Any]]:
        """Takes in what is new, and returns the lines."""
        news = self._tail.look()
        if news.anew:
            self.training, self.judged = [], {}
        for line in news.lines:
            if "split" in line:
                self.judged[title(line)] = line
            else:
                self.training.append(line)
        if news.anew or news.lines:
            self._changed = self._written_at()
        folder = self.folder / "checkpoints"
        self.checkpoints = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
        return news.lines

    def _written_at(self) -> float:
        """When the last line was written; another machine's clock may be ahead of this one's."""
        try:
            return min((self.folder / "metrics.jsonl").stat().st_mtime, time.time())
        except OSError:
            return time.time()

    @property
    def step(self) -> int:
        """Of the last line."""
        return self.training[-1]["step"] if self.training else 0

    @property
    def silent_seconds(self) -> float:
        """Since the last line."""
        return max(time.time() - self._changed, 0.0)

    @property
    def state(self) -> Literal["finished", "running", "silent"]:
        """Finished: its result is there. Silent: it has stopped, or is at something long, such as an evaluation."""
        if (self.folder / "final").is_dir():
            return "finished"
        usual = self.trained_seconds / max(len(self.training), 1)
        return "silent" if self.silent_seconds > max(SILENCE_SECONDS, SILENCE_LINES * usual) else "running"

    @property
    def trained_seconds(self) -> float:
        """What the steps took, evaluating and saving not counted."""
        steps = [0, *(line["step"] for line in self.training)]
        taken = [line.get("step_seconds") or 0.0 for line in self.training]
        return sum((after - before) * seconds for before, after, seconds in zip(steps, steps[1:], taken, strict=False))

    @property
    def share(self) -> float | None:
        """How much of the run's steps are done, from 0 to 1; None where that is not known yet."""
        if not self.training:
            return None
        last, wanted = self.training[-1], self._duration
        if wanted.get("steps"):
            done = last["step"] / wanted["steps"]
        elif wanted.get("epochs"):
            done = (last.get("epoch") or 0.0) / wanted["epochs"]
        elif wanted.get("minutes"):
            done = self.trained_seconds / (60 * wanted["minutes"])
        else:
            return None
        return min(done, 1.0)

    @property
    def total_steps(self) -> int | None:
        """As the config says, or as the share that is done tells; None where that is not known yet."""
        if self._duration.get("steps"):
            return self._duration["steps"]
        return round(self.step / self.share) if self.share else None

    @property
    def seconds_left(self) -> float | None:
        """For the steps that are left, at the mean speed of those done."""
        return self.trained_seconds * (1 / self.share - 1) if self.share else None


def title(line: dict[str, Any]) -> str:
    """What an evaluation's line is of."""
    return f"{line['of']}, {line['split']}" if line.get("of") else line["split"]


def scores(line: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation's line, and its loss; not how fast it was."""
    beside = ("step", "split", "of", TRAINING, PARTED)
    return {
        key: value for key, value in line.items()
        if key not in beside and not key.endswith("_per_second") and isinstance(value, (int, float))
    }  # fmt: skip
