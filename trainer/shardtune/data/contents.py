"""What can be told of examples by their contents: repeated ones, those in two splits, and their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardtune.data.splits import LabelsOf, content_of
from shardtune.examples import Text

BYTES = 8
"""Of a content's digest: of ten million examples, two that differ have the same one with a chance of 3e-6."""


def contents(splits: Mapping[str, Sequence[Text]], labels_of: LabelsOf | None) -> dict[str, Any]:
    """Figures of the splits, JSON-like.

    `duplicates`: of each split, how many examples stand in it before, with the same source and target. `overlap`: of
    each two splits, as first/second, how many examples of the second stand in the first. `labels`: of each split, how
    many targets name each label, most first; empty where targets are no labels (`labels_of` is None).
    """
    digests = {name: _digests(texts) for name, texts in splits.items()}
    unique = {name: np.unique(found) for name, found in digests.items()}
    return {
        "duplicates": {name: len(digests[name]) - len(unique[name]) for name in splits},
        "overlap": {
            f"{first}/{second}": int(np.isin(digests[second], unique[first]).sum())
            for first, second in combinations(splits, 2)
        },
        "labels": {name: _labels(texts, labels_of) for name, texts in splits.items() if labels_of is not None},
    }


def _digests(texts: Sequence[Text]) -> NDArray[np.uint64]:
    """[n]: the first bytes of each content's digest."""
    first_bytes = b"".join(content_of(text)[:BYTES] for text in texts)
    return np.frombuffer(first_bytes, dtype=np.uint64)


def _labels(texts: Sequence[Text], labels_of: LabelsOf) -> dict[str, int]:
    return dict(Counter(label for text in texts for label in labels_of(text.target)).most_common())
