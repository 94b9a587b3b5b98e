"""Where the figures of a run go: metrics.jsonl, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from shardtune.errors import StorageError


class Tracker(Protocol):
    """Somewhere that shows curves and texts while a run goes on."""

    def start(self, config: dict[str, Any]) -> None:
        """Begins the run; `config` is the resolved config, as plain values."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve; names look like train/loss and validation/rougeL."""
        ...

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds sample texts, which may be Markdown; a position shows the same example at each step."""
        ...

    def close(self) -> None:
        """Writes out what is left."""
        ...


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turns errors of the file system into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


class MetricsFile:
    """A file with one JSON object a line; each line is there for readers once `write` returns."""

    def __init__(self, path: Path, after: int | None = None) -> None:
        """Begins the file anew, or goes on `after` a step: lines of later steps, and one that was cut off, are removed.

        Raises StorageError when the file cannot be written, as do `write` and `close`.
        """
        self.path = path
        self.kept: list[dict[str, Any]] = []
        """The lines that were there and are of this run."""
        with _storage(path):
            if after is not None:
                self.kept = _cut_back(path, after)
            self._file = path.open("w" if after is None else "a", encoding="utf-8")

    def write(self, line: Mapping[str, object]) -> None:
        """Adds a line, its keys in the order given. Floats that are not finite become null: JSON has no nan.

        Raises TypeError for a value that JSON does not know, such as a tensor.
        """
        values = {key: _finite_or_none(value) for key, value in line.items()}
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        with _storage(self.path):
            self._file.write(text + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with _storage(self.path):
            self._file.close()


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the lines up to `step`, and returns them; whenever it is interrupted, the file is the old or the new one."""
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


class TensorBoardTracker:
    """Event files for TensorBoard. Values are stored in float32; a crash loses the last ten seconds."""

    def __init__(self, folder: Path, after: int | None = None) -> None:
        """Makes `folder`, or goes on `after` a step: readers then leave out what is there of later ones.

        Raises StorageError when it cannot be written, as do the other methods.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._begins_at = after or 0
        with _storage(folder):
            purged = None if after is None else after + 1
            self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purged)

    def start(self, config: dict[str, Any]) -> None:
        """Shows the config as a text called `config`, at the step that this part of the run begins after."""
        lines = json.dumps(config, indent=2, ensure_ascii=False, default=str).splitlines()
        with _storage(self.folder):
            # Indented by four, Markdown shows it as it is.
            self._writer.add_text("config", "\n".join("    " + line for line in lines), self._begins_at)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        with _storage(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds text i as `name/i`, so that one example's predictions can be followed over the steps."""
        with _storage(self.folder):
            for index, text in enumerate(texts):
                self._writer.add_text(f"{name}/{index}", text, step)

    def close(self) -> None:
        """Writes out what is left and ends the writer's thread."""
        with _storage(self.folder):
            self._writer.close()
