"""Before and after: the scores of all that was compared, the tests, the slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardtune.report.charts import Whiskers, whiskers
from shardtune.report.curves import is_regression, scores_of
from shardtune.report.files import RunFiles, finite
from shardtune.report.words import (
    PERCENT,
    Verdict,
    chance,
    in_prompt,
    interval,
    lower_is_better,
    number,
    plural,
    signed,
    verdict,
    whole,
)  # fmt: skip

PREFERRED = (
    "rougeL", "bleu", "chrf", "macro_f1", "token_f1", "f1", "accuracy", "exact_match", "pearson", "spearman",
)  # fmt: skip
"""The main score of an old run, the first that it has; else its first one."""
MOST_ROWS = 60
"""Of a table; what is left out is said."""
SHOWN_FIRST = ("test", "validation")


class Cell(NamedTuple):
    """A value of a table, and its interval."""

    value: str
    beside: str = ""
    kind: str = ""
    """better, worse, unclear, or nothing."""


@dataclass
class Table:
    """Named rows of cells."""

    header: list[str]
    rows: list[tuple[str, list[Cell]]]
    left_out: int = 0
    main: str | None = None
    """The row that is to be seen first."""
    texts: bool = False
    """Whether cells are texts, not numbers."""


@dataclass
class Compared:
    """All that is said of a split."""

    split: str
    verdict: Verdict
    score: str
    before: str
    """The base's value; empty where there is none."""
    after: str
    difference: str
    sentences: list[str]
    table: Table
    picture: Whiskers | None
    slices: Table | None = None
    tally: list[tuple[str, int, str]] = field(default_factory=list)
    """wins, ties and losses, each with its count and its share of the width."""
    notes: list[str] = field(default_factory=list)


class Sides(NamedTuple):
    """What the two that are compared are called."""

    before: str = "the base model"
    after: str = "the tuned model"


BASE_AND_TUNED = Sides()


def sides_of(part: dict[str, Any]) -> Sides:
    """Of a run that trains nothing the second side is no tuned model, but the base with examples in its prompt."""
    shots = in_prompt(part.get("tuned"))
    return Sides(after=f"the base model with {shots} in its prompt") if shots else BASE_AND_TUNED


def compared(run: RunFiles) -> list[Compared]:
    """Test first; from comparison.json, and for splits that it lacks from the lines of evaluations."""
    found = []
    for split, part in parts_of(run).items():
        found.append(compared_split(split, part, sides_of(part)))
        if split not in run.comparison:
            found[-1].notes.append("There is no comparison of this split, so there are no intervals and no test.")
    return found


def parts_of(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Of each split that was judged what comparison.json says of it, or would have said; test first."""
    found = {split: part for split, part in run.comparison.items() if _usable(part)}
    for line in run.evaluations:
        split = line.get("split")
        if isinstance(split, str) and split not in found:
            found[split] = _from_lines(run, split)
    if is_regression(run):
        mean = {"majority": "mean of the training data"}
        found = {split: {**part, "names": {**mean, **part.get("names", {})}} for split, part in found.items()}
    return dict(sorted(found.items(), key=lambda one: (_place(one[0]), one[0])))


def _place(split: str) -> int:
    return SHOWN_FIRST.index(split) if split in SHOWN_FIRST else len(SHOWN_FIRST)


def _usable(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("variants"), dict) and bool(part["variants"])


def _from_lines(run: RunFiles, split: str) -> dict[str, Any]:
    """As comparison.json has it, but without intervals: of the lines of evaluations."""
    lines = [line for line in run.evaluations if line.get("split") == split]
    steps = [line for line in lines if "of" not in line]
    variants = {}
    base = tuned = None
    if len(steps) > 1 and steps[0]["step"] == 0:
        base = "step-0"
        variants[base] = steps[0]
    for line in lines:
        if isinstance(line.get("of"), str):
            variants[line["of"]] = line
            base = "base" if line["of"] == "base" else base
    if steps:
        tuned = f"step-{steps[-1]['step']}"
        variants[tuned] = steps[-1]
    names = ["loss", *scores_of(lines)]
    main = next((name for name in PREFERRED if name in names), names[1] if len(names) > 1 else "loss")
    return {
        "metric": main,
        "base": base,
        "tuned": tuned,
        "variants": {
            name: {score: {"value": line[score]} for score in names if finite(line.get(score)) is not None}
            for name, line in variants.items()
        },
    }


def value_of(part: dict[str, Any], variant: str | None, score: str) -> tuple[float | None, float | None, float | None]:
    """Value, low and high."""
    cell = part["variants"].get(variant, {}).get(score, {})
    return finite(cell.get("value")), finite(cell.get("low")), finite(cell.get("high"))


def said_of(name: str, part: dict[str, Any]) -> str:
    """A variant as people call it."""
    if name in part.get("names", {}):
        return part["names"][name]
    if shots := in_prompt(name):
        return f"base, {shots} in the prompt"
    if name == part.get("tuned"):
        return f"tuned ({name.replace('-', ' ')})" if name.startswith("step-") else f"tuned ({name})"
    if name == part.get("base"):
        return "base"
    return {
        "step-0": "before the first step", "lead": "first sentences", "majority": "most frequent label",
        "best": "best checkpoint",
    }.get(name, name.replace("-", " ") if name.startswith("step-") else name)  # fmt: skip


def compared_split(split: str, part: dict[str, Any], sides: Sides = BASE_AND_TUNED) -> Compared:
    """`part`: of comparison.json; its `names` and `colours`, where there are some, are those of its
    variants."""
    base, tuned, score = part.get("base"), part.get("tuned"), str(part.get("metric", "loss"))
    lower = lower_is_better(score, part)
    test = part.get("tests", {}).get(score, {}) if base != tuned else {}
    judged = verdict(test, lower)
    before, after = value_of(part, base, score), value_of(part, tuned, score)
    difference = finite(test.get("difference"))
    if difference is None and before[0] is not None and after[0] is not None and base != tuned:
        difference = after[0] - before[0]
    return Compared(
        split=split,
        verdict=judged if base is not None and base != tuned else Verdict("untested", "nothing to compare with"),
        score=score,
        before=number(before[0]) if before[0] is not None and base != tuned else "",
        after=number(after[0]),
        difference="" if difference is None else signed(difference, like=after[0]),
        sentences=_sentences(split, part, test, judged, lower, difference, sides),
        table=_table(part),
        picture=_picture(split, score, part),
        slices=_slices(part, score, lower),
        tally=_tally(part),
        notes=[str(text) for text in part.get("notes", [])] if isinstance(part.get("notes"), list) else [],
    )


def _sentences(
    split: str, part: dict[str, Any], test: dict[str, Any], judged: Verdict, lower: bool, difference: float | None,
    sides: Sides,
) -> list[str]:  # fmt: skip
    """What came of tuning, for somebody who reads only this."""
    score, base, tuned = str(part.get("metric", "loss")), part.get("base"), part.get("tuned")
    before, after = value_of(part, base, score), value_of(part, tuned, score)
    examples = finite(part.get("examples"))
    where = f"On {plural(examples, 'example')} of {split}" if examples is not None else f"On {split}"
    if after[0] is None:
        return [f"{where} {sides.after} has no {score}."]
    if before[0] is None or base == tuned:
        held = f" (95{PERCENT} interval {interval(*after[1:], like=after[0])})" if after[1] is not None else ""
        return [f"{where}, {score} is {number(after[0])}{held}. There is nothing to compare it with."]
    moved = (
        "went from {} to {}" if sides is BASE_AND_TUNED else f"is {{}} for {sides.before} and {{}} for {sides.after}"
    )
    line = f"{where}, {score} {moved.format(number(before[0]), number(after[0]))}: {signed(difference, after[0])}"
    low, high, p = (finite(test.get(key)) for key in ("low", "high", "p"))
    if low is not None and high is not None:
        held = f"{signed(low, after[0])} to {signed(high, after[0])}"
        line += f" (95{PERCENT} interval {held}{', ' + chance(p) if p is not None else ''})"
    better = "Lower is better. " if lower else ""
    subject = sides.after[0].upper() + sides.after[1:]
    meaning = {
        "better": f"{better}{subject} is better than {sides.before}, and by more than chance explains.",
        "worse": f"{better}{subject} is worse than {sides.before}, and by more than chance explains.",
        "unclear": f"{better}So small a difference may well be chance: these examples do not tell which one is better.",
        "untested": f"{better}Whether that is more than chance was not tested.",
    }[judged.kind]
    lines = [line + ".", meaning, *_simpler(part, score, lower, after[0])]
    wins, losses, ties = (finite(part.get(key)) for key in ("wins", "losses", "ties"))
    if wins is not None and losses is not None and ties is not None:
        better_on = plural(wins, "example")
        lines.append(f"{subject} did better on {better_on}, worse on {whole(losses)}, and as well on {whole(ties)}.")
    return lines


def _simpler(part: dict[str, Any], score: str, lower: bool, tuned: float) -> list[str]:
    """Says what does better than tuning, and costs less: examples in the prompt, a first sentence."""
    others = [name for name in part["variants"] if name not in (part.get("base"), part.get("tuned"), "best")]
    values = {name: value_of(part, name, score)[0] for name in others if not name.startswith("step-")}
    better = {n: v for n, v in values.items() if v is not None and (v < tuned if lower else v > tuned)}
    if not better:
        return []
    best = (min if lower else max)(better, key=lambda name: better[name])
    return [f"A simpler way does better here: {said_of(best, part)}, with {number(better[best])}."]


def _shown_variants(part: dict[str, Any]) -> list[str]:
    """All but the steps on the way, which the curves show: of steps the base, what training began with, the tuned one
    and the last one."""
    steps = {name: int(rest) for name in part["variants"] if (rest := name.removeprefix("step-")).isdecimal()}
    last = max(steps, key=lambda name: steps[name], default="")
    kept = {part.get("base"), "step-0", part.get("tuned"), last}
    variants: dict[str, Any] = part["variants"]
    return [name for name in variants if name not in steps or name in kept]


def _table(part: dict[str, Any]) -> Table:
    """Scores down, variants across; the difference of tuned and base at the end."""
    variants: dict[str, dict[str, Any]] = part["variants"]
    base, tuned, tests = part.get("base"), part.get("tuned"), part.get("tests", {})
    last = [name for name in (base, tuned) if isinstance(name, str) and name in variants]
    names = _shown_variants(part)
    if len(last) == 2:
        names = [*last[:1], *(name for name in names if name not in last), *last[1:]]
    scores = list(dict.fromkeys(score for name in names for score in variants[name]))
    rows = []
    for score in scores[:MOST_ROWS]:
        cells = []
        for name in names:
            value, low, high = value_of(part, name, score)
            cells.append(Cell(number(value), interval(low, high, like=value)))
        if len(last) == 2 and base != tuned:
            cells.append(_difference(part, tests.get(score, {}), score))
        rows.append((score, cells))
    header = [said_of(name, part) for name in names] + ["difference"] * (len(last) == 2 and base != tuned)
    return Table(header, rows, len(scores) - len(rows), main=str(part.get("metric", "")))


def _difference(part: dict[str, Any], test: dict[str, Any], score: str) -> Cell:
    before, after = (value_of(part, part.get(which), score)[0] for which in ("base", "tuned"))
    difference = finite(test.get("difference"))
    if difference is None and before is not None and after is not None:
        difference = after - before
    low, high = finite(test.get("low")), finite(test.get("high"))
    if low is None or high is None:
        return Cell(signed(difference, after))
    held = f"{signed(low, after)} to {signed(high, after)}"
    p = chance(finite(test.get("p")))
    kind = "" if score in part.get("no_direction", ("length",)) else verdict(test, lower_is_better(score, part)).kind
    return Cell(signed(difference, after), held + (f", {p}" if p else ""), kind)


def _picture(split: str, score: str, part: dict[str, Any]) -> Whiskers | None:
    rows = []
    for name in _shown_variants(part)[:12]:
        value, low, high = value_of(part, name, score)
        if value is not None:
            colour = 1 if name == part.get("tuned") else 2 if name == part.get("base") else 0
            rows.append((said_of(name, part), value, low, high, part.get("colours", {}).get(name, colour)))
    rows.sort(key=lambda row: row[1], reverse=not lower_is_better(score, part))
    return whiskers(f"interval-{split}", f"{score} on {split}", rows) if len(rows) > 1 else None


def _tally(part: dict[str, Any]) -> list[tuple[str, int, str]]:
    counts = {name: finite(part.get(name)) for name in ("wins", "ties", "losses")}
    total = sum(count or 0 for count in counts.values())
    if not total or None in counts.values():
        return []
    return [(name, int(count or 0), f"{100 * (count or 0) / total:.2f}%") for name, count in counts.items()]


def _slices(part: dict[str, Any], main: str, lower: bool) -> Table | None:
    slices = part.get("slices")
    if not isinstance(slices, list) or not slices:
        return None
    rows = []
    for one in slices[:MOST_ROWS]:
        before, after = (
            finite(one.get(which, {}).get(main)) if one.get(which) else None for which in ("base", "tuned")
        )
        difference = None if before is None or after is None else after - before
        kind = "" if not difference else "better" if (difference > 0) != lower else "worse"
        cells = [
            Cell(whole(finite(one.get("examples")))), Cell(number(before)), Cell(number(after)),
            Cell(signed(difference, after), kind=kind),
        ]  # fmt: skip
        rows.append((f"{one.get('by')}: {one.get('value')}", cells))
    shots = in_prompt(part.get("tuned"))
    after = f"{main} with {shots} in the prompt" if shots else f"tuned {main}"
    return Table(["examples", f"base {main}", after, "difference"], rows, len(slices) - len(rows))
