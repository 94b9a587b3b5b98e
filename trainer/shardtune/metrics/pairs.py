"""What all metrics here have in common: one prediction and one reference, both texts. Imports `evaluate`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import evaluate
from datasets import Features, Value

_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, one for each prediction.
"""


class PairMetric(evaluate.Metric):
    """An `evaluate.Metric` over pairs of texts; its docstring is its description."""

    citation_text: ClassVar[str]
    """Where the metric is defined."""

    @abstractmethod
    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The scores by name; both lists have the same length, at least 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.citation_text,
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.scores(list(predictions), list(references))
