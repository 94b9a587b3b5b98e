"""Where the assistant's turns stand in a conversation as a chat template writes it, for templates that do not say."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from shardtune.conversations import ASSISTANT, Turn
from shardtune.errors import DataError

Render: TypeAlias = "Callable[[Sequence[Turn], bool], str]"
"""Writes turns, with the beginning of an assistant's turn after them if asked to; raises DataError where it cannot."""


class UnclearTurnError(Exception):
    """It cannot be told exactly where a turn begins or ends."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)
        self.number = number
        """Which turn, from 1."""
        self.what = what
        """begins or ends."""


def assistant_spans(
    turns: Sequence[Turn], whole: str, render: Render, markup: Sequence[str] = ()
) -> list[tuple[int, int]]:
    """Start and stop of each assistant's turn in `whole`, which is `render(turns, False)`, in characters.

    A turn starts where the model would be asked to write it, after all that the template writes before, and stops
    after its end token; whitespace that the template puts after that is not part of it. `markup`: the tokens that can
    end a turn where the last turn has more after it than the others. Raises UnclearTurnError.
    """
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != ASSISTANT:
            continue
        after = spans[-1][1] if spans else 0
        start = _start(turns, index, whole, after, render)
        stop = _stop(turns, index, whole, start, render, markup)
        spans.append((start, stop))
    return spans


def _start(turns: Sequence[Turn], index: int, whole: str, after: int, render: Render) -> int:
    if index:
        with suppress(DataError):
            before = render(turns[:index], True)
            asked = turns[index - 1]
            # A template may leave a turn out while it is the last one: then this beginning is that of an earlier turn.
            complete = asked["role"] == ASSISTANT or asked["content"].strip() in before[after:]
            if whole.startswith(before) and complete and len(before) >= after:
                return len(before)
    # Templates that write a turn in another way once others follow: marks stand for the contents around the start.
    mark, _ = _marks(whole)
    spoken = [*turns[:index], {**turns[index], "content": mark}, *turns[index + 1 :]]  # also before a call
    for marked in (spoken, _replaced(turns, index, mark)):
        with suppress(DataError):
            start = _marked_start(turns, marked, index, whole, render)
            if start is not None and start >= after:
                return start
    raise UnclearTurnError(index + 1, "begins")


def _marked_start(turns: Sequence[Turn], marked: Sequence[Turn], index: int, whole: str, render: Render) -> int | None:
    """`marked` are the turns with the first mark in turn `index`."""
    mark, other = _marks(whole)
    with_mark = render(marked, False)
    at = with_mark.find(mark)
    if index:
        # What the template puts between the turn before and a turn to be written, and what it puts there in `whole`.
        asked = render(_replaced(turns, index - 1, other)[:index], True)
        with_both = render(_replaced(marked, index - 1, other), False)
        between = with_both[: max(with_both.find(mark), 0)]
        if other not in asked or other not in between:
            return None
        head, found = asked.rpartition(other)[2], between.rpartition(other)[2]
        if found.startswith(head):
            start = at - (len(found) - len(head))
        elif head.startswith(found) and index + 1 < len(turns):
            # It asks for a thought as well, which it takes out of earlier turns. In the last one the model would never
            # learn to answer what it is asked.
            start = at
        else:
            return None
    else:
        user = [{"role": "user", "content": mark}]
        asked, plain = render(user, True), render(user, False)
        head = asked.removeprefix(plain)
        if not asked.startswith(plain) or head not in with_mark[: max(at, 0)]:
            return None
        start = with_mark[:at].rindex(head) + len(head)
    return start if at >= 0 and start >= 0 and with_mark[:start] == whole[:start] else None


def _stop(turns: Sequence[Turn], index: int, whole: str, start: int, render: Render, markup: Sequence[str]) -> int:
    mark, _ = _marks(whole)
    with suppress(DataError):
        upto = render(turns[: index + 1], False) if index + 1 < len(turns) else whole
        trailing = len(upto) - len(upto.rstrip())
        content = turns[index].get("content", "")
        if trailing and content != content.rstrip() and not turns[index].get("tool_calls"):
            # Is it the template's, or the content's own?
            end = _after(render(_replaced(turns, index, mark)[: index + 1], False), mark)
            trailing = trailing if end is None else min(trailing, len(end) - len(end.rstrip()))
        stop = len(upto) - trailing
        if start <= stop and whole.startswith(upto[:stop]):
            return stop
    with suppress(DataError):
        end = _after(render(_replaced(turns, index, mark)[: index + 1], False), mark)
        rest = _after(render(_replaced(turns, index, mark), False), mark)
        if end is not None and rest is not None and whole.endswith(rest):
            length = len(end.rstrip()) if rest.startswith(end.rstrip()) else 0
            if not length and not turns[index].get("tool_calls"):
                # Another token ends the whole conversation: this turn ends with the last one that both have.
                shared = _shared(end, rest)
                length = max((shared.rfind(word) + len(word) for word in markup if word in shared), default=0)
            stop = len(whole) - len(rest) + length
            if start <= stop and (length or not end.rstrip()):
                return stop
    raise UnclearTurnError(index + 1, "ends")


def _replaced(turns: Sequence[Turn], index: int, mark: str) -> list[Turn]:
    """The turns with a mark in place of one content; or of the name that is called, which stands in any rendering."""
    turn = turns[index]
    if turn.get("tool_calls"):
        turn = copy.deepcopy(turn)
        call = turn["tool_calls"][-1]
        call.get("function", call)["name"] = mark
    else:
        turn = {**turn, "content": mark}
    return [*turns[:index], turn, *turns[index + 1 :]]


def _shared(one: str, other: str) -> str:
    """The beginning that both have."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _after(text: str, mark: str) -> str | None:
    return text.rpartition(mark)[2] if mark in text else None


def _marks(whole: str) -> tuple[str, str]:
    """Two words that do not stand in the conversation."""
    digest = whole
    while True:
        digest = hashlib.sha256(digest.encode()).hexdigest()
        marks = f"x{digest[:20]}x", f"y{digest[20:40]}y"
        if not any(mark in whole for mark in marks):
            return marks
