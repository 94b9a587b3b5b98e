"""Scores of predictions against references, by the names of `evaluation.metrics`, without a network.

Each metric is an `evaluate.Metric`. Importing `evaluate` takes seconds, because it imports its pipelines
(transformers, datasets, pandas, scipy) whatever is asked of it, so it waits until something is scored.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardtune.metrics.names import has_direction, lower_is_better, score_names
from shardtune.metrics.own import check_own
from shardtune.metrics.scorer import Scorer

__all__ = ["Scorer", "check_own", "has_direction", "lower_is_better", "score", "score_names"]


def score(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> dict[str, float]:
    """All scores of the metrics called `names`, in their order, as one flat dictionary; a reference may be a list of
    right predictions.

    Keys: rouge gives rouge1, rouge2, rougeL and rougeLsum, the others give their own name. All lie in 0..1, but bleu
    and chrf in 0..100, matthews and pearson in -1..1, length and mse from 0. `perplexity`, which needs losses, is left
    out. Without predictions the result is empty: a mean over nothing is no score, and 0 would look like a bad one.

    Raises ValueError for an unknown name, and where predictions and references differ in number.
    """
    score_names(names)
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    wanted = [name for name in names if name != "perplexity"]
    if not wanted or not predictions:
        return {}
    from shardtune.metrics.labels import labels_in
    from shardtune.metrics.summed import as_lists

    lists = as_lists(references)
    labels = sorted({label for text in [*predictions, *(right[0] for right in lists)] for label in labels_in(text)})
    scorer = Scorer(wanted, labels)
    return scorer.scores(scorer.statistics(predictions, lists))
