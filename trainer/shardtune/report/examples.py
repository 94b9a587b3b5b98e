"""Examples side by side: what was to be written, what the base wrote, what the tuned model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from shardtune.report.files import RunFiles, finite
from shardtune.report.words import cut, in_prompt, lower_is_better, signed

MOST = 10
"""Wins, losses, or examples from the start where there is no comparison."""
MARKED_WORDS = 400
"""Longer texts are not compared word by word."""
FOLDED_FROM = 280
"""Characters of a source from which on it is folded."""


class Piece(NamedTuple):
    """A part of a text; `differs`: the reference does not have it there."""

    text: str
    differs: bool


@dataclass
class Shown:
    """A text, and how many characters of it are left out."""

    pieces: list[Piece]
    left_out: int


@dataclass
class Example:
    """One card."""

    position: int
    difference: str
    kind: str
    """better, worse, or nothing."""
    source: Shown
    folded: str
    """The source's beginning, where the whole is folded away; else empty."""
    columns: list[tuple[str, Shown]]
    """Reference, base and tuned, as far as they are there."""


@dataclass
class Group:
    """Cards under a heading."""

    title: str
    examples: list[Example]


def examples(run: RunFiles, split: str, part: dict[str, Any], limit: int) -> list[Group]:
    """The largest wins and the largest losses of a split; without a comparison its first examples. Texts are cut at
    `limit` characters. Empty where nothing was written."""
    tuned, base = part.get("tuned"), part.get("base")
    if not isinstance(tuned, str):
        return []
    given = part.get("differences")
    differences = [
        (int(one["position"]), float(one["difference"]))
        for one in (given if isinstance(given, list) else [])
        if isinstance(one, dict) and finite(one.get("position")) is not None and finite(one.get("difference"))
    ]
    wins = sorted((one for one in differences if one[1] > 0), key=lambda one: -one[1])[:MOST]
    losses = sorted((one for one in differences if one[1] < 0), key=lambda one: one[1])[:MOST]
    chosen: dict[str, Sequence[tuple[int, float | None]]] = {"Largest wins": wins, "Largest losses": losses}
    if not differences:
        chosen = {f"The first examples of {split}": [(position, None) for position in range(MOST)]}
    positions = [position for group in chosen.values() for position, _ in group]
    after = run.predictions(tuned, split, positions)
    before = run.predictions(base, split, positions) if isinstance(base, str) and base != tuned else {}
    if run.setting("task.kind") == "token_classification":
        after, before = _in_a_row(after), _in_a_row(before)
    score = str(part.get("metric", ""))
    lower, shots = lower_is_better(score, part), in_prompt(tuned)
    called = f"With {shots} in the prompt" if shots else "Tuned"
    groups = [
        Group(
            title,
            [
                _example(position, difference, score, lower, called, after[position], before.get(position), limit)
                for position, difference in group
                if position in after
            ],
        )
        for title, group in chosen.items()
    ]
    return [group for group in groups if group.examples]


def _in_a_row(lines: dict[int, dict[str, str]]) -> dict[int, dict[str, str]]:
    """Words and labels with spaces between them, where lines hold JSON lists of them."""

    def shown(text: str) -> str:
        try:
            words = json.loads(text)
        except ValueError:
            return text
        return " ".join(map(str, words)) if isinstance(words, list) else text

    return {place: {key: shown(text) for key, text in line.items()} for place, line in lines.items()}


def _example(
    position: int,
    difference: float | None,
    score: str,
    lower: bool,
    called: str,
    after: dict[str, str],
    before: dict[str, str] | None,
    limit: int,
) -> Example:
    """`difference`: above 0 where `after` is better, `lower` is better or not; the card shows which way the score went.
    `called`: what `after` is."""
    reference = after["reference"]
    columns = [("Reference", _plain(reference, limit))]
    if before is not None:
        columns.append(("Base", against(before["prediction"], reference, limit)))
    columns.append((called, against(after["prediction"], reference, limit)))
    source = after["source"]
    folded = source[:FOLDED_FROM].rstrip() + " …" if len(source) > FOLDED_FROM + 60 else ""
    return Example(
        position=position,
        difference="" if difference is None else f"{signed(-difference if lower else difference)} {score}",
        kind="" if difference is None else "better" if difference > 0 else "worse",
        source=_plain(source, limit),
        folded=folded,
        columns=columns,
    )


def _plain(text: str, limit: int) -> Shown:
    kept, left_out = cut(text, limit)
    return Shown([Piece(kept, False)] if kept else [], left_out)


def against(text: str, reference: str, limit: int) -> Shown:
    """The text, with the words marked that the reference does not have at that place."""
    kept, left_out = cut(text, limit)
    words, wanted = (re.findall(r"\S+\s*|\s+", one) for one in (kept, reference[:limit]))
    if len(words) > MARKED_WORDS or len(wanted) > MARKED_WORDS:
        return _plain(text, limit)
    matcher = SequenceMatcher(None, [w.strip() for w in words], [w.strip() for w in wanted], autojunk=False)
    pieces = []
    for kind, start, stop, _, _ in matcher.get_opcodes():
        piece = "".join(words[start:stop])
        written = piece.rstrip()  # the space behind a word is not marked
        pieces += [Piece(written, kind != "equal"), Piece(piece[len(written) :], False)]
    return Shown([piece for piece in pieces if piece.text], left_out)
