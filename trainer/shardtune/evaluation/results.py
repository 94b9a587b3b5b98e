"""What was found of each example, on its way to files: memory does not grow with the number of examples."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shardtune.errors import StorageError
from shardtune.evaluation.judged import Prediction


class Results:
    """Lines of a predictions file and rows of statistics, given in any order and written in that of the split.

    The two files, predictions/<name>.jsonl and statistics/<name>.npy, appear whole or not at all. All methods raise
    StorageError.
    """

    def __init__(self, folder: Path, name: str, examples: int) -> None:
        """`folder`: the run's."""
        self._texts = folder / "predictions" / f"{name}.jsonl"
        self._rows = folder / "statistics" / f"{name}.npy"
        self._places = np.zeros((examples, 2), dtype=np.int64)
        """Of each example's line in the file of lines, where it begins and ends."""
        self._ends = ExitStack()
        self._lines: IO[bytes] | None = None
        self._statistics: IO[bytes] | None = None
        self._header = 0

    def add(self, positions: Sequence[int], predictions: Sequence[Prediction], statistics: NDArray[np.float64]) -> None:
        """`predictions` may be empty: then there are none of any example; `statistics` is [n, K]."""
        try:
            if self._statistics is None:
                self._statistics = self._begin(statistics.shape[1])
            for position, row in zip(positions, statistics, strict=True):
                self._statistics.seek(self._header + position * row.nbytes)
                self._statistics.write(np.asarray(row, "<f8").tobytes())
            if predictions:
                self._add_lines(positions, predictions)
        except OSError as error:
            raise StorageError(f"{self._rows.parent}: cannot be written: {error.strerror or error}") from error

    def _begin(self, columns: int) -> IO[bytes]:
        self._rows.parent.mkdir(parents=True, exist_ok=True)
        file = self._ends.enter_context(_part(self._rows).open("wb"))
        header = {"descr": "<f8", "fortran_order": False, "shape": (len(self._places), columns)}
        np.lib.format.write_array_header_1_0(file, header)
        self._header = file.tell()
        return file

    def _add_lines(self, positions: Sequence[int], predictions: Sequence[Prediction]) -> None:
        if self._lines is None:
            self._texts.parent.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._texts.parent)  # noqa: SIM115
            self._lines = self._ends.enter_context(file)
        for position, prediction in zip(positions, predictions, strict=True):
            begin = self._lines.tell()
            self._lines.write(json.dumps(prediction._asdict(), ensure_ascii=False).encode() + b"\n")
            self._places[position] = begin, self._lines.tell()

    def finish(self) -> NDArray[np.float64]:
        """Puts the files in their places; returns the statistics, [examples, K]."""
        try:
            if self._lines is not None:
                with _part(self._texts).open("wb") as out:
                    for begin, end in self._places.tolist():
                        self._lines.seek(begin)
                        out.write(self._lines.read(end - begin))
            self._ends.close()
            if self._lines is not None:
                os.replace(_part(self._texts), self._texts)
            os.replace(_part(self._rows), self._rows)
            return np.load(self._rows, allow_pickle=False)
        except OSError as error:
            raise StorageError(f"{self._texts.parent}: cannot be written: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Nothing stays."""
        with suppress(OSError):
            self._ends.close()
        for path in (self._rows, self._texts):
            with suppress(OSError):
                _part(path).unlink(missing_ok=True)

    def first(self, count: int) -> list[Prediction]:
        """The first predictions, after `finish`."""
        if self._lines is None:
            return []
        with self._texts.open(encoding="utf-8") as file:
            return [Prediction(**json.loads(line)) for line in islice(file, count)]


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
