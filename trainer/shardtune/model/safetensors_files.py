"""Reads ranges of tensors from safetensors files, just the bytes asked for.

Reading instead of mapping keeps a rank's resident memory at what it asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardtune.errors import ConfigError
from shardtune.tensor_files import NotWhole, read_header, read_range

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
COMPARED = 1 << 20
"""Elements compared at once."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    offset: int
    """Bytes from the file's beginning."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def equals(self, other: Entry) -> bool:
        """Whether both hold the same values."""
        if (self.file, self.offset) == (other.file, other.offset):
            return True
        elements = math.prod(self.shape)
        return (self.dtype, self.shape) == (other.dtype, other.shape) and all(
            torch.equal(self.read(low, high), other.read(low, high))
            for low in range(0, elements, COMPARED)
            for high in [min(low + COMPARED, elements)]
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, in the file's dtype."""
        out = torch.empty(stop - start, dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            try:
                read_range(file, self.offset + start * self.dtype.itemsize, bytes_of(out))
            except NotWhole as error:
                raise ConfigError(f"{self.file}: {error}") from None
        return out


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def open_files(files: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of the files by name.

    Raises ConfigError naming a file that is not a whole safetensors file.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        with path.open("rb", buffering=0) as file:
            try:
                tensors = read_header(file).tensors
            except NotWhole as error:
                raise ConfigError(f"{path}: {error}") from None
        for name, stored in tensors.items():
            entries[name] = Entry(path, stored.begin, DTYPES[stored.dtype], stored.shape)
    return entries
