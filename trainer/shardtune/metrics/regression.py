"""Metrics of predicted numbers, which are written as texts; of several references the first counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardtune.metrics.summed import Floats, Mean, SummedMetric, ratio

_CONSTANT = 1e-12
"""Σ(x − mean)² / Σx² below which x is one number and rounding errors."""


class Mse(Mean):
    """Mean squared difference of predicted and expected number; lower is better."""

    citation_text = "Gauss 1809, Theoria motus corporum coelestium, book 2, section 3"
    score = "mse"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """(x − y)²."""
        return (float(prediction) - float(references[0])) ** 2


class Pearson(SummedMetric):
    """Correlation of predicted and expected numbers, -1..1.

    (n Σxy − Σx Σy) / sqrt((n Σx² − (Σx)²) (n Σy² − (Σy)²)); 0 where all x, or all y, are the same (to a millionth of
    their size: sums of squares cannot tell smaller differences from rounding errors).
    """

    citation_text = "Pearson 1896, Regression, heredity, and panmixia, Phil. Trans. R. Soc. A 187, 253-318"
    columns = 5

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """x, y, x², y², x y: [n, 5]."""
        x = np.array([float(text) for text in predictions])
        y = np.array([float(right[0]) for right in references])
        return np.stack([x, y, x * x, y * y, x * y], -1)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """r."""
        x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spreads = []
        for plain, squared in ((x, xx), (y, yy)):
            spread = counts * squared - plain**2
            spreads.append(np.where(spread > _CONSTANT * counts * squared, spread, 0.0))
        r = ratio(counts * xy - x * y, np.sqrt(spreads[0]) * np.sqrt(spreads[1]))
        return {"pearson": np.clip(r, -1.0, 1.0)}

    def each(self, statistics: Floats) -> dict[str, Floats]:
        """One example has no correlation: minus the squared difference."""
        return {"pearson": 2 * statistics[:, 4] - statistics[:, 2] - statistics[:, 3]}
