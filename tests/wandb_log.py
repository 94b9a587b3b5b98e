"""Reads an offline run of W&B back: records of W&B's own protocol, in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, OPENING = 32768, 7, 7
"""Bytes of a block, of the header of a part of a record, and of what a file begins with."""
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Of a .wandb file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), OPENING, b""
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind in (WHOLE, FIRST, MIDDLE, LAST)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """What `log` was given, of all the offline runs in a run's folder, in the order of their beginnings."""
    return [_named(r.history.item) for r in _all(folder) if r.WhichOneof("record_type") == "history"]


def runs(folder: Path) -> list[Any]:
    """The runs that offline files were begun for: their ids and configs."""
    return [r.run for r in _all(folder) if r.WhichOneof("record_type") == "run"]


def summary(folder: Path) -> dict[str, Any]:
    """The values that were set by name."""
    found: dict[str, Any] = {}
    for record in _all(folder):
        if record.WhichOneof("record_type") == "summary":
            found |= _named(record.summary.update)
    return found


def _all(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        yield from records(path)


def _named(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        place, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        for key in reversed(inner):
            value = {key: value}
        found[place] = {**found.get(place, {}), **value} if inner else value
    return found
