"""From a row's list of messages to a conversation, and what is wrong where it is none."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from shardtune.conversations import ASSISTANT, Conversation, Turn, to_text
from shardtune.errors import DataError
from shardtune.kinds import kind

NO_ASSISTANT = "conversation without an assistant turn"
EMPTY_REPLY = "empty assistant reply"

ROLES = ("system", "developer", "user", ASSISTANT, "tool")
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    ASSISTANT: ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "tool": "tool",
}
"""The roles of ShareGPT's {"from", "value"}."""
_OTHER_NAMES = {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT, "function": "tool"}


def example(messages: Any, tools: Any, field: str, tools_field: str | None) -> tuple[str, str] | str:
    """Source and target of a row's conversation, see `conversations`; or the reason why it is left out.

    `field` and `tools_field` are the places of the values, as in `FILE:LINE field `messages``. What follows the
    assistant's last turn is dropped, for nothing learns from it. Raises DataError naming the place and the turn.
    """
    found = conversation(messages, tools, field, tools_field)
    turns = found.turns
    while turns and turns[-1]["role"] != ASSISTANT:
        turns = turns[:-1]
    if not turns:
        return NO_ASSISTANT
    if any(_says_nothing(turn) for turn in turns if turn["role"] == ASSISTANT):
        return EMPTY_REPLY
    return _as_text(found._replace(turns=turns), field)


def question(messages: Any, tools: Any, field: str, tools_field: str | None) -> str:
    """The source of a row's conversation that is to be answered: without the replies that it may end with.

    Raises DataError as `example` does, and where no turn is left to answer.
    """
    found = conversation(messages, tools, field, tools_field)
    turns = found.turns
    while turns and turns[-1]["role"] == ASSISTANT:
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{field}: no turn is there to answer; the conversation should end with a user or tool turn")
    return _as_text(found._replace(turns=turns), field)[0]


def conversation(messages: Any, tools: Any, field: str, tools_field: str | None) -> Conversation:
    """The checked turns, contents joined to strings and null values left out; ShareGPT's names become ours."""
    given = _list(messages, field, "messages")
    turns = [_turn(value, f"{field}: turn {number}") for number, value in enumerate(given, 1)]
    if tools_field is None or tools is None:
        return Conversation(turns, [])
    schemas = _list(tools, tools_field, "tools")
    for number, schema in enumerate(schemas, 1):
        if not isinstance(schema, dict):
            raise DataError(f"{tools_field}: tool {number}: {kind(schema)}, not an object with the tool's schema")
    return Conversation(turns, [_without_nulls(schema) for schema in schemas])


def _without_nulls(value: Any) -> Any:
    """Tables give every row the fields of all rows, and null where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _list(value: Any, field: str, what: str) -> Sequence[Any]:
    """A list, or the list that a string holds as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{field}: a string that is not JSON of a list of {what}: {error}") from error
    if not isinstance(value, list):
        hint = (
            f"; a dot reaches inside, as in `messages.{next(iter(value))}`" if isinstance(value, dict) and value else ""
        )
        raise DataError(f"{field}: {kind(value)}, not a list of {what}{hint}")
    return value


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict):
        raise DataError(f'{where}: {kind(value)}, not an object such as {{"role": "user", "content": "…"}}')
    given = _without_nulls(value)
    if "weight" in given and not given.pop("weight"):
        raise DataError(f"{where}: weight 0; every turn of the assistant is learned, so leave the conversation out")
    if "role" not in given and "from" in given:
        return _from_sharegpt(given, where)
    if "role" not in given:
        shown = ", ".join(map(str, given)) or "nothing"
        near = difflib.get_close_matches("role", map(str, given), 1)
        hint = f"; did you mean role instead of {near[0]}?" if near else ""
        raise DataError(f"{where}: no role; the turn has: {shown}{hint}")
    turn = {"role": _role(given.pop("role"), ROLES, _OTHER_NAMES, "role", where)}
    content = given.pop("content", None)
    calls = given.get("tool_calls")
    if calls is not None:
        _check_calls(calls, turn["role"], where)
        if not calls:  # how tables write that there are none
            del given["tool_calls"]
    if content is not None:
        turn["content"] = _content(content, where)
    elif not given.get("tool_calls"):
        shown = ", ".join(["role", *map(str, given)])
        near = difflib.get_close_matches("content", given, 1) or [k for k in ("text", "value") if k in given]
        hint = f"; did you mean content instead of {near[0]}?" if near else ""
        raise DataError(f"{where}: no content; the turn has: {shown}{hint}")
    return turn | given


def _from_sharegpt(given: dict[str, Any], where: str) -> Turn:
    sender = given["from"]
    role = _role(sender, SENDERS, {}, "from", where)
    if "value" not in given:
        raise DataError(f"{where}: no value; the turn has: {', '.join(map(str, given))}")
    value = _content(given["value"], where)
    if sender != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: a function_call whose value is not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    functions = [{"type": "function", "function": call} for call in calls]
    _check_calls(functions, role, where)
    return {"role": role, "tool_calls": functions}


def _role(given: Any, known: Sequence[str] | dict[str, str], others: dict[str, str], key: str, where: str) -> str:
    if isinstance(given, str) and given in known:
        return known[given] if isinstance(known, dict) else given
    name = str(given).strip().lower()
    near = [others[name]] if name in others else difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"{where}: {key} {given!r} is not one of {', '.join(known)}{hint}")


def _content(value: Any, where: str) -> str:
    """A string, or text parts joined to one."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: the content is {kind(value)}, not a string or a list of text parts")
    texts = []
    for number, part in enumerate(value, 1):
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        what = f"of type {part.get('type')!r}" if isinstance(part, dict) and "type" in part else kind(part)
        raise DataError(f'{where}: part {number} of the content is {what}, not {{"type": "text", "text": "…"}}')
    return "".join(texts)


def _check_calls(calls: Any, role: str, where: str) -> None:
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {kind(calls)}, not a list of calls")
    if calls and role != ASSISTANT:
        raise DataError(f"{where}: a {role} turn has tool_calls; only the assistant calls tools")
    for number, call in enumerate(calls, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise DataError(
                f"{where}: tool call {number} has no function name; it should be "
                '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
            )


def _says_nothing(turn: Turn) -> bool:
    return not turn.get("content", "").strip() and not turn.get("tool_calls")


def _as_text(found: Conversation, field: str) -> tuple[str, str]:
    try:
        source, target = to_text(found)
        for text in (source, target):
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no tokenizer can read it.
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{field}: not valid text: {half} is half of a surrogate pair") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{field}: holds a value that JSON cannot hold: {error}") from error
    return source, target
