"""Where validation loss and training loss part: the model goes on learning, but only the training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TRAINING = "train_loss"
"""In an evaluation line of validation: the mean loss of the training steps since the line before."""
PARTED = "parted_since"
"""In the line at which it was noticed, once a run: the step of the lowest validation loss."""

IN_A_ROW = 2
"""So often must validation loss have risen, the last time at the evaluation that is looked at."""
ERRORS = 2.0
"""It is above its minimum by more than so many standard errors of the difference: by chance in one of 40 cases."""
SHARE = 0.01
"""And where these are not known, by more than this share of the minimum."""

Noise = Callable[[int, int], float | None]
"""The standard error of the difference of the validation losses at two steps; None where it is not known."""


class Losses(NamedTuple):
    """Of one evaluation of validation."""

    step: int
    validation: float
    training: float | None
    """Mean of the steps since the evaluation before; None where there were none."""


class Parted(NamedTuple):
    """Validation loss rises from the first to the second while training loss falls."""

    lowest: Losses
    now: Losses
    trained: float
    """Training loss at the first, or where it was first known after that."""

    def __str__(self) -> str:
        """In words, and what to do about it."""
        return (
            f"validation loss rises since step {self.lowest.step:,} ({self.lowest.validation:.4f} → "
            f"{self.now.validation:.4f} at step {self.now.step:,}) while training loss falls ({self.trained:.4f} → "
            f"{self.now.training:.4f}): the model learns the training examples by heart. evaluation.best keeps the "
            "best checkpoint, evaluation.patience stops in time; fewer epochs or more examples help, too"
        )


class Watch:
    """Follows both losses through a run, and tells once where they part."""

    def __init__(self, noise: Noise = lambda first, second: None) -> None:
        self._noise = noise
        self._course: list[Losses] = []
        self._told = False

    def recall(self, line: Mapping[str, Any]) -> None:
        """An evaluation line of an earlier part of the run."""
        self._told = self._told or PARTED in line
        if line.get("loss") is not None:
            self._course.append(_losses(line))

    def judged(self, step: int, validation: float, training: float | None) -> Parted | None:
        """Adds an evaluation; where they part, if that is noticed now."""
        self._course.append(Losses(step, validation, training))
        found = None if self._told else parted(self._course, self._noise)
        self._told = self._told or found is not None
        return found


def parted(course: Sequence[Losses], noise: Noise) -> Parted | None:
    """Whether validation loss, at the last evaluation of `course`, rises while training loss falls.

    It rises if it was higher each time in the last two evaluations, both after the lowest, and is now above the lowest
    by more than its noise. Training loss falls if it is below what it was at the lowest.
    """
    if len(course) <= IN_A_ROW:
        return None
    at = min(range(len(course)), key=lambda index: course[index].validation)
    lowest, now, recent = course[at], course[-1], course[-IN_A_ROW - 1 :]
    rises = all(later.validation > before.validation for before, later in pairwise(recent))
    found = _parted(course[at:])
    if not rises or at > len(course) - 1 - IN_A_ROW or found is None or found.trained <= (now.training or 0.0):
        return None
    error = noise(lowest.step, now.step)
    least = SHARE * abs(lowest.validation) if error is None else ERRORS * error
    return found if now.validation - lowest.validation > least else None


def standard_error(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of the difference of two losses over the same n examples, given [n, 2] of each: loss sums and targets.

    The difference D is a ratio of sums, Σ d / Σ t with d the examples' differences, t their targets; its standard
    error is √(n / (n - 1) Σ (d - D t)²) / Σ t (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    targets, differences = first[:, 1], second[:, 0] - first[:, 0]
    examples, total = len(targets), float(targets.sum())
    if examples < 2 or total == 0.0:
        return float("inf")
    left = differences - differences.sum() / total * targets
    return float(np.sqrt(examples / (examples - 1) * (left**2).sum()) / total)


def warnings_in(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is to be said of overfitting, given the lines of metrics.jsonl."""
    course: list[Losses] = []
    said = []
    for line in lines:
        if line.get("split") != "validation" or "of" in line or line.get("loss") is None:
            continue
        course.append(_losses(line))
        found = _parted([losses for losses in course if losses.step >= line[PARTED]]) if PARTED in line else None
        said += [str(found)] if found is not None else []
    return said


def _parted(course: Sequence[Losses]) -> Parted | None:
    """From the first to the last; None where training loss is not known of both."""
    trained = next((losses.training for losses in course if losses.training is not None), None)
    return Parted(course[0], course[-1], trained) if trained is not None and course[-1].training is not None else None


def _losses(line: Mapping[str, Any]) -> Losses:
    return Losses(line["step"], line["loss"], line.get(TRAINING))
