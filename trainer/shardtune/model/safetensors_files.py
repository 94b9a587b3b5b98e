"""Reads ranges of tensors from safetensors files, just the bytes asked for.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header with each tensor's dtype, shape and byte
range, then the data. Reading instead of mapping keeps a rank's resident memory at what it asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardtune.errors import ConfigError

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
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the format."""
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
        buffer = memoryview(out.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        position, done = self.offset + start * self.dtype.itemsize, 0
        with self.file.open("rb", buffering=0) as file:
            file.seek(position)
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise ConfigError(f"{self.file}: ends before byte {position + len(buffer)}; the file is cut off")
                done += count
        return out


def open_files(files: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of the files by name.

    Raises ConfigError naming a file that is not a whole safetensors file.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= min(LONGEST_HEADER, size - 8):
                raise ConfigError(f"{path}: not a whole safetensors file")
            try:
                header = json.loads(file.read(length))
                for name, info in header.items():
                    if name == "__metadata__":
                        continue
                    begin, end = info["data_offsets"]
                    dtype, shape = DTYPES.get(info["dtype"]), tuple(info["shape"])
                    if dtype is None:
                        raise ConfigError(f"{path}: {name} has dtype {info['dtype']}, which cannot be tuned from")
                    if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                        raise ConfigError(f"{path}: {name} does not fit the file's {size} bytes; is it cut off?")
                    entries[name] = Entry(path, 8 + length + begin, dtype, shape)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: its header is damaged: {error}") from None
    return entries
