"""Which curves a run has: of training, of its evaluations, of speed and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardtune.overfitting import PARTED, TRAINING
from shardtune.report.charts import Chart, Point, Series, line_chart
from shardtune.report.files import Line, RunFiles, finite
from shardtune.report.words import in_prompt

SPEEDS = {"examples_per_second": "examples a second", "generated_tokens_per_second": "generated tokens a second"}
"""What evaluation lines hold beside scores."""
MOST_SCORES = 12
"""So many scores have a chart; of a task with a score for each of many labels, the first ones."""
COLOURS = {"train": 1, "validation": 2, "test": 3}
SPLITS = ("validation", "test")
LEVELS = {"lead": "1st sentences"}
"""What a chart calls what tuning is compared with, where people may not know its name."""


class Figure(NamedTuple):
    """A figure of training lines that has a chart."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    from_zero: bool = True
    maybe_logarithmic: bool = False


FIGURES = (
    Figure("lr", "Learning rate", ""),
    Figure("grad_norm", "Gradient norm", "before clipping", maybe_logarithmic=True),
    Figure("tokens_per_second", "Speed", "tokens a second"),
    Figure("mfu", "Model FLOPs used", "% of the device's peak", 100.0),
    Figure("padding_share", "Padding", "% of positions computed", 100.0),
    Figure("step_seconds", "Time of a step", "seconds"),
    Figure("data_seconds", "Waiting for data", "seconds a step"),
    Figure("slowest_rank_share", "Slowest rank", "% longer than the mean of ranks", 100.0),
)
MEMORY = {
    "peak_memory_bytes": "peak", "memory_reserved_bytes": "reserved", "memory_allocated_bytes": "allocated",
}  # fmt: skip


def curves(run: RunFiles) -> list[Chart]:
    """All charts of a run; those that it has no figures for are left out."""
    found = [loss_chart(run), *score_charts(run)]
    for figure in FIGURES:
        series = [Series(figure.title, of_training(run.training, figure.key, figure.scale))]
        found.append(
            line_chart(
                f"curve-{figure.key}", figure.title, figure.unit, series,
                from_zero=figure.from_zero, maybe_logarithmic=figure.maybe_logarithmic,
            )
        )  # fmt: skip
    found.append(_memory_chart(run))
    return [chart for chart in found if chart is not None]


def loss_chart(run: RunFiles) -> Chart | None:
    """Training and validation together: where they part, the model learns the training data by heart."""
    series = [Series("training", of_training(run.training, "loss"), COLOURS["train"])]
    series += [of_evaluation(run, split, "loss") for split in SPLITS]
    return line_chart("curve-loss", "Loss", unit_of_loss(run), series)


def unit_of_loss(run: RunFiles) -> str:
    """What it is a mean of."""
    return "mean squared error" if is_regression(run) else "mean over targets, in nats"


def is_regression(run: RunFiles) -> bool:
    """Whether labels are numbers."""
    return run.setting("task.problem") == "regression"


def score_charts(run: RunFiles) -> Iterator[Chart | None]:
    """One for each score of the evaluations; dotted: what tuning is compared with, on validation, else on test."""
    for score in scores_of(run.evaluations)[:MOST_SCORES]:
        levels: dict[str, float] = {}
        for split in reversed(SPLITS):
            for line in run.evaluations:
                value = finite(line.get(score))
                if line.get("split") == split and isinstance(line.get("of"), str) and value is not None:
                    levels[line["of"]] = value
        called = {**LEVELS, "majority": "mean"} if is_regression(run) else LEVELS
        levels = {called.get(name) or in_prompt(name) or name: value for name, value in levels.items()}
        best_of = [(name, value) for name, value in levels.items() if name != "best"][:4]
        series = [of_evaluation(run, split, score) for split in SPLITS]
        yield line_chart(f"curve-score-{score}", score, "", series, levels=best_of)


def scores_of(lines: Sequence[Line]) -> list[str]:
    """The names of scores but for the loss, in the order in which they are first there."""
    beside = {"step", "split", "of", "loss", TRAINING, PARTED, *SPEEDS}
    return list(
        dict.fromkeys(
            key for line in lines for key, value in line.items() if key not in beside and finite(value) is not None
        )
    )


def of_training(lines: Sequence[Line], key: str, scale: float = 1.0) -> list[Point]:
    """A figure's points; None where a line has it as no finite number."""
    return [
        (line["step"], None if (value := finite(line[key])) is None else value * scale) for line in lines if key in line
    ]


def of_evaluation(run: RunFiles, split: str, score: str, label: str | None = None, colour: int | None = None) -> Series:
    """A score of the model as it was at each step; where a step was judged again, that counts."""
    points: dict[int, float | None] = {}
    for line in run.evaluations:
        if line.get("split") == split and "of" not in line and score in line:
            points[line["step"]] = finite(line[score])
    drawn = sorted(points.items(), key=lambda point: point[0])
    return Series(label or split, drawn, colour or COLOURS[split], dashed=split == "test", marked=True)


def _memory_chart(run: RunFiles) -> Chart | None:
    series = [
        Series(name, of_training(run.training, key, 1e-9), colour, dashed=colour > 1)
        for colour, (key, name) in enumerate(MEMORY.items(), 1)
    ]
    return line_chart("curve-memory", "Memory", "GB", series, from_zero=True)
