"""Where each piece lies in a rank's safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from shardtune.checkpoint.names import key_of
from shardtune.model.safetensors_files import DTYPES
from shardtune.protocols import Piece

ALIGNMENT = 64
"""The data begins at a multiple of so many bytes: of a cache line, and of every dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Layout(NamedTuple):
    """A file as it will be."""

    header: bytes
    """What stands before the data."""
    places: list[tuple[int, Piece]]
    """Where each piece begins in the file, in bytes."""
    size: int
    """Of the file, in bytes."""


def lay_out(pieces: Iterable[Piece]) -> Layout:
    """The file of these pieces, in which each begins at a multiple of its element's size.

    safetensors allows no holes, so those with the largest elements come first.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.values.element_size())
    entries: dict[str, object] = {}
    ranges: dict[str, tuple[int, tuple[int, ...]]] = {}
    offsets: list[int] = []
    end = 0
    for piece in ordered:
        key, begin, end = key_of(piece.name, piece.what), end, end + piece.values.nbytes
        if key in ranges:
            raise ValueError(f"two pieces are called {key}")
        ranges[key] = (piece.start, piece.shape)
        entries[key] = {
            "dtype": DTYPE_NAMES[piece.values.dtype], "shape": [piece.values.numel()], "data_offsets": [begin, end],
        }  # fmt: skip
        offsets.append(begin)
    metadata = {"format": "pt", "pieces": json.dumps(ranges, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = [(len(header) + offset, piece) for offset, piece in zip(offsets, ordered, strict=True)]
    return Layout(header, places, len(header) + end)
