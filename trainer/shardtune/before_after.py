"""What a person reads at the end of a run: before and after, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardtune.text_table import table

SIGNIFICANT = 0.05
"""Below it a difference is marked: by chance alone it would be as large in fewer cases than this share."""


def before_and_after(comparison: Mapping[str, Any]) -> str:
    """`comparison`: as comparison.json has it. One table for all splits, with the main score of what else was judged
    below; empty where nothing was judged."""
    rows = [row for split, of_split in comparison.items() for row in _rows(split, of_split)]
    if not rows:
        return ""
    lines = [table(rows, ["split", "metric", "before", "after", "difference (95 % interval)"])]
    if any(row[-1].endswith("*") for row in rows):
        lines.append(f"* by the paired test more than chance (p < {SIGNIFICANT:g})")
    after = sorted({str(of_split["tuned"]) for of_split in comparison.values()})
    if shots := [name for name in after if name.startswith("shots-")]:
        lines.append(f"after: {', '.join(shots)}, as nothing was trained")
    others = [row for split, of_split in comparison.items() for row in _others(split, of_split)]
    if others:
        lines += ["", table(others, ["compared with", "split", "metric", "value", "95 % interval"])]
    return "\n".join(lines)


def _rows(split: str, comparison: Mapping[str, Any]) -> list[list[str]]:
    variants, tests = comparison["variants"], comparison.get("tests") or {}
    tuned, base = variants[comparison["tuned"]], variants.get(comparison["base"], {})
    rows = []
    for score, found in tuned.items():
        before = _figure(base[score]["value"]) if score in base else "-"
        rows.append([split, score, before, _figure(found["value"]), _difference(tests.get(score))])
    return rows


def _others(split: str, comparison: Mapping[str, Any]) -> list[list[str]]:
    """Contenders, and the last step where an earlier one is the best; not each step on the way."""
    score, shown = comparison["metric"], (comparison["base"], comparison["tuned"])
    found = []
    for name, scores in comparison["variants"].items():
        on_the_way = name.startswith("step-") and name != f"step-{comparison['last']}"
        if name not in shown and not on_the_way and score in scores:
            low, high = (_figure(scores[score][end]) for end in ("low", "high"))
            found.append([name, split, score, _figure(scores[score]["value"]), f"{low} to {high}"])
    return found


def _difference(test: Mapping[str, Any] | None) -> str:
    if test is None or test.get("difference") is None:
        return ""
    text = _signed(test["difference"])
    if test.get("low") is not None and test.get("high") is not None:
        text += f" ({_signed(test['low'])} to {_signed(test['high'])})"
    p = test.get("p")
    return text + " *" * (p is not None and p < SIGNIFICANT)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.{_digits(value)}f}"


def _signed(value: float) -> str:
    return f"{value:+.{_digits(value)}f}"


def _digits(value: float) -> int:
    """After the point: a line stays within 80 columns."""
    return 4 if abs(value) < 10 else 2
