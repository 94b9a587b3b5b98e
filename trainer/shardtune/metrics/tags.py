"""Metrics of tagged tokens: predictions and references are JSON lists of tags, one for each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from shardtune.metrics.summed import Floats, SummedMetric, ratio, rows


class Span(NamedTuple):
    """An entity: tokens first to last of a type."""

    kind: str
    first: int
    last: int


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities of BIO tags such as B-PER, I-PER, O, as conlleval reads them.

    An entity begins at a B, and also at an I that follows no tag of the same type; it ends before the next that begins
    or an O. A tag without a type has the empty one. So tags that break the scheme still give entities.
    """
    found: set[Span] = set()
    begun = before = None
    for place, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        inside = kind if mark in ("B", "I") else None
        if begun is not None and (inside != before or mark == "B"):
            found.add(Span(before or "", begun, place - 1))
            begun = None
        if inside is not None and begun is None:
            begun = place
        before = inside
    return found


class EntityF1(SummedMetric):
    """F1 of named entities, 0..1: one is right where type, first and last token all are.

    2 · right / (predicted + expected) over all types and examples together; 0 where there are none. Tags are BIO, read
    as conlleval does: an I after another type, or after no entity, begins one.
    """

    citation_text = "Tjong Kim Sang and De Meulder 2003, the CoNLL-2003 shared task, W03-0419 (conlleval)"
    columns = 3

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """Right, predicted and expected entities, [n, 3]."""
        found = []
        for prediction, right in zip(predictions, references, strict=True):
            predicted, expected = spans(json.loads(prediction)), spans(json.loads(right[0]))
            found.append([len(predicted & expected), len(predicted), len(expected)])
        return rows(found, self.columns)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """F1 of the sums."""
        return {"entity_f1": ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])}


class TokenAccuracy(SummedMetric):
    """Share of the references' tags that are predicted, 0..1, over all tokens of all examples. A prediction that is
    shorter than its reference lacks its last tags."""

    citation_text = "Tjong Kim Sang and De Meulder 2003, the CoNLL-2003 shared task, W03-0419 (conlleval)"
    columns = 2

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """Right tags and tags, [n, 2]."""
        found = []
        for prediction, right in zip(predictions, references, strict=True):
            expected = json.loads(right[0])
            found.append([sum(p == e for p, e in zip(json.loads(prediction), expected, strict=False)), len(expected)])
        return rows(found, self.columns)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """The share."""
        return {"token_accuracy": ratio(sums[..., 0], sums[..., 1])}
