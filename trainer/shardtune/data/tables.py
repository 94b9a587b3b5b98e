"""Token ids on disk: two ragged int32 columns in plain .npy files, memory-mapped; and the cache's folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from shardtune.data.publishing import published
from shardtune.examples import Encoded, Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
"""Of the files' layout; a table of another version counts as absent."""

_COLUMNS = ("source", "target")


def cache_folder() -> Path:
    """Where what can be made again is kept: $SHARDTUNE_CACHE, or ~/.cache/shardtune."""
    given = os.environ.get("SHARDTUNE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "shardtune"


def fingerprint(*parts: object) -> str:
    """SHA-256, in hex, of the parts as canonical JSON (sorted keys; tuples are lists).

    Raises TypeError for a part that JSON cannot hold.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


class TokenTable:
    """Examples as int32 token ids, by position; read-only."""

    source_cut: int
    """How many sources were longer than allowed."""
    target_cut: int
    """How many targets were longer than allowed."""
    lengths: NDArray[np.int64]
    """[n, 2]: source and target length of each example, in tokens."""
    counts: Sequence[int] = ()
    """How many examples are from each source of the training data, one after the other; empty: that is not known, and
    all count as from the first."""

    def __init__(
        self,
        tokens: Sequence[NDArray[np.int32]],
        offsets: Sequence[NDArray[np.int64]],
        source_cut: int,
        target_cut: int,
    ) -> None:
        self._tokens = tokens
        self._offsets = offsets
        self.source_cut = source_cut
        self.target_cut = target_cut
        self.lengths = np.stack([np.diff(column) for column in offsets], axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> Tokens:
        """Read-only views of the token ids of one example."""
        if not 0 <= position < len(self):
            raise IndexError(f"example {position} of {len(self)}")
        source, target = (
            tokens[offsets[position] : offsets[position + 1]]
            for tokens, offsets in zip(self._tokens, self._offsets, strict=True)
        )
        return Tokens(source, target, self._origin(position))

    def _origin(self, position: int) -> int:
        for index, count in enumerate(self.counts):
            if position < count:
                return index
            position -= count
        return 0


def open_table(folder: Path) -> TokenTable | None:
    """The table in `folder`, memory-mapped; None where there is none, or its files do not fit together."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["version"] != VERSION:
            return None
        tokens = [_load(folder / f"{name}_tokens.npy", np.dtype("<i4")) for name in _COLUMNS]
        offsets = [_load(folder / f"{name}_offsets.npy", np.dtype("<i8")) for name in _COLUMNS]
        for ids, ends in zip(tokens, offsets, strict=True):
            if len(ends) != meta["examples"] + 1 or ends[0] != 0 or ends[-1] != len(ids) or np.any(np.diff(ends) < 0):
                return None
        return TokenTable(tokens, offsets, int(meta["source_cut"]), int(meta["target_cut"]))
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        return None


def write_table(folder: Path, encoded: Iterable[Encoded]) -> None:
    """Writes a table, holding one example at a time and 16 bytes for each in memory.

    The folder appears whole or not at all. Its name stands for its content (see `fingerprint`): where a whole
    table is already there, perhaps from another process that wrote at the same time, that one stays. Raises
    StorageError where it cannot be written.
    """
    with published(folder, "the token table", lambda: open_table(folder) is not None) as table:
        _write_files(table, encoded)


def _write_files(folder: Path, encoded: Iterable[Encoded]) -> None:
    offsets = [array("q", [0]), array("q", [0])]
    cut = [0, 0]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}_tokens.npy").open("wb")) for name in _COLUMNS]
        for file in files:
            _write_header(file, 0)
        for example in encoded:
            columns = ((example.source, example.source_cut), (example.target, example.target_cut))
            for index, (ids, was_cut) in enumerate(columns):
                files[index].write(np.asarray(ids, dtype="<i4").tobytes())
                offsets[index].append(offsets[index][-1] + len(ids))
                cut[index] += was_cut
        for file, ends in zip(files, offsets, strict=True):
            file.seek(0)
            _write_header(file, ends[-1])
    for name, ends in zip(_COLUMNS, offsets, strict=True):
        np.save(folder / f"{name}_offsets.npy", np.asarray(ends, dtype="<i8"), allow_pickle=False)
    meta = {"version": VERSION, "examples": len(offsets[0]) - 1, "source_cut": cut[0], "target_cut": cut[1]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")


def _write_header(file: BinaryIO, length: int) -> None:
    # numpy pads the header of an array that may grow, so the final length fits where 0 stood.
    header = {"descr": "<i4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _load(path: Path, dtype: np.dtype) -> NDArray:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.dtype != dtype or values.ndim != 1:
        raise ValueError(f"{path}: {values.dtype} {values.shape}")
    return values.view(np.ndarray)  # slices of a memmap object cost ten times those of an array
