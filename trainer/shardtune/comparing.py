"""Better than what, by how much, is it sure, and where: what a split's entry in comparison.json holds.

Nothing here looks at texts. A variant, which is a model or a simple baseline, is its statistics: float64 [n, K] with a
row for each example (see `metrics.Scorer`), in the same order for all variants.

Uncertainty is that of the examples: the split is taken for a sample of all texts of its kind. Bootstrap resamples draw
n examples with replacement, the same ones for every variant, so that differences are paired and an example that is
hard for both sides does not hide which is better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardtune.metrics import Scorer

Floats = NDArray[np.float64]
RESAMPLES = 1_000
SHOWN = 20
"""Examples listed among the largest wins, and among the largest losses; values of a field with a slice of their own."""
BLOCK = 2_000_000
"""Elements of the matrix of counts that are in memory at once (16 MB)."""
NEARLY = 1e-12
"""Relative size of differences that are rounding errors."""


def compare(
    scorer: Scorer,
    statistics: Mapping[str, Floats],
    tuned: str,
    base: str | None = None,
    metric: str | None = None,
    lengths: Sequence[int] | NDArray[np.integer] | None = None,
    fields: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """What comparison.json says of a split; it is JSON as it is.

    `statistics`: by variant, [n, K] each. `tuned`: the variant that is the result; `base`: what it is compared with, if
    there is one. `metric`: the score by which examples are won or lost; None: `main_score`. `lengths`: of the n
    sources; `fields`: values of the examples, by field. `seed`: of the resamples.

    - variants: each score of each variant as value, low and high (`intervals`).
    - tests: tuned − base, score by score, with interval and p (`paired_tests`).
    - wins, losses, ties: examples in which tuned is better, worse and equal by `metric`.
    - differences: the largest of them, first wins, then losses; above 0 tuned is better, whichever way the metric runs.
    - slices: both variants' scores by length and by field (`by_length`, `by_value`).
    - lower_is_better, no_direction: which scores are read that way.

    Raises ValueError where the variants have no examples or differ in their number, and for a score that is not there.
    """
    numbers = {len(rows) for rows in statistics.values()}
    if len(numbers) != 1 or numbers == {0}:
        raise ValueError(f"variants have the same examples, at least one, not {sorted(numbers)}")
    examples = numbers.pop()
    values = {name: scorer.scores(rows) for name, rows in statistics.items()}
    shared = [name for name in values[tuned] if base is None or name in values[base]]
    if metric is not None and metric not in shared:
        raise ValueError(f"no score {metric}; there are {', '.join(shared)}")
    main = metric or main_score(shared, scorer)
    drawn = resampled(scorer, statistics, resamples, seed)
    found: dict[str, Any] = {
        "examples": examples,
        "metric": main,
        "base": base,
        "tuned": tuned,
        "lower_is_better": [name for name in scorer.names if scorer.lower_is_better(name)],
        "no_direction": [name for name in scorer.names if not scorer.has_direction(name)],
        "variants": {name: intervals(values[name], drawn[name]) for name in statistics},
        "tests": {},
        "wins": 0,
        "losses": 0,
        "ties": 0,
        "differences": [],
    }
    if base is not None:
        found["tests"] = paired_tests(values[tuned], values[base], drawn[tuned], drawn[base])
        gains = scorer.each(main, statistics[tuned]) - scorer.each(main, statistics[base])
        found |= won_and_lost(-gains if scorer.lower_is_better(main) else gains)
    groups = [("length", *group) for group in by_length(np.asarray(lengths))] if lengths is not None else []
    groups += [(field, *group) for field, given in (fields or {}).items() for group in by_value(given)]
    found["slices"] = [
        {
            "by": by,
            "value": value,
            "examples": len(rows),
            "base": {} if base is None else _finite(scorer.scores(statistics[base][rows])),
            "tuned": _finite(scorer.scores(statistics[tuned][rows])),
        }
        for by, value, rows in groups
    ]
    return found


def main_score(names: Sequence[str], scorer: Scorer) -> str:
    """The first score of predictions of which one value is better than another; the loss where there is none."""
    directed = [name for name in names if scorer.has_direction(name)]
    return next((name for name in directed if name not in ("loss", "perplexity")), (directed or list(names))[0])


def resampled(
    scorer: Scorer, statistics: Mapping[str, Floats], resamples: int, seed: int
) -> dict[str, dict[str, Floats]]:
    """By variant and score, its values [resamples] in the same resamples of the examples.

    Of each resample it is counted how often it holds each example, and counts @ statistics are its sums; a few
    resamples at a time, so that memory does not grow with resamples × examples.
    """
    examples = len(next(iter(statistics.values())))
    sums: dict[str, list[Floats]] = {name: [] for name in statistics}
    for counts in _counts(examples, resamples, seed):
        for name, rows in statistics.items():
            sums[name].append(counts @ rows)
    numbers = np.full(resamples, float(examples))
    return {name: scorer.values(np.concatenate(parts), numbers) for name, parts in sums.items()}


def _counts(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each resample holds each example: float64 [some, examples], altogether `resamples` rows. They do not
    depend on how many rows come at once."""
    draw = np.random.default_rng(seed)
    at_once = max(1, BLOCK // examples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        counts = np.empty((rows, examples))
        for row in counts:
            row[:] = np.bincount(draw.integers(examples, size=examples), minlength=examples)
        yield counts


def intervals(values: Mapping[str, float], drawn: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
    """Each score's value with the ends of its 95 % bootstrap percentile interval: the 2.5 % and 97.5 % quantiles of its
    values in resamples (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13). A score that is not
    finite is left out."""
    return {
        name: {"value": value, **_ends(drawn[name])}
        for name, value in values.items()
        if np.isfinite(value) and name in drawn and np.isfinite(drawn[name]).any()
    }


def paired_tests(
    tuned: Mapping[str, float],
    base: Mapping[str, float],
    drawn_tuned: Mapping[str, Floats],
    drawn_base: Mapping[str, Floats],
) -> dict[str, dict[str, float]]:
    """tuned − base of each score that both have, with its 95 % percentile interval and a two-sided p.

    The paired bootstrap (Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation, W04-3250; Efron
    and Tibshirani 1993, chapter 16). With d the difference, d_b that in resample b and m their mean, the d_b − m stand
    for the differences of two variants that are equally good, and

        p = (1 + the number of b with |d_b − m| ≥ |d|) / (1 + resamples)

    so that it is never below 1 / (1 + resamples), 0.001 with 1,000, however large the difference.
    """
    found = {}
    for name in tuned:
        difference = tuned[name] - base.get(name, np.nan)
        if not np.isfinite(difference) or name not in drawn_tuned or name not in drawn_base:
            continue
        drawn = drawn_tuned[name] - drawn_base[name]
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn):
            continue
        # What differs by rounding only counts as equal: scores of few examples take few values.
        slack = NEARLY * max(abs(tuned[name]), abs(base[name]))
        extreme = np.abs(drawn - drawn.mean()) >= abs(difference) - slack
        found[name] = {
            "difference": difference,
            **_ends(drawn),
            "p": float((1 + np.count_nonzero(extreme)) / (1 + len(drawn))),
        }
    return found


def won_and_lost(gains: Floats) -> dict[str, Any]:
    """Wins, losses and ties of examples, and the largest wins and losses, from how much better each is, [n].

    Of equal ones the first in the split's order come first. An example without a score is a tie.
    """
    gains = np.where(np.isfinite(gains), gains, 0.0)
    gains = np.where(np.abs(gains) <= NEARLY * max(1.0, np.abs(gains).max()), 0.0, gains)
    best = np.argsort(-gains, kind="stable")[:SHOWN]
    worst = np.argsort(gains, kind="stable")[:SHOWN]
    listed = [*(place for place in best if gains[place] > 0), *(place for place in worst if gains[place] < 0)]
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(gains) - wins - losses,
        "differences": [{"position": int(place), "difference": float(gains[place])} for place in listed],
    }


def by_length(lengths: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Four parts of the examples, from the shortest to the longest quarter, as (lengths from–to, places); examples of
    the same length stay together, so that there may be fewer parts."""
    ends = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    part = np.searchsorted(ends, lengths)
    for index in range(len(ends)):
        places = np.flatnonzero(part == index)
        low, high = lengths[places].min(), lengths[places].max()
        yield (f"{low}" if low == high else f"{low}–{high}"), places


def by_value(values: Sequence[str]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """The examples of each value, the most frequent first, as (value, places); those beyond the first 20 values
    together as "other", or "other values" where one is called so."""
    given = np.asarray(values, dtype=object)
    frequent = [value for value, _ in sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))[:SHOWN]]
    rest = np.ones(len(given), dtype=bool)
    for value in frequent:
        here = given == value
        rest &= ~here
        yield value, np.flatnonzero(here)
    if rest.any():
        yield ("other values" if "other" in frequent else "other"), np.flatnonzero(rest)


def _ends(drawn: Floats) -> dict[str, float]:
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _finite(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if np.isfinite(value)}
