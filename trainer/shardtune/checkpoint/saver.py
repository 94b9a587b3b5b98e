"""Saves a run: copies what each rank holds, has it written by other processes, and commits what all have written."""

from __future__ import annotations

import enum
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shardtune.checkpoint import files
from shardtune.checkpoint.arena import Arena
from shardtune.checkpoint.finding import clear_partial
from shardtune.checkpoint.layout import lay_out
from shardtune.checkpoint.names import CONFIG, STATE, folder_name, partial_name, rank_file, step_of
from shardtune.checkpoint.writer import Writer
from shardtune.errors import CheckpointError, FailedElsewhere, StorageError
from shardtune.protocols import Piece
from shardtune.world import World

MARGIN = 1 << 20
"""Bytes that must be free beyond those of the files: for folders, and for what else the run writes."""
NONE_KEPT = "there is no older checkpoint"


class Snapshot(NamedTuple):
    """What a run is at, between two steps."""

    step: int
    pieces: Iterable[Piece]
    """What this rank holds."""
    state: dict[str, Any]
    """JSON-like, the same on all ranks: `state.json`."""
    config: str
    """The resolved config: `config.yaml`."""


class _Stage(enum.Enum):
    WRITING = "every rank writes its file"
    COMMITTING = "rank 0 makes a checkpoint of them"


@dataclass
class _Save:
    """What is being written; the same on every rank."""

    step: int
    partial: Path
    size: int
    """Bytes of all files."""
    texts: dict[str, str]
    hurried: bool
    begun: float
    stage: _Stage = _Stage.WRITING
    answer: dict[str, Any] = field(default_factory=dict)
    """Of this rank's process in this stage; empty where it is at work, or has nothing to do."""


class Saver:
    """Implements the Saves protocol of `shardtune.boundary`. Every method is called by all ranks alike."""

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int,
        background: bool,
        snapshot: Callable[[], Snapshot],
        say: Callable[[str], None],
        best: Callable[[int], int | None] = lambda step: None,
    ) -> None:
        """`folder`: where checkpoints are; what earlier attempts left unfinished in it is removed. `keep`: how many.

        `background`: training goes on while a checkpoint is written; after the first step `snapshot` is then called
        once more, for its size, to have the memory ready. `say`: prints a line, on rank 0. `best`: of the steps up to
        one, that whose checkpoint is never removed: so the one that was the best stays until a better one is whole.
        """
        self._folder = folder
        self._world = world
        self._keep = keep
        self._background = background
        self._snapshot = snapshot
        self._say = say
        self._best = best
        self._arena: Arena | None = None
        self._writer: Writer | None = None
        self._save: _Save | None = None
        self._boundaries = 0
        self.newest: int | None = None
        """The step of the newest checkpoint that this saver has made whole."""
        if world.is_first:
            with suppress(CheckpointError):  # the first save says what is wrong
                clear_partial(folder)

    def asks(self) -> list[float]:
        """Whether this rank is done, has failed to store, has lost its process: at most one of them."""
        save = self._save
        if save is None:
            return [0.0, 0.0, 0.0]
        if not save.answer and self._writer is not None and self._writer.busy:
            save.answer = self._writer.answer(wait=False) or {}
        failed, lost = "failed" in save.answer, "lost" in save.answer
        return [float(bool(save.answer) and not failed and not lost), float(failed), float(lost)]

    def agreed(self, asked: list[float]) -> None:
        """Goes on with what is being written, as far as all ranks are. Raises StorageError, FailedElsewhere."""
        self._boundaries += 1
        if self._boundaries == 2 and self._arena is None and self._background:  # the optimizer's state is there now
            self._start(lay_out(self._snapshot().pieces).size)
        save = self._save
        if save is None:
            return
        done, failed, lost = asked
        if failed:
            self._give_up(save, "failed")
        elif lost:
            self._give_up(save, "lost")
        elif save.stage is _Stage.WRITING and done == self._world.size:
            self._commit(save)
        elif save.stage is _Stage.COMMITTING and done:
            self._committed(save)

    def save(self, hurried: bool = False) -> None:
        """Copies the state and begins to write it, after what was being written before.

        `hurried`: returns when it is on the disk, does not read it back, and leaves older checkpoints alone.
        Raises StorageError, before anything is written where there is no room for it.
        """
        self.finish()
        begun = time.monotonic()
        snapshot = self._snapshot()
        texts = {STATE: json.dumps(snapshot.state, indent=1) + "\n", CONFIG: snapshot.config}
        layout = lay_out(snapshot.pieces)
        token = float(secrets.randbits(48)) if self._world.is_first else 0.0  # exact in float64
        size, token = self._world.sum([float(layout.size), token])
        save = _Save(
            snapshot.step, self._folder / partial_name(snapshot.step, f"{int(token):012x}"),
            int(size) + sum(len(text.encode()) for text in texts.values()), texts, hurried, begun,
        )  # fmt: skip
        problem = self._make_room(save) if self._world.is_first else ""
        if self._world.sum([float(bool(problem))])[0]:
            self._fail(snapshot.step, [problem])
        arena, writer = self._start(layout.size)
        arena.copy(layout)
        path = save.partial / rank_file(self._world.rank, self._world.size)
        writer.tell("write", path=str(path), size=layout.size, verify=not hurried)
        self._save = save
        if hurried or not self._background:
            self.finish()

    def finish(self) -> None:
        """Waits until what was begun is whole on the disk. Raises StorageError, FailedElsewhere."""
        while self._save is not None:
            if not self._save.answer and self._writer is not None and self._writer.busy:
                self._save.answer = self._writer.answer(wait=True) or {}
            self.agreed(self._world.sum(self.asks()))

    def close(self) -> None:
        """Ends this rank's process; what it was writing is given up. Never waits for other ranks."""
        self._end_writer()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._save is not None and self._world.is_first:
            self._remove(self._save.partial)
        self._save = None

    def _start(self, size: int) -> tuple[Arena, Writer]:
        """Memory and process, from the first save, or the first step, on; and after a process was lost."""
        if self._arena is None:
            self._arena = Arena(self._world.device, self._say if self._world.is_first else lambda _: None)
            self._arena.warm(size)
        if self._writer is not None and not self._writer.alive:
            self._end_writer()
        if self._writer is None:
            self._writer = Writer(self._arena.descriptor)
        return self._arena, self._writer

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.end()
            self._writer = None

    def _make_room(self, save: _Save) -> str:
        """Makes the folder to write to; what is wrong where that cannot be, or there is too little room."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            disk = os.statvfs(self._folder)
            free = disk.f_bavail * disk.f_frsize
            if save.size + MARGIN > free:
                return f"{self._folder}: {save.size:,} bytes are needed, and {MARGIN:,} to spare; {free:,} are free"
            files.make_folder(save.partial)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return ""

    def _commit(self, save: _Save) -> None:
        reports = self._world.gather(save.answer)
        save.stage, save.answer = _Stage.COMMITTING, {}
        if self._world.is_first:
            assert self._writer is not None
            self._writer.tell(
                "commit", partial=str(save.partial), step=save.step, texts=save.texts,
                reports={rank_file(rank, self._world.size): report for rank, report in enumerate(reports)},
                keep=None if save.hurried else self._keep, best=self._best(save.step),
            )  # fmt: skip

    def _committed(self, save: _Save) -> None:
        self._save, self.newest = None, save.step
        if self._world.is_first:
            self._say(
                f"checkpoint {self._folder / folder_name(save.step)}: {save.size:,} bytes, "
                f"{time.monotonic() - save.begun:.1f} s after step {save.step}"
            )
            if "not removed" in save.answer:
                self._say(f"warning: an older checkpoint could not be removed: {save.answer['not removed']}")

    def _give_up(self, save: _Save, why: str) -> None:
        """Nothing is left of it; where storage failed, nor is the run."""
        if self._writer is not None and (self._writer.busy or "lost" in save.answer):
            self._end_writer()
        told = self._world.gather(save.answer.get(why, ""))  # no rank writes any more when all are here
        self._save = None
        if self._world.is_first:
            self._remove(save.partial)
        if why == "failed":
            self._fail(save.step, told)
        if self._world.is_first:
            lost = ", ".join(f"of rank {rank} {how}" for rank, how in enumerate(told) if how)
            self._say(
                f"warning: saving step {save.step} failed: the process that writes, {lost}. "
                f"Training goes on; {self.kept()}"
            )

    def _fail(self, step: int, told: list[str]) -> None:
        """`told`: what went wrong on each rank, on rank 0."""
        if not self._world.is_first:
            raise FailedElsewhere(StorageError.exit_code)
        causes = [f"rank {rank}: {cause}" if len(told) > 1 else cause for rank, cause in enumerate(told) if cause]
        raise StorageError(f"step {step} could not be saved\n{chr(10).join(causes)}\n{self.mending()}")

    def kept(self) -> str:
        """The newest checkpoint, for messages."""
        steps: list[int] = []
        with suppress(OSError):
            steps = [step for path in self._folder.iterdir() if (step := step_of(path)) is not None]
        return f"{self._folder / folder_name(max(steps))} is kept" if steps else NONE_KEPT

    def mending(self) -> str:
        """The same, and how the run goes on once there is room again."""
        kept = self.kept()
        if kept == NONE_KEPT:
            return f"{kept}\nMake room there and start the same command again"
        resume = f"shardtune resume --run {self._folder.parent}"
        return f"{kept}\nMake room there, and the run goes on from its newest good checkpoint with\n  {resume}"

    def _remove(self, partial: Path) -> None:
        with suppress(OSError):  # the next start tries again
            files.remove(partial)
