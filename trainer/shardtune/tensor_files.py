"""Safetensors files without torch: what their header says, and ranges of their bytes.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header with each tensor's dtype, shape and byte
range, then the data, which the tensors fill without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from io import FileIO
from typing import Any, NamedTuple

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format."""
MOST_DIMENSIONS = 64
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Of an element of each dtype that is trained from or kept."""


class NotWhole(ValueError):
    """A file is not what it should be; says why, without the file's name."""


class Stored(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str
    """A key of BYTES."""
    shape: tuple[int, ...]
    begin: int
    """Bytes from the file's beginning."""


class Header(NamedTuple):
    """What a file says of itself."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(file: FileIO) -> Header:
    """The header of a file opened without a buffer. No more is read or allocated than the file is long.

    Raises NotWhole where any of it, or the file's length, is not as the format wants it.
    """
    size = os.fstat(file.fileno()).st_size
    length = struct.unpack("<Q", read_bytes(file, 0, 8))[0] if size > 8 else 0
    if not 0 < length <= min(LONGEST_HEADER, size - 8):
        raise NotWhole("not a whole safetensors file")
    header = parse_object(read_bytes(file, 8, length), "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NotWhole("its header is damaged: __metadata__ is no object of texts")
    ranges = {name: _range(name, info) for name, info in header.items()}
    end = 0
    for name, (_, begin, stop) in sorted(ranges.items(), key=lambda item: item[1][1:]):
        if begin != end:
            raise NotWhole(f"its header is damaged: {name!r:.200} begins at byte {begin} of the data, not at {end}")
        if 8 + length + stop > size:
            raise NotWhole(f"{name!r:.200} does not fit the file's {size} bytes; is it cut off?")
        end = stop
    if 8 + length + end != size:
        raise NotWhole(f"it has {size} bytes, {size - 8 - length - end} more than its tensors need")
    tensors = {name: stored._replace(begin=8 + length + begin) for name, (stored, begin, _) in ranges.items()}
    return Header(tensors, metadata)


def _range(name: str, info: Any) -> tuple[Stored, int, int]:
    """The tensor, and where its bytes begin and end in the data."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise NotWhole(f"its header is damaged: {name!r:.200} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise NotWhole(f"its header is damaged: {name!r:.200} has a shape or offsets that are no whole numbers")
    width = BYTES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise NotWhole(f"{name!r:.200} has dtype {dtype!s:.40}, which cannot be used here")
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise NotWhole(
            f"its header is damaged: {name!r:.200} has {end - begin} bytes, not those of its dtype and shape"
        )
    return Stored(dtype, tuple(shape), begin), begin, end


def is_shape(value: Any) -> bool:
    """Whether a parsed JSON value is a list of a few whole numbers from 0 on."""
    return isinstance(value, list) and len(value) <= MOST_DIMENSIONS and all(is_count(number) for number in value)


def is_count(value: Any) -> bool:
    """Whether a parsed JSON value is a whole number from 0 on that a file's size may be."""
    return type(value) is int and 0 <= value < 1 << 63


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; `what` it is, for the message. Raises NotWhole, also where a key is there twice."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise ValueError(f"{key[:100]!r} is there twice")
            made[key] = value
        return made

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise NotWhole(f"{what} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise NotWhole(f"{what} is damaged: it is no JSON object")
    return value


def read_range(file: FileIO, position: int, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes from `position` on. Raises NotWhole where the file ends before."""
    file.seek(position)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise NotWhole(f"ends before byte {position + len(buffer)}; the file is cut off")
        done += count


def read_bytes(file: FileIO, position: int, count: int) -> bytes:
    """`count` bytes from `position` on. Raises NotWhole where the file ends before."""
    data = bytearray(count)
    read_range(file, position, memoryview(data))
    return bytes(data)
