"""Metrics of class labels: accuracy, macro and micro F1, and the Matthews correlation.

A text that is one of the labels is that label. Otherwise a JSON list is the set of labels that it holds (multi-label
classification), and any other text a label that nobody has heard of. Of several references the first counts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from shardtune.metrics.summed import Floats, Mean, SummedMetric, ratio

_SCIKIT_LEARN = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12, 2825-2830"


def labels_in(text: str, known: Collection[str] = ()) -> frozenset[str]:
    """The labels that a prediction or a reference names."""
    if text.lstrip().startswith("[") and text not in known:
        try:
            found = json.loads(text)
        except ValueError:
            return frozenset([text])
        return frozenset(str(label) for label in found)
    return frozenset([text])


class Accuracy(Mean):
    """Share of predicted labels that are right, 0..1; where an example has several, all of them must be, and no other
    may be predicted."""

    citation_text = _SCIKIT_LEARN
    score = "accuracy"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(prediction == references[0] or labels_in(prediction) == labels_in(references[0]))


class LabelMetric(SummedMetric):
    """A metric that depends on how often each label was right, predicted and expected.

    `labels` fixes what the columns of the statistics mean. What is none of them has one more column, as one label; it
    is right where prediction and reference share an unknown one. Without `labels` they are those of the data.
    """

    citation_text = _SCIKIT_LEARN
    statistics_of = "labels"

    def __init__(self, labels: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self._labels = list(labels)
        self.columns = 3 * (len(self._labels) + 1)

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """For each label and one more 0 or 1: right, predicted, expected, one after the other: [n, 3 (labels + 1)]."""
        first = [right[0] for right in references]
        labels = self._labels or sorted({label for text in [*predictions, *first] for label in labels_in(text)})
        column = {label: index for index, label in enumerate(labels)}
        found = np.zeros((len(first), 3, len(labels) + 1))
        for row, (prediction, reference) in enumerate(zip(predictions, first, strict=True)):
            predicted, expected = labels_in(prediction, column), labels_in(reference, column)
            for index, some in enumerate((predicted & expected, predicted, expected)):
                found[row, index, [column.get(label, -1) for label in some]] = 1
        return found.reshape(len(first), 3 * (len(labels) + 1))

    def parts(self, sums: Floats) -> tuple[Floats, Floats, Floats]:
        """How often each label was right, predicted, expected: each [..., labels + 1]."""
        columns = sums.shape[-1] // 3
        return sums[..., :columns], sums[..., columns : 2 * columns], sums[..., 2 * columns :]


class MacroF1(LabelMetric):
    """Mean over the labels of each label's F1, 0..1; the labels are those of references or predictions.

    F1 is 2 · right / (predicted + expected). A label that is never predicted, or that is predicted but never right, has
    F1 0; one that is neither predicted nor expected is left out.
    """

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """Unweighted mean F1."""
        right, predicted, expected = self.parts(sums)
        seen = predicted + expected
        return {"macro_f1": ratio(ratio(2 * right, seen).sum(-1), (seen > 0).sum(-1).astype(float))}


class MicroF1(LabelMetric):
    """F1 of all labels of all examples together, 0..1: 2 · right / (predicted + expected). Where every example has one
    label it is the accuracy."""

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """F1 of the sums over labels."""
        right, predicted, expected = (part.sum(-1) for part in self.parts(sums))
        return {"micro_f1": ratio(2 * right, predicted + expected)}


class Matthews(LabelMetric):
    """Correlation of predicted and expected labels, -1..1, 0 for guesses, also where classes are unbalanced.

    The R_K statistic for any number of classes: with c examples right of s, p_k predicted and t_k expected of label k,
    (c s − Σ p_k t_k) / sqrt((s² − Σ p_k²) (s² − Σ t_k²)); 0 where all predictions, or all references, are the same.
    """

    citation_text = "Gorodkin 2004, Comparing two K-category assignments by a K-category correlation coefficient"

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """R_K."""
        right, predicted, expected = self.parts(sums)
        examples = expected.sum(-1)
        covariance = right.sum(-1) * examples - (predicted * expected).sum(-1)
        spread = (examples**2 - (predicted**2).sum(-1)) * (examples**2 - (expected**2).sum(-1))
        return {"matthews": ratio(covariance, np.sqrt(np.maximum(spread, 0.0)))}

    def each(self, statistics: Floats) -> dict[str, Floats]:
        """One example has no correlation: 1 where it is right."""
        return {"matthews": self.parts(statistics)[0].sum(-1)}
