"""From rows to texts: which fields hold the source and the target, and what is wrong where they do not."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from shardtune.data.messages import example, question
from shardtune.data.sources import Row
from shardtune.errors import ConfigError, DataError
from shardtune.examples import Text
from shardtune.kinds import check_text, kind
from shardtune.row_fields import Fields

Dropped: TypeAlias = "Counter[str]"
"""How many rows were left out, by reason."""

EMPTY_SOURCE = "empty source"
EMPTY_TARGET = "empty target"

_ABSENT = object()
_NAMES_SHOWN = 12


def texts(rows: Iterable[Row], fields: Fields, dropped: Dropped) -> Iterator[Text]:
    """The text of each row, as it stands: nothing is stripped.

    Rows whose source or target is blank are left out and counted in `dropped`. Of a conversation see
    `conversations.to_text`. Numbers become their decimal form, booleans `true`
    and `false`. Raises DataError, with place and field, where a field is absent or holds no text, and ConfigError
    where the template is malformed.
    """
    if fields.messages is not None or fields.read is not None:
        yield from _read(rows, fields, dropped)
        return
    if fields.prompt is not None:
        template = parse_template(fields.prompt)
    elif fields.input is not None:
        template = [("", fields.input)]
    else:
        raise ConfigError("the source needs a field or a prompt")
    for row in rows:
        parts = [(before, None if name is None else _text(row, name)) for before, name in template]
        if not any(value and not value.isspace() for _, value in parts):
            dropped[EMPTY_SOURCE] += 1
            continue
        target = "" if fields.target is None else _target(row, fields.target, fields)
        if fields.target is not None and not target.strip():
            dropped[EMPTY_TARGET] += 1
            continue
        source = "".join(before + (value or "") for before, value in parts)
        yield Text(row.place, source, target, _beside(row, fields.beside))


def questions(rows: Iterable[Row], messages: str, tools: str | None) -> Iterator[str]:
    """The source of each row's conversation that is to be answered, without the replies that it may end with.

    Raises DataError, with place and field.
    """
    for row in rows:
        yield question(*_conversation(row, messages, tools))


def _read(rows: Iterable[Row], fields: Fields, dropped: Dropped) -> Iterator[Text]:
    for row in rows:
        if fields.messages is not None:
            found = example(*_conversation(row, fields.messages, fields.tools))
        else:
            assert fields.read is not None
            places = [f"{row.place} field `{name}`" for name in fields.parts]
            values = [_value(row, name) for name in fields.parts]
            found = fields.read(values, places)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            yield Text(row.place, *found, _beside(row, fields.beside))


def _beside(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """Values that examples are told apart by; one that is no text is JSON."""
    values = [_value(row, name) for name in names]
    return tuple(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


def _value(row: Row, name: str) -> Any:
    value = _reach(row.fields, name.split("."))
    if value is _ABSENT:
        raise DataError(f"{row.place} field `{name}`: absent; {_present(row.fields, name)}")
    return value


def _conversation(row: Row, messages: str, tools: str | None) -> tuple[Any, Any, str, str | None]:
    """The values of both fields, and their places."""
    places = [f"{row.place} field `{name}`" for name in (messages, tools) if name is not None]
    values = [_reach(row.fields, name.split(".")) for name in (messages, tools) if name is not None]
    if values[0] is _ABSENT:
        raise DataError(f"{places[0]}: absent; {_present(row.fields, messages)}")
    if tools is None:
        return values[0], None, places[0], None
    if values[1] is _ABSENT:
        raise DataError(f"{places[1]}: absent (null or [] is a row without tools); {_present(row.fields, tools)}")
    return values[0], values[1], places[0], places[1]


def parse_template(prompt: str) -> list[tuple[str, str | None]]:
    """The template as pairs of literal text and the field's name that follows it (None at the end).

    Only names stand between the braces: no attributes, indices, conversions or format specifications as in
    str.format, which would let a config reach into the program's objects. Raises ConfigError for a brace
    without its partner and for a template that names no field.
    """
    parts: list[tuple[str, str | None]] = []
    literal = ""
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", prompt):
        if token in ("{{", "}}"):
            literal += token[0]
        elif token in ("{", "}"):
            raise ConfigError(f"task.prompt: a single {token} in {prompt!r}; write {token * 2} for the character")
        elif token.startswith("{"):
            if not token[1:-1].strip():
                raise ConfigError(f"task.prompt: {token} in {prompt!r} names no field")
            parts.append((literal, token[1:-1].strip()))
            literal = ""
        else:
            literal += token
    if not parts:
        raise ConfigError(f"task.prompt: {prompt!r} names no field; write {{field}} where its text goes")
    return [*parts, (literal, None)]


def _target(row: Row, name: str, fields: Fields) -> str:
    if fields.read_target is not None:
        return fields.read_target(_value(row, name), f"{row.place} field `{name}`")
    return _text(row, name, label=fields.labels_of is not None)


def _text(row: Row, name: str, label: bool = False) -> str:
    value, where = _value(row, name), f"{row.place} field `{name}`"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        return str(value)
    if isinstance(value, str):
        check_text(value, where)
        return value
    wanted = "a string, a number or a boolean" if label else "a text"
    raise DataError(f"{where}: {kind(value)}, not {wanted}{_inside(name, value)}")


def _reach(value: Any, steps: Sequence[str]) -> Any:
    """The value that `steps` lead to, or _ABSENT. A key may hold dots, so longer keys are tried first."""
    if not steps:
        return value
    if isinstance(value, dict):
        for count in range(len(steps), 0, -1):
            key = ".".join(steps[:count])
            if key in value:
                found = _reach(value[key], steps[count:])
                if found is not _ABSENT:
                    return found
    elif isinstance(value, list) and steps[0].isdecimal() and int(steps[0]) < len(value):
        return _reach(value[int(steps[0])], steps[1:])
    return _ABSENT


def _present(fields: dict[str, Any], name: str) -> str:
    """What there is instead of the field `name`, as far as its first steps lead somewhere."""
    steps = name.split(".")
    holder, reached = fields, ""
    for count in range(len(steps) - 1, 0, -1):
        inside = _reach(fields, steps[:count])
        if inside is not _ABSENT:
            holder, reached = inside, ".".join(steps[:count])
            break
    subject = f"`{reached}`" if reached else "the row"
    if isinstance(holder, list):
        return f"{subject} is a list of {len(holder)}"
    if not isinstance(holder, dict):
        return f"{subject} is {kind(holder)}"
    names = [str(key) for key in holder]
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    # Every name a dot can lead to, one level deep: `de` for `translation.de` is a common slip.
    prefix = f"{reached}." if reached else ""
    reachable = [prefix + key for key in names]
    reachable += [f"{prefix}{key}.{sub}" for key, value in holder.items() if isinstance(value, dict) for sub in value]
    near = difflib.get_close_matches(name, reachable, 1) or [key for key in reachable if key.endswith(f".{name}")]
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{subject} has: {shown or 'nothing'}{hint}"


def _inside(name: str, value: object) -> str:
    """How to reach a text inside a list or an object."""
    inner = [str(key) for key in value] if isinstance(value, dict) else ["0"] if isinstance(value, list) else []
    return f"; a dot reaches inside, as in `{name}.{inner[0]}`" if inner else ""
