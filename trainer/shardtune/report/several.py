"""The page that compares runs: the first one is what the others are compared with."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from shardtune.errors import ConfigError
from shardtune.report import facts
from shardtune.report.charts import Chart, Point, Series, line_chart
from shardtune.report.curves import FIGURES, MOST_SCORES, of_evaluation, of_training, scores_of, unit_of_loss
from shardtune.report.files import RunFiles, called_apart
from shardtune.report.render import render
from shardtune.report.scores import Cell, Compared, Sides, Table, compared_split, parts_of, value_of
from shardtune.report.words import Verdict, cut, interval, number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = 6
MOST_KEYS = 100
VALUE_CHARACTERS = 300

Pairs = Mapping[tuple[int, str], dict[str, Any]]
"""By the number of a run, from 1 on, and the split: how it compares with the first run on the same examples, as a split
of comparison.json, in which the runs are called by their letters."""


def judged_alike(first: RunFiles, other: RunFiles) -> list[str]:
    """The splits of which both runs judged the same examples, in the same order, as their predictions tell, and left
    statistics of them."""
    found = []
    ours, theirs = parts_of(first), parts_of(other)
    for split in ours:
        if split in theirs:
            names = [str(part[split].get("tuned")) for part in (ours, theirs)]
            left = [run.has_statistics(name, split) for run, name in zip((first, other), names, strict=True)]
            digests = [run.digest(name, split) for run, name in zip((first, other), names, strict=True)]
            if all(left) and digests[0] is not None and digests[0] == digests[1]:
                found.append(split)
    return found


def comparison_page(runs: Sequence[RunFiles], pairs: Pairs, notes: Sequence[str] = ()) -> str:
    """One self-contained page; `notes` are said as warnings. Raises ConfigError for more runs than there are
    letters."""
    if len(runs) > len(LETTERS):
        raise ConfigError(f"command line --run: {len(runs)} runs are too many; {len(LETTERS)} can be compared")
    names = [cut(name, 120)[0] for name in called_apart(runs)]
    letters = LETTERS[: len(runs)]
    parts = [parts_of(run) for run in runs]
    rows: dict[str, dict[str, str]] = {}
    for letter, run in zip(letters, runs, strict=True):
        for name, text in facts.cost(run):
            rows.setdefault(name, {})[letter] = text
    return render(
        "runs.html.jinja",
        runs=[
            (letter, index % COLOURS + 1, name, facts.subtitle(run), str(run.folder))
            for index, (letter, name, run) in enumerate(zip(letters, names, runs, strict=True))
        ],
        compared=_compared(pairs, names),
        tables=_tables(parts, pairs),
        keys=_different_keys(runs),
        charts=_charts(runs),
        cost=Table(
            list(letters),
            [(name, [Cell(cells.get(letter, "–")) for letter in letters]) for name, cells in rows.items()],
        ),
        warnings=[*_by_run(letters, [facts.warnings(run) for run in runs]), *notes],
        missing=_by_run(letters, [run.missing for run in runs]),
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def _by_run(letters: str, texts: Sequence[Sequence[str]]) -> list[str]:
    """Each text once, with the runs that it is said of."""
    of: dict[str, list[str]] = {}
    for letter, said in zip(letters, texts, strict=True):
        for text in said:
            of.setdefault(text, []).append(letter)
    return [f"{', '.join(which)}: {text}" for text, which in of.items()]


def _compared(pairs: Pairs, names: Sequence[str]) -> list[Compared]:
    """Test first."""
    found = []
    for (index, split), part in sorted(pairs.items(), key=lambda pair: (pair[0][1] != "test", pair[0][1], pair[0][0])):
        after = LETTERS[index]
        sides = Sides(f"A ({names[0]})", f"{after} ({names[index]})")
        called = {"names": {"A": sides.before, after: sides.after}, "colours": {"A": 1, after: index % COLOURS + 1}}
        one = compared_split(split, {**part, **called}, sides)
        titles = {"better": f"{after} is better than A", "worse": f"{after} is worse than A"}
        one.verdict = Verdict(one.verdict.kind, titles.get(one.verdict.kind, one.verdict.title))
        if one.picture is not None:
            one.picture.identifier += f"-{after}"
        found.append(one)
    return found


def _tables(parts: Sequence[Mapping[str, dict[str, Any]]], pairs: Pairs) -> list[tuple[str, Table, list[str]]]:
    """Of each split the final scores of all runs, and what to know about them."""
    found = []
    for split in dict.fromkeys(split for run in parts for split in run):
        scores = dict.fromkeys(
            score for run in parts if split in run for score in run[split]["variants"].get(run[split].get("tuned"), {})
        )
        rows = []
        for score in scores:
            cells = []
            for run in parts:
                value, low, high = value_of(run[split], run[split].get("tuned"), score) if split in run else (None,) * 3
                cells.append(Cell(number(value), interval(low, high, like=value)))
            rows.append((str(score), cells))
        notes = [
            f"{LETTERS[index]} and A did not judge the same examples, or left no statistics of them: there is no test."
            for index in range(1, len(parts))
            if (index, split) not in pairs
        ]
        main = next((str(run[split].get("metric")) for run in parts if split in run), None)
        found.append((split, Table(list(LETTERS[: len(parts)]), rows, main=main), notes))
    return sorted(found, key=lambda one: (one[0] != "test", one[0]))


def _different_keys(runs: Sequence[RunFiles]) -> Table:
    """The keys of the configs that are not the same in all; of the run's name only the value tells."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({one.get(key) for one in flat}) > 1]
    rows = [(key, [Cell(cut(one.get(key, "–"), VALUE_CHARACTERS)[0]) for one in flat]) for key in keys[:MOST_KEYS]]
    return Table(list(LETTERS[: len(runs)]), rows, len(keys) - len(rows), texts=True)


def _flat(section: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", "null" if value is None else str(facts.shortest(value))))
    return found


def _charts(runs: Sequence[RunFiles]) -> list[Chart]:
    def chart(
        identifier: str, title: str, unit: str, lines: Sequence[Sequence[Point]], marked: bool, **how: Any
    ) -> None:
        series = [
            Series(LETTERS[index], points, index % COLOURS + 1, dashed=index >= COLOURS, marked=marked)
            for index, points in enumerate(lines)
        ]
        found.append(line_chart(f"curve-{identifier}", title, unit, series, **how))

    found: list[Chart | None] = []
    chart(
        "loss",
        "Training loss",
        " or ".join(dict.fromkeys(unit_of_loss(run) for run in runs)),
        [of_training(run.training, "loss") for run in runs],
        False,
    )
    scores = ["loss", *scores_of([line for run in runs for line in run.evaluations])[:MOST_SCORES]]
    for score in scores:
        lines = [of_evaluation(run, "validation", score).points for run in runs]
        chart(f"score-{score}", f"{score} on validation", "", lines, True)
    for figure in FIGURES:
        lines = [of_training(run.training, figure.key, figure.scale) for run in runs]
        how = {"from_zero": figure.from_zero, "maybe_logarithmic": figure.maybe_logarithmic}
        chart(figure.key, figure.title, figure.unit, lines, False, **how)
    peaks = [of_training(run.training, "peak_memory_bytes", 1e-9) for run in runs]
    chart("memory", "Peak memory", "GB", peaks, False, from_zero=True)
    return [one for one in found if one is not None]
