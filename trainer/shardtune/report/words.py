"""Figures and judgements in words that need no background."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from shardtune.report.files import finite

SURE_BELOW = 0.05
"""A p value below this, with an interval that leaves out 0, is called a clear difference."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "mae", "rmse"})
MINUS = "−"
PERCENT = "\u00a0%"
"""Behind a number, on the same line."""


class Verdict(NamedTuple):
    """Whether tuning made a split's main score better."""

    kind: str
    """better, worse, unclear, or untested."""
    title: str
    """Two or three words."""


def number(value: float | None) -> str:
    """About four digits; – where there is none."""
    if value is None:
        return "–"
    size = abs(value)
    if size and (size < 5e-4 or size >= 1e15):
        return f"{value:.1e}".replace("-", MINUS)
    return f"{value:,.{decimals(size)}f}".replace("-", MINUS)


def decimals(size: float) -> int:
    """How many places behind the point `number` shows."""
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def signed(value: float | None, like: float | None = None) -> str:
    """A difference with its sign, with as many decimals as a value that it is between."""
    if value is None:
        return "–"
    places = decimals(abs(like if like is not None else value))
    text = f"{abs(value):,.{places}f}"
    if value and not float(text.replace(",", "")):
        text = f"{abs(value):.1e}".replace("-", MINUS)
    return ("+" if value > 0 else MINUS if value < 0 else "±") + text


def chance(p: float | None) -> str:
    """A p value: p < 0.001, p = 0.03; empty where there is none."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def whole(value: float | None) -> str:
    """A count, with thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def share(part: float | None, of: float | None) -> str:
    """As percent."""
    if part is None or not of:
        return "–"
    percent = 100 * part / of
    if 0 < percent < 0.1:
        return f"< 0.1{PERCENT}"
    return f"{percent:.1f}{PERCENT}" if 0 < percent < 10 else f"{percent:.0f}{PERCENT}"


def size_of(count: float | None) -> str:
    """Bytes as people write them, in powers of 1000."""
    if count is None:
        return "–"
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power:
            return f"{count / power:,.3g} {unit}"
    return f"{count:,.0f} B"


def seconds(value: float | None) -> str:
    """45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    large, name, small, name_of_small = next(unit for unit in units if value >= unit[0])
    total = round(value / small)
    many, rest = divmod(total, large // small)
    return f"{many} {name}" + (f" {rest} {name_of_small}" if rest else "")


def brief(value: float, largest: float) -> str:
    """For the ticks of an axis, by the largest of them: 0.25, 1,200, 15k, 2.5M, 1e-5."""
    size = abs(value)
    if largest >= 10_000 and size:
        for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if largest >= power and size >= 0.01 * power:
                return f"{value / power:.4g}{unit}".replace("-", MINUS)
    if size and (size < 1e-4 or largest < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", MINUS)
    return f"{value:,.4g}".replace("-", MINUS) if size < 1000 else f"{value:,.0f}".replace("-", MINUS)


def lower_is_better(score: str, of_split: Mapping[str, Any]) -> bool:
    """Whether less of a score is more; the split of comparison.json may say so itself."""
    said = of_split.get("lower_is_better")
    return score in said if isinstance(said, list) else score in LOWER_IS_BETTER


def verdict(test: Mapping[str, Any], lower: bool) -> Verdict:
    """Of a paired test (difference, low, high, p); an empty one is none."""
    difference, low, high, p = (finite(test.get(key)) for key in ("difference", "low", "high", "p"))
    if difference is None or low is None or high is None:
        return Verdict("untested", "not tested")
    excludes_zero = low > 0 or high < 0
    if not excludes_zero or (p is not None and p >= SURE_BELOW):
        return Verdict("unclear", "no clear difference")
    return Verdict("better", "got better") if (difference > 0) != lower else Verdict("worse", "got worse")


def interval(low: float | None, high: float | None, like: float | None = None) -> str:
    """0.310 to 0.352; empty where there is none."""
    if low is None or high is None:
        return ""
    places = decimals(abs(like if like is not None else max(abs(low), abs(high))))
    return " to ".join(f"{value:,.{places}f}".replace("-", MINUS) for value in (low, high))


def plural(count: float, one: str, many: str | None = None) -> str:
    """1 example, 2 examples."""
    return f"{count:,.0f} {one if count == 1 else many or one + 's'}"


def in_prompt(variant: object) -> str:
    """3 examples, of shots-3; empty for a variant that has none in its prompt."""
    kind, _, count = variant.partition("-") if isinstance(variant, str) else ("", "", "")
    return plural(int(count), "example") if kind == "shots" and count.isdecimal() else ""


def cut(text: str, limit: int) -> tuple[str, int]:
    """The text's first `limit` characters, and how many are left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return finite(value) is not None


def nice_step(span: float, parts: int) -> float:
    """1, 2, 2.5 or 5 times a power of ten, so that about `parts` of them fill `span`, which is above 0."""
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
