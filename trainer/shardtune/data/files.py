"""Rows of data files: JSON Lines, JSON, CSV and Parquet. A fault names the file and the line, or the row."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shardtune.errors import DataError
from shardtune.kinds import kind

LONGEST_COLUMN_NAME = 200
"""Characters; a longer first cell of a CSV file is data, not a column's name."""


class Row(NamedTuple):
    """One record of the data, and where it stands."""

    place: str
    """FILE:LINE, `FILE:row N` (from 1), or docs:python:MODULE:NAME."""
    fields: dict[str, Any]
    """Values by field name; they may be nested lists and dicts."""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, read as its extension says.

    Raises DataError for an unknown extension, an unreadable or empty file, and any row that is malformed.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        problem = f"unknown extension {path.suffix!r}" if path.suffix else "no extension"
        raise DataError(f"{path}: {problem}; known are {', '.join(READERS)}")
    empty = True
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path}: the file holds no rows")


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        line = line.strip()
        if not line:
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            # A whole JSON document under the wrong name fails here, at its first line.
            hint = "; a file that is one JSON list is named .json" if line in ("[", "{") else ""
            raise DataError(f"{place}: not valid JSON: {_reason(error)}{hint}") from error
        yield Row(place, _checked(value, place))


def _json(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {_reason(error)}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {_reason(error)}") from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise DataError(f'{path}: {kind(value)}, not a list of objects or an object with a list "data"')
    for number, item in enumerate(items, 1):
        place = f"{path}:row {number}"
        yield Row(place, _checked(item, place))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents of more than 131,072 characters
    line = 1

    def lines() -> Iterator[str]:
        for number, text in _lines(path):
            if "\0" in text:
                raise DataError(f"{path}:{number}: holds a NUL character; is this a text file?")
            yield text

    # strict: otherwise a quote that is never closed swallows the rest of the file in silence.
    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
        _check_header(path, header)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise DataError(
                    f"{path}:{line}: the row has {len(cells)} cells, the header only {len(header)}; "
                    "put quotes around a cell that holds a comma"
                )
            if cells:
                yield Row(f"{path}:{line}", dict(zip(header, cells, strict=False)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    if not any(name.strip() for name in header):
        raise DataError(f"{path}:1: no header; the first line must hold the names of the columns")
    for position, name in enumerate(header):
        if name in header[:position]:
            raise DataError(f"{path}:1: the header names {name!r} twice; is the first line a header?")
        if len(name) > LONGEST_COLUMN_NAME:
            raise DataError(
                f"{path}:1: no header; the first line must hold the names of the columns, not {name[:40]!r}…"
            )


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", fields)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a valid Parquet file, after row {number}: {_reason(error)}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""The reader for each extension."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and the lines with their ends; a byte order mark is left out."""
    offset = 0
    with path.open("rb") as file:
        # Bytes, because text files also end lines at other characters, and lose count of the bytes.
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                hint = "; it looks like UTF-16" if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise DataError(
                    f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x} at offset {at} of the file" + hint
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text
            offset += len(line)


def _checked(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: the row is {kind(value)}, not an object with named fields")
    return value


def _reason(error: Exception) -> str:
    """The first line of what a parser said, with the column where it has one."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
