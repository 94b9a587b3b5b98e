"""What people call the type of a value, for messages; and whether one is text."""

from __future__ import annotations

import math

from shardtune.errors import DataError

_KINDS = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


def kind(value: object) -> str:
    """As JSON names it, with its article."""
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "not a number (NaN)"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def check_text(value: str, place: str) -> None:
    """Raises DataError for half of a surrogate pair: JSON can spell one, but no tokenizer can read it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        raise DataError(f"{place}: not valid text: {problem}") from error
