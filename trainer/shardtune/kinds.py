"""What people call the type of a value, for messages."""

from __future__ import annotations

import math

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
