"""metrics.jsonl: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtune.tracking.storage import storage


class MetricsFile:
    """A file with one JSON object a line; each line is there for readers once `write` returns."""

    def __init__(self, path: Path, after: int | None = None) -> None:
        """Begins the file anew, or goes on `after` a step: lines of later steps, and one that was cut off, are removed.

        Raises StorageError when the file cannot be written, as do `write` and `close`.
        """
        self.path = path
        self.kept: list[dict[str, Any]] = []
        """The lines that were there and are of this run."""
        with storage(path):
            if after is not None:
                self.kept = _cut_back(path, after)
            self._file = path.open("w" if after is None else "a", encoding="utf-8")

    def write(self, line: Mapping[str, object]) -> None:
        """Adds a line, its keys in the order given. Floats that are not finite become null: JSON has no nan.

        Raises TypeError for a value that JSON does not know, such as a tensor.
        """
        values = {key: _finite_or_none(value) for key, value in line.items()}
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        with storage(self.path):
            self._file.write(text + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with storage(self.path):
            self._file.close()


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the lines up to `step`, and returns them. Whenever it is interrupted, the file is the old or the new."""
    kept: list[dict[str, Any]] = []
    texts: list[bytes] = []
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            line = json.loads(text)
            wanted = text.endswith(b"\n") and line["step"] <= step
        except (ValueError, LookupError, TypeError):
            continue
        if wanted:
            texts.append(text)
            kept.append(line)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return kept


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
