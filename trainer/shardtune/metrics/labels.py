"""Metrics of class labels: accuracy and macro F1."""

from __future__ import annotations

from sklearn.metrics import accuracy_score, f1_score

from shardtune.metrics.pairs import PairMetric

_SCIKIT_LEARN = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12, 2825-2830"


class Accuracy(PairMetric):
    """Share of predicted labels that are right, 0..1."""

    citation_text = _SCIKIT_LEARN

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Share of equal labels."""
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(PairMetric):
    """Mean over the labels of each label's F1, 0..1; the labels are those of references or predictions.

    A label that is never predicted, or that is predicted but never right, has F1 0.
    """

    citation_text = _SCIKIT_LEARN

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Unweighted mean F1."""
        # zero_division given: the value is 0 either way, but by default scikit-learn warns.
        value = f1_score(references, predictions, average="macro", zero_division=0.0)  # pyright: ignore[reportArgumentType]
        return {"macro_f1": float(value)}
