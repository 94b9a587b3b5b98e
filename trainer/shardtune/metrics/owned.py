"""A metric of your own, as an `evaluate.Metric`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardtune.metrics.own import Own
from shardtune.metrics.summed import Floats, Mean


class OwnMetric(Mean):
    """Mean of what a function of your own returns for each prediction and reference; of several references the
    highest."""

    citation_text = "None: module:function"
    score = "own"

    def __init__(self, name: str, **settings: Any) -> None:
        """Raises ConfigError where there is no such function."""
        super().__init__(**settings)
        self._function = Own(name)

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """The number. Raises ConfigError where the function fails or returns none."""
        return self._function(prediction, references)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """Their mean, by the name that the function is asked for with."""
        return {self._function.name: super().values(sums, counts)[self.score]}
