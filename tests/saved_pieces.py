"""Pieces of a checkpoint in plain files: what the strategies' `pieces` give and their `restore` takes, without the rest
of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shardtune.protocols import VALUE, Piece


def write(folder: Path, rank: int, step: int, pieces: Iterable[Piece]) -> None:
    """One rank's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, places = {}, {}
    for piece in pieces:
        assert piece.values.dim() == 1 and piece.values.is_contiguous() and piece.values.numel(), piece.name
        key = f"{piece.name}#{piece.what}"
        assert key not in tensors, f"{key} twice"
        tensors[key], places[key] = piece.values.clone(), [piece.start, list(piece.shape)]
    save_file(tensors, folder / f"rank-{rank}.safetensors", {"step": str(step), "pieces": json.dumps(places)})


class SavedPieces:
    """Implements the Saved protocol.

    Raises AssertionError where an element is in no piece, or in two.
    """

    tuning: dict[str, Any] = {}

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        """By name and what, whole."""
        self.bytes: list[int] = []
        """Of each rank."""
        filled: dict[tuple[str, str], Tensor] = {}
        for file in sorted(folder.glob("rank-*.safetensors")):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                self.step = int(metadata["step"])
                self.bytes.append(0)
                for key, (start, shape) in json.loads(metadata["pieces"]).items():
                    name, _, what = key.partition("#")
                    values = opened.get_tensor(key)
                    self.bytes[-1] += values.nbytes
                    whole = self.tensors.setdefault((name, what), torch.zeros(shape, dtype=values.dtype))
                    times = filled.setdefault((name, what), torch.zeros(whole.numel(), dtype=torch.int64))
                    assert whole.shape == torch.Size(shape) and whole.dtype == values.dtype, key
                    whole.view(-1)[start : start + len(values)] = values
                    times[start : start + len(values)] += 1
        gaps = [key for key, times in filled.items() if not bool((times == 1).all())]
        assert self.tensors and not gaps, f"{folder}: not once each: {gaps}"

    def whats(self, name: str) -> dict[str, tuple[int, ...]]:
        return {what: tuple(t.shape) for (of, what), t in self.tensors.items() if of == name}

    def read(self, name: str, what: str, start: int, stop: int) -> Tensor:
        return self.tensors[name, what].view(-1)[start:stop].clone()

    def values(self, name: str) -> Whole:
        """Of a parameter, to be laid over the initial ones."""
        return Whole(self.tensors[name, VALUE])


class Whole(NamedTuple):
    """A tensor that is read by ranges."""

    tensor: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor.view(-1)[start:stop].clone()
