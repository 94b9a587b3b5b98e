"""The lines of a metrics.jsonl that another process writes, perhaps on another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

REMEMBERED = 256
"""Bytes before the place that was read up to: where they are others, the file is not the one that was read."""


class News(NamedTuple):
    """What is new since the last look."""

    anew: bool
    """The file was cut back or replaced, as a resume does: forget the lines before; `lines` are all there are."""
    lines: list[dict[str, Any]]


class Tail:
    """Opens the file at each look, which is when a shared file system says what others have written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._before = b""

    def look(self) -> News:
        """The lines that are whole and were not seen; one still being written comes later. No file: no lines.

        Lines that are not JSON objects with a step are left out.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._before))
                anew = file.read(len(self._before)) != self._before
                if anew:
                    file.seek(0)
                    self._offset, self._before = 0, b""
                data = file.read()
        except FileNotFoundError:
            anew, self._offset, self._before = self._offset > 0, 0, b""
            return News(anew, [])
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-REMEMBERED:]
        return News(anew, [line for text in whole.splitlines() if (line := _parsed(text)) is not None])


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
