"""The random streams of a rank: as tensors that a checkpoint keeps, and back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardtune.protocols import Piece, Saved

STREAMS = ("python", "numpy", "torch", "cuda")


def random_pieces(rank: int, device: torch.device) -> Iterator[Piece]:
    """The states of all streams that `World.seed_everything` seeds, of rank number `rank`."""
    for stream, state in _states(device).items():
        yield Piece(_owner(rank), f"random.{stream}", tuple(state.shape), 0, state)


def restore_random(saved: Saved, rank: int, device: torch.device) -> None:
    """Sets the streams to what those of the same rank were. One that was not there stays as it is."""
    found = {}
    for stream in STREAMS:
        shape = saved.whats(_owner(rank)).get(f"random.{stream}")
        if shape is not None:
            found[stream] = saved.read(_owner(rank), f"random.{stream}", 0, shape[0])
    if "python" in found:
        version, *words, has_gauss, gauss_bits = found["python"].tolist()
        gauss = np.array(gauss_bits, np.int64).view(np.float64).item() if has_gauss else None
        random.setstate((version, tuple(words), gauss))
    if "numpy" in found:
        *key, position, has_gauss, gauss_bits = found["numpy"].tolist()
        gauss = np.array(gauss_bits, np.int64).view(np.float64).item()
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, gauss))
    if "torch" in found:
        torch.set_rng_state(found["torch"])
    if "cuda" in found and device.type == "cuda":
        torch.cuda.set_rng_state(found["cuda"], device)


def _owner(rank: int) -> str:
    return f"rank-{rank}"


def _states(device: torch.device) -> dict[str, Tensor]:
    version, words, gauss = random.getstate()
    legacy: tuple[Any, ...] = np.random.get_state(legacy=True)  # pyright: ignore[reportAssignmentType]
    name, key, position, has_gauss, cached = legacy
    assert name == "MT19937"
    states = {
        "python": torch.tensor([version, *words, int(gauss is not None), _bits(gauss or 0.0)]),
        "numpy": torch.tensor([*key.tolist(), position, has_gauss, _bits(cached)]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _bits(value: float) -> int:
    return np.array(value, np.float64).view(np.int64).item()
