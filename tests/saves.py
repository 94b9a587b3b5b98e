"""Small checkpoints, written by the saver in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from shardtune.checkpoint.saver import Saver, Snapshot
from shardtune.protocols import VALUE, Piece
from shardtune.world import World

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
FAULTY = Path(__file__).with_name("faulty_write_process.py")


def alone() -> World:
    """A world of one rank."""
    return World(0, 1, 0, torch.device("cpu"))


def faulty(kind: str, number: int, mark: Path) -> list[str]:
    """For `shardtune.checkpoint.writer.COMMAND`: see faulty_write_process.py."""
    return [sys.executable, str(FAULTY), kind, str(number), str(mark)]


class Run:
    """What there is to save: tensors of every dtype and of any size, none and a number among them."""

    def __init__(
        self,
        folder: Path,
        world: World,
        seed: int,
        scale: int = 1000,
        keep: int = 3,
        background: bool = True,
        best: Callable[[int], int | None] = lambda step: None,
    ):
        draw = torch.Generator().manual_seed(seed)
        self.step = 10
        self.said: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        for index in range(12):
            count = int(torch.randint(9, scale, (), generator=draw)) if index else 0
            values = torch.randint(0, 2, (count,), generator=draw) + torch.rand(count, generator=draw) / 2
            self.tensors[f"rank{world.rank}.{index}"] = values.to(DTYPES[index % len(DTYPES)])
        self.folder = folder
        self.saver = Saver(folder, world, keep, background, self.snapshot, self.said.append, best)
        self._world = world

    def snapshot(self) -> Snapshot:
        pieces = [Piece(name, VALUE, tuple(values.shape), 0, values) for name, values in self.tensors.items()]
        half, rank = self.tensors[f"rank{self._world.rank}.2"][:9], self._world.rank
        pieces.append(Piece("both", VALUE, (3, self._world.size * 3), rank * 9, half))
        pieces.append(Piece(f"rank{self._world.rank}.1", "step", (), 0, torch.tensor([float(self.step)])))
        state = {
            "step": self.step, "epoch": 0, "ranks": self._world.size, "tuning": {}, "strategy": "single",
        }  # fmt: skip
        return Snapshot(self.step, pieces, state, "name: test\n")

    def boundary(self) -> None:
        """What the loop does between two steps."""
        self.saver.agreed(self._world.sum(self.saver.asks()))

    def copies(self) -> dict[str, torch.Tensor]:
        """What a save begun now must hold, by key."""
        return {
            piece.name + f"#{piece.what}" * bool(piece.what): piece.values.clone() for piece in self.snapshot().pieces
        }

    def change(self) -> None:
        """As a training step does."""
        self.step += 10
        for values in self.tensors.values():
            values.copy_(torch.ones_like(values) if values.dtype == torch.bool else values * 3 + 1)


def names(folder: Path) -> list[str]:
    """Of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def two(folder: Path, seed: int) -> Path:
    """A folder with checkpoints of steps 10 and 20."""
    run = Run(folder, alone(), seed)
    run.saver.save()
    run.step = 20
    run.saver.save(hurried=True)
    run.saver.close()
    return folder
