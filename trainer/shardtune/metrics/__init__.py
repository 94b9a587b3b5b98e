"""Scores of predictions against references, by the names of `evaluation.metrics`, without a network.

Each metric is an `evaluate.Metric`. Importing `evaluate` takes seconds, because it imports its pipelines
(transformers, datasets, pandas, scipy) whatever is asked of it, so it waits until something is scored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

NAMES = ("rouge", "bleu", "chrf", "exact_match", "accuracy", "macro_f1")
"""What `score` computes."""

ELSEWHERE = ("perplexity",)
"""Names that are no comparison of texts: exp(loss), computed where the loss is."""


def score(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All scores of the metrics called `names`, in their order, as one flat dictionary.

    Keys: rouge gives rouge1, rouge2, rougeL and rougeLsum (0..1), the others give their own name: bleu and
    chrf in 0..100; exact_match, accuracy and macro_f1 in 0..1. Higher is better everywhere. `perplexity` is
    left out. Without predictions the result is empty: a mean over nothing is no score, and 0 would look like
    a bad one.

    Raises ValueError for an unknown name, and where predictions and references differ in number.
    """
    unknown = [name for name in names if name not in NAMES + ELSEWHERE]
    if unknown:
        raise ValueError(f"unknown metrics: {', '.join(unknown)}; there are {', '.join(NAMES + ELSEWHERE)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    wanted = [name for name in names if name in NAMES]
    if not wanted or not predictions:
        return {}

    from shardtune.metrics.labels import Accuracy, MacroF1
    from shardtune.metrics.texts import Bleu, Chrf, ExactMatch, Rouge

    classes = {
        "rouge": Rouge,
        "bleu": Bleu,
        "chrf": Chrf,
        "exact_match": ExactMatch,
        "accuracy": Accuracy,
        "macro_f1": MacroF1,
    }
    scores: dict[str, float] = {}
    # A metric makes a folder even when it keeps its data in memory, by default under the user's home.
    with tempfile.TemporaryDirectory(prefix="shardtune-metrics-") as folder:
        for name in wanted:
            metric = classes[name](keep_in_memory=True, cache_dir=folder, seed=0)
            scores.update(metric.compute(predictions=list(predictions), references=list(references)) or {})
    return scores
