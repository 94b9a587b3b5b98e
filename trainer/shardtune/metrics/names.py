"""Which metrics there are, which scores each gives, and which way is better; imports nothing."""

from __future__ import annotations

from collections.abc import Sequence

LOSS = "loss"
"""The first score of all: the sum of the targets' losses over their number."""

SCORES: dict[str, tuple[str, ...]] = {
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "exact_match": ("exact_match",),
    "squad_em": ("squad_em",),
    "token_f1": ("token_f1",),
    "length": ("length",),
    "accuracy": ("accuracy",),
    "macro_f1": ("macro_f1",),
    "micro_f1": ("micro_f1",),
    "matthews": ("matthews",),
    "entity_f1": ("entity_f1",),
    "token_accuracy": ("token_accuracy",),
    "mse": ("mse",),
    "pearson": ("pearson",),
    "perplexity": ("perplexity",),
}
"""The scores of each metric, by its name."""

LOWER_IS_BETTER = frozenset({LOSS, "perplexity", "mse"})
NO_DIRECTION = frozenset({"length"})


def score_names(metrics: Sequence[str]) -> tuple[str, ...]:
    """The names of all scores of `metrics`, in their order, each once, after "loss"; a metric of your own
    (module:function) gives one score of the same name.

    Raises ValueError for an unknown name.
    """
    unknown = [name for name in metrics if name not in SCORES and ":" not in name]
    if unknown:
        raise ValueError(f"unknown metrics: {', '.join(unknown)}; there are {', '.join(SCORES)}")
    names = [LOSS, *(score for name in metrics for score in SCORES.get(name, (name,)))]
    return tuple(dict.fromkeys(names))


def lower_is_better(score: str) -> bool:
    """Whether a smaller value of the score is the better one."""
    return score in LOWER_IS_BETTER


def has_direction(score: str) -> bool:
    """Whether one value of the score can be better than another: not so for the average length."""
    return score not in NO_DIRECTION
