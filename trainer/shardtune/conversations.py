"""Conversations as the two halves of an example: what was said before, and the assistant's last turn."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

Turn: TypeAlias = "dict[str, Any]"
"""`role` and `content` (a string), or `role` and `tool_calls`; and whatever else a chat template may read."""

ASSISTANT = "assistant"


class Conversation(NamedTuple):
    """Turns in their order, and the schemas of the tools that the assistant may call."""

    turns: list[Turn]
    tools: list[dict[str, Any]]


def to_text(conversation: Conversation) -> tuple[str, str]:
    """Source and target as strings: JSON of all but the last turn if that is the assistant's, and that turn.

    A last turn of role and content alone is its content, any other JSON of the turn. Without one, the target is empty
    and the source holds all turns. Raises ValueError or TypeError for what JSON cannot hold.
    """
    turns, target = conversation.turns, ""
    if turns and turns[-1]["role"] == ASSISTANT:
        *turns, last = turns
        content = last.get("content")
        plain = last.keys() == {"role", "content"} and isinstance(content, str) and _turn(content) is None
        target = content if plain and content else _json(last)
    source: dict[str, Any] = {"messages": turns}
    if conversation.tools:
        source["tools"] = conversation.tools
    return _json(source), target


def from_text(source: str, target: str) -> Conversation:
    """The conversation that `to_text` made the two strings of."""
    read = json.loads(source)
    turns = list(read["messages"])
    if target:
        turns.append(_turn(target) or {"role": ASSISTANT, "content": target})
    return Conversation(turns, read.get("tools", []))


def contents(source: str, target: str) -> list[str]:
    """What is said in the conversation that `to_text` made the two strings of, turn by turn."""
    return [turn["content"] for turn in from_text(source, target).turns if turn.get("content")]


def _turn(text: str) -> Turn | None:
    """The assistant's turn that `text` is the JSON of, if it is."""
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("role") == ASSISTANT else None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
