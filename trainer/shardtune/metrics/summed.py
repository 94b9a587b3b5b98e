"""What all metrics here have in common: they are functions of sums over examples. Imports `evaluate`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, one for each prediction; or list of lists of texts, the right answers of each.
"""


class SummedMetric(evaluate.Metric):
    """An `evaluate.Metric` whose scores are functions of one vector: the sum of the examples' statistics.

    So an example is looked at once; parts of a split can be added up, and a bootstrap resamples vectors instead of
    texts. The docstring of a metric is its description.
    """

    citation_text: ClassVar[str]
    """Where the metric is defined."""
    columns: int
    """Of the statistics."""
    statistics_of: ClassVar[str | None] = None
    """Metrics with the same word here have the same statistics, which are then counted once for all of them."""

    @abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """A row for each example, float64 [n, k]; each example has at least one reference."""

    @abstractmethod
    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """The scores by name, each [...], from sums [..., k] of rows and their numbers [...]."""

    def each(self, statistics: Floats) -> dict[str, Floats]:
        """A number [n] for each example, by score, that says how good its prediction is by itself: the score of that
        example alone, but where one example has none."""
        return self.values(statistics, np.ones(len(statistics)))

    def _info(self) -> evaluate.MetricInfo:
        several = Features({"predictions": Value("string"), "references": ListOf(Value("string"))})
        one = Features({"predictions": Value("string"), "references": Value("string")})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.citation_text,
            inputs_description=_INPUTS,
            features=[several, one],  # pyright: ignore[reportArgumentType]
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, predictions: list[str], references: list[str] | list[list[str]]
    ) -> dict[str, float]:
        statistics = self.statistics(list(predictions), as_lists(references))
        return as_floats(self.values(statistics.sum(0), np.float64(len(statistics))))  # pyright: ignore[reportArgumentType]


class Mean(SummedMetric):
    """A metric that is the mean of one number for each example."""

    score: ClassVar[str]
    """Its name."""
    columns = 1

    @abstractmethod
    def of(self, prediction: str, references: Sequence[str]) -> float:
        """The example's number."""

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """That number, [n, 1]."""
        return rows([[self.of(p, r)] for p, r in zip(predictions, references, strict=True)], 1)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """Their mean."""
        return {self.score: ratio(sums[..., 0], counts)}


def as_lists(references: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """References as lists; none at all is one empty text, which only a prediction of nothing matches."""
    return [[r] if isinstance(r, str) else list(r) or [""] for r in references]


def as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Python's own floats."""
    return {name: float(value) for name, value in values.items()}


def rows(values: list[Any], columns: int) -> Floats:
    """float64 [n, columns], also where n is 0."""
    return np.array(values, dtype=np.float64).reshape(len(values), columns)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise; 0 where the denominator is."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)
