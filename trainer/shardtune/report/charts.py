"""Charts as plain geometry: where lines, ticks and labels stand. The templates draw them as SVG.

A chart is drawn at its own width and at most a few percent larger, so that its letters are as large as the page's.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shardtune.report.words import brief, nice_step, number

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 40
MOST_POINTS = 500
"""A longer line is thinned, with the least and the largest value of each part kept."""
LABEL_HEIGHT = 14
LETTER = 6.2
"""About the width of a letter of a label."""
MOST_LETTERS = 12
"""Of a label."""
LOG_FROM = 50.0
"""Positive values that differ by more than this factor are shown by their logarithm, where that is asked for."""

Point = tuple[float, float | None]
"""x and y; None: there is no value."""


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    colour: int = 1
    """Of the palette, from 1 on."""
    dashed: bool = False
    marked: bool = False
    """Whether each point has a marker, of a form that goes with the colour."""


class Tick(NamedTuple):
    """A place on an axis."""

    at: float
    text: str


class Marker(NamedTuple):
    """A point of a line."""

    x: float
    y: float
    said: str


class Label(NamedTuple):
    """The name of a line or a level, beside its end."""

    x: float
    y: float
    text: str
    colour: int
    """0: of a level."""


@dataclass
class Line:
    """A drawn line."""

    paths: list[str]
    """The `points` of polylines: there is one for each part without a gap."""
    colour: int
    dashed: bool
    markers: list[Marker]


@dataclass
class Frame:
    """The axes of a picture, and what is said of it."""

    identifier: str
    title: str
    description: str
    x_title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass
class Chart(Frame):
    """Curves: all that the template needs."""

    unit: str
    lines: list[Line] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    """The heights of dotted horizontal lines."""
    labels: list[Label] = field(default_factory=list)


class Axis(NamedTuple):
    """From values to places."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 1)


def line_chart(
    identifier: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_title: str = "step",
    from_zero: bool = False,
    maybe_logarithmic: bool = False,
    levels: Sequence[tuple[str, float]] = (),
) -> Chart | None:
    """None where no series has a point. `levels`: values that are compared with, and what they are of."""
    series = [one for one in series if any(y is not None for _, y in one.points)]
    if not series:
        return None
    values = [y for one in series for _, y in one.points if y is not None] + [value for _, value in levels]
    places = [x for one in series for x, y in one.points if y is not None]
    logarithmic = maybe_logarithmic and min(values) > 0 and max(values) > LOG_FROM * min(values)
    names = [_short(text) for text in [*(one.label for one in series), *(text for text, _ in levels)]]
    right = WIDTH - RIGHT if len(names) == 1 else WIDTH - 10 - LETTER * max(map(len, names))
    x_axis = _axis(min(places), max(places), LEFT, right, exact=True)
    low, high = min(values), max(values)
    if from_zero and not logarithmic:
        low, high = min(low, 0.0), max(high, 0.0)
    y_axis = _axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    thinned = max(len(one.points) for one in series) > MOST_POINTS
    chart = Chart(
        identifier=as_identifier(identifier),
        title=title,
        unit=f"{unit}, logarithmic" if logarithmic and unit else "logarithmic" if logarithmic else unit,
        description=_described(series, x_title, thinned),
        x_title=x_title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=right,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        x_ticks=_ticks(x_axis, 4, least=1),
        y_ticks=_ticks(y_axis, 5),
    )
    for one in series:
        chart.lines.append(_line(one, x_axis, y_axis))
    chart.levels = [y_axis.place(value) for _, value in levels]
    if len(names) > 1:
        ends = [y_axis.place([y for _, y in one.points if y is not None][-1]) for one in series]
        colours = [one.colour for one in series] + [0] * len(levels)
        _label(chart, list(zip(names, [*ends, *chart.levels], colours, strict=True)))
    return chart


def _short(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, with the first, the last, and the least and largest value of each part between them."""
    if len(points) <= most:
        return list(points)
    parts = (most - 2) // 2
    inner = len(points) - 2
    kept = [points[0]]
    for part in range(parts):
        piece = points[1 + inner * part // parts : 1 + inner * (part + 1) // parts]
        there = [point for point in piece if point[1] is not None]
        if not there:
            kept += piece[:1]  # the gap stays
            continue
        least, largest = (choose(there, key=lambda p: p[1]) for choose in (min, max))  # type: ignore[arg-type, return-value]
        kept += sorted({least, largest})
    return [*kept, points[-1]]


def as_identifier(text: str) -> str:
    """Letters, digits and dashes; where others had to go, a number keeps it apart from what was alike."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    return plain if plain == text else f"{plain}-{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


def _axis(low: float, high: float, start: float, stop: float, exact: bool = False, logarithmic: bool = False) -> Axis:
    """From round values to round values; `exact`: no wider than the values."""
    if logarithmic:
        return Axis(10 ** (math.log10(low) - 0.05), 10 ** (math.log10(high) + 0.05), start, stop, True)
    if high == low:
        room = abs(low) * 0.1 or 1.0
        low, high = (low - room, high + room) if low or exact else (0.0, room)
    if not exact:
        step = nice_step(high - low, 5)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high, start, stop)


def _ticks(axis: Axis, parts: int, least: float = 0.0) -> list[Tick]:
    """About so many round values; `least`: the smallest step between them, 1 for counts."""
    if axis.logarithmic:
        exponents = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        factors = (1,) if len(exponents) > 4 else (1, 3) if len(exponents) > 2 else (1, 2, 5)
        every = -(-len(exponents) // 6)
        found = [factor * 10.0**power for power in exponents[::every] for factor in factors]
    else:
        step = max(nice_step(axis.high - axis.low, parts), least)
        first = math.ceil(axis.low / step - 1e-9)
        found = [step * index for index in range(first, math.floor(axis.high / step + 1e-9) + 1)]
    found = [round(value, 12) for value in found if axis.low * (1 - 1e-12) <= value <= axis.high * (1 + 1e-12) + 1e-15]
    largest = max(map(abs, found), default=0.0)
    return [Tick(axis.place(value), brief(value, largest)) for value in found]


def _line(one: Series, x_axis: Axis, y_axis: Axis) -> Line:
    paths: list[list[str]] = [[]]
    markers = []
    for x, y in thinned(one.points):
        if y is None:
            paths.append([])
            continue
        across, up = x_axis.place(x), y_axis.place(y)
        paths[-1].append(f"{across:g},{up:g}")
        if one.marked:
            markers.append(Marker(across, up, f"{one.label}, step {x:g}: {number(y)}"))
    if len(markers) > 60:  # they would hide the line
        markers = []
    lone = [path[0].split(",") for path in paths if len(path) == 1] if not one.marked else []
    markers += [Marker(float(x), float(y), one.label) for x, y in lone]
    return Line([" ".join(path) for path in paths if len(path) > 1], one.colour, one.dashed, markers)


def _label(chart: Chart, named: Sequence[tuple[str, float, int]]) -> None:
    """Names right of the ends of lines and levels, moved apart where they would lie on each other."""
    ordered = sorted(named, key=lambda one: one[1])
    lowest = chart.top + 4
    room = max(chart.bottom - chart.top, LABEL_HEIGHT * len(ordered))
    for index, (text, y, colour) in enumerate(ordered):
        rest = LABEL_HEIGHT * (len(ordered) - 1 - index)
        y = max(lowest, min(y, chart.top + room - 3 - rest))
        chart.labels.append(Label(chart.right + 7, round(y, 1), text, colour))
        lowest = y + LABEL_HEIGHT


def _described(series: Sequence[Series], x_title: str, is_thinned: bool) -> str:
    said = []
    for one in series:
        there = [(x, y) for x, y in one.points if y is not None]
        (first_x, first), (last_x, last) = there[0], there[-1]
        said.append(
            f"{one.label} from {number(first)} at {x_title} {first_x:g} to {number(last)} at {x_title} {last_x:g}"
        )
    more = f" Lines of more than {MOST_POINTS} points are thinned; the least and largest values are kept." * is_thinned
    return "; ".join(said) + "." + more


class Bar(NamedTuple):
    """A bar of a histogram."""

    x: float
    y: float
    width: float
    height: float
    said: str


@dataclass
class Histogram(Frame):
    """Bars that stand side by side."""

    bars: list[Bar]


def histogram(identifier: str, title: str, bars: Sequence[Sequence[float]], x_title: str) -> Histogram | None:
    """Of [low, high, count], both ends included, whole numbers. None where there is none."""
    if not bars:
        return None
    height, bottom = 190, 190 - BOTTOM
    low, high = bars[0][0] - 0.5, bars[-1][1] + 0.5
    x_axis = Axis(low, high, LEFT, WIDTH - RIGHT)
    y_axis = _axis(0.0, max(count for _, _, count in bars) or 1.0, bottom, TOP)
    drawn = []
    for first, last, count in bars:
        left, right = x_axis.place(first - 0.5), x_axis.place(last + 0.5)
        top = y_axis.place(count)
        said = f"{first:g}" if first == last else f"{first:g} to {last:g}"
        drawn.append(Bar(left + 0.5, top, max(right - left - 1, 0.6), max(bottom - top, 0), f"{said}: {count:,.0f}"))
    fullest = max(bars, key=lambda bar: bar[2])
    description = (
        f"{sum(bar[2] for bar in bars):,.0f} examples between {bars[0][0]:g} and {bars[-1][1]:g} tokens; most, "
        f"{fullest[2]:,.0f}, have {fullest[0]:g} to {fullest[1]:g}."
    )
    return Histogram(
        as_identifier(identifier), title, description, x_title, WIDTH, height, LEFT, WIDTH - RIGHT, TOP, bottom,
        _ticks(x_axis, 5, least=1), _ticks(y_axis, 4, least=1), drawn,
    )  # fmt: skip


class Whisker(NamedTuple):
    """A value with its interval."""

    label: str
    y: float
    at: float
    low: float | None
    high: float | None
    text: str
    colour: int


@dataclass
class Whiskers:
    """Values of one score with their intervals, one under the other."""

    identifier: str
    title: str
    description: str
    width: float
    height: float
    left: float
    right: float
    bottom: float
    ticks: list[Tick]
    rows: list[Whisker]

    @property
    def with_intervals(self) -> bool:
        """Whether any value has one."""
        return any(row.low is not None and row.high is not None for row in self.rows)


def whiskers(
    identifier: str, title: str, rows: Sequence[tuple[str, float, float | None, float | None, int]]
) -> Whiskers | None:
    """Of (label, value, low, high, colour). None where there is none."""
    if not rows:
        return None
    step, width = 34, WIDTH
    left, right, bottom = 8, width - 8, step * len(rows) + 6
    ends = [end for _, value, low, high, _ in rows for end in (value, low, high) if end is not None]
    axis = _axis(min(ends), max(ends), left + 6, right - 6)
    drawn = [
        Whisker(
            label, 26 + step * index, axis.place(value), None if low is None else axis.place(low),
            None if high is None else axis.place(high), number(value), colour,
        )
        for index, (label, value, low, high, colour) in enumerate(rows)
    ]  # fmt: skip
    said = "; ".join(
        f"{label} {number(value)}" + ("" if low is None or high is None else f" ({number(low)} to {number(high)})")
        for label, value, low, high, _ in rows
    )
    return Whiskers(
        as_identifier(identifier), title, said + ".", width, bottom + 34, left, right, bottom, _ticks(axis, 4), drawn
    )
