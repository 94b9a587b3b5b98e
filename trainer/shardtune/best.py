"""Which evaluation of validation is the best so far, and whether there is still hope for a better one."""

from __future__ import annotations

import math


class Best:
    """The same on every rank, as the scores are."""

    def __init__(self, score: str, lower_is_better: bool, patience: int | None = None) -> None:
        """`score`: what is compared; `patience`: after so many evaluations that were no better, there is no hope."""
        self.score = score
        self.patience = patience
        self._lower = lower_is_better
        self._values: dict[int, float] = {}
        self._best: int | None = None
        self._waited = 0

    def add(self, step: int, value: float | None, kept: bool = True) -> None:
        """The score at a step, later than those before. One that is not finite is no better than any other; of equal
        ones the earlier is the best. `kept`: whether the model of that step can still be had; else it only counts."""
        self._waited += 1
        if value is None or not math.isfinite(value) or not kept:
            return
        before = self.value
        self._values[step] = value
        if before is None or (value < before if self._lower else value > before):
            self._best, self._waited = step, 0

    @property
    def step(self) -> int | None:
        """Of the best evaluation; None before there is one."""
        return self._best

    @property
    def value(self) -> float | None:
        """Its score."""
        return None if self._best is None else self._values[self._best]

    @property
    def hopeless(self) -> bool:
        """Whether patience has come to its end."""
        return self.patience is not None and self._waited >= self.patience

    def ranked(self, until: int | None = None) -> list[int]:
        """The steps, the best one first; `until`: no later ones."""
        steps = [step for step in self._values if until is None or step <= until]
        return sorted(steps, key=lambda step: (self._values[step] if self._lower else -self._values[step], step))
