"""Reads checkpoints: any range of any tensor, whoever has written which part of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardtune.checkpoint.contents import Contents, Held, read_contents
from shardtune.checkpoint.names import key_of
from shardtune.checkpoint.plain_files import open_plain, unreadable
from shardtune.errors import CheckpointError
from shardtune.model.safetensors_files import DTYPES, bytes_of
from shardtune.protocols import VALUE
from shardtune.tensor_files import NotWhole, read_range


class Checkpoint:
    """Implements the Saved protocol."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder = folder
        self._contents = contents

    @property
    def state(self) -> dict[str, Any]:
        """What state.json holds."""
        return self._contents.state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    @property
    def ranks(self) -> int:
        """That have written it."""
        return self._contents.ranks

    @property
    def tuning(self) -> dict[str, Any]:
        """What the method remembers."""
        return self.state["tuning"]

    def names(self) -> list[str]:
        """The parameters of which the value is there."""
        return [name for name, whats in self._contents.tensors.items() if VALUE in whats]

    def whats(self, name: str) -> dict[str, tuple[int, ...]]:
        """What is there of `name`, each with the shape of the whole tensor; empty where nothing is."""
        return {what: held.shape for what, held in self._contents.tensors.get(name, {}).items()}

    def read(self, name: str, what: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, on the CPU, in the dtype kept.

        Only their bytes are read, into the result. Raises CheckpointError where they are not there.
        """
        held = self._held(name, what)
        total = math.prod(held.shape)
        if not 0 <= start <= stop <= total:
            raise CheckpointError(
                f"{self.folder}: elements {start} to {stop} of {key_of(name, what)} are asked for; it has {total}"
            )
        out = torch.empty(stop - start, dtype=DTYPES[held.dtype])
        buffer, width = bytes_of(out), out.element_size()
        first = bisect_right(held.parts, start, key=lambda part: part.stop)
        for part in held.parts[first:]:
            if part.start >= stop:
                break
            low, high = max(start, part.start), min(stop, part.stop)
            try:
                with open_plain(part.file) as file:
                    position = part.begin + (low - part.start) * width
                    read_range(file, position, buffer[(low - start) * width : (high - start) * width])
            except NotWhole as error:
                raise CheckpointError(f"{part.file}: {error}") from None
            except OSError as error:
                raise CheckpointError(f"{part.file}: {unreadable(error)}") from None
        return out

    def value(self, name: str) -> Value:
        """The value of a parameter, to be read by ranges; for `shardtune.model.overlay`."""
        return Value(self, name)

    def _held(self, name: str, what: str) -> Held:
        held = self._contents.tensors.get(name, {}).get(what)
        if held is None:
            raise CheckpointError(f"{self.folder}: has no {key_of(name, what)}")
        return held


@dataclass(frozen=True)
class Value:
    """A parameter's value in a checkpoint."""

    checkpoint: Checkpoint
    name: str

    def read(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D."""
        return self.checkpoint.read(self.name, VALUE, start, stop)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint to read from; whether its bytes are those that were written, `newest_good` finds out.

    Raises CheckpointError where its files do not fit each other or hold what no checkpoint has. Nothing in them is run.
    """
    return Checkpoint(folder, read_contents(folder))
