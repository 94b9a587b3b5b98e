"""Where a run begins: anew, or at a checkpoint, and what becomes of the files that its folder has by then."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shardtune import run_folder
from shardtune.assemble.data_statistics import write_data_statistics
from shardtune.assemble.prepared import Prepared, keep_tokenizer
from shardtune.assemble.resumable import compare
from shardtune.assemble.run_again import identity_of_start, is_auto, is_single, locate, steps_in
from shardtune.assemble.saving import Identity
from shardtune.checkpoint.finding import check_whole, newest_good, set_aside_newer
from shardtune.checkpoint.names import FOLDER
from shardtune.checkpoint.reading import Checkpoint, open_checkpoint
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.errors import CheckpointError, ConfigError
from shardtune.world import World


def _no_place(key: str) -> str:
    return ""


def _nothing() -> None:
    pass


class Beginning(NamedTuple):
    """Where a run begins."""

    saved: Checkpoint | None = None
    """What it goes on from; None: it begins anew."""
    began_from: str | None = None
    """The path that `checkpoint.resume` gave for this part of the run or an earlier one."""
    held: int | None = None
    """On the first rank, the claim on the run's own folder, if that is gone on with."""
    place: Callable[[str], str] = _no_place
    """FILE:LINE of a key of the config."""
    own: bool = True
    """Whether the checkpoint is of the run's own folder, so that its figures go on."""

    rename: Callable[[], None] = _nothing
    """What is moved out of the way in the run's folder, once it is known that this run can go on."""

    @property
    def goes_on(self) -> bool:
        """Whether the figures of earlier parts are in the run's folder."""
        return self.saved is not None and self.own

    def check(self, config: Config, identity: Identity, world: World) -> list[str]:
        """What this run does otherwise than the one that saved. All ranks call it; raises CheckpointError."""
        if self.saved is None:
            return []
        state = self.saved.state
        return world.first_does("changes", lambda: compare(state, config, identity.data, identity.base, self.place))

    def claim(self, folder: Path, config_yaml: str, environment: dict[str, Any]) -> int:
        """Makes the run's folder, or writes into the one that is there what this part runs on; on the first rank."""
        self.rename()
        environment["began_from"] = self.began_from
        if self.saved is None or self.held is None:
            return run_folder.begin(folder, config_yaml, environment)
        run_folder.reopen(folder, self.saved.step, config_yaml, environment)
        return os.dup(self.held)

    def release(self) -> None:
        """Lets go of the run's folder, when the run has ended in whatever way."""
        _release(self.held)


FRESH = Beginning()


@contextmanager
def taken(
    folder: Path, config: Config, world: World, prepared: Prepared, beginning: Beginning, environment: dict[str, Any]
) -> Iterator[None]:
    """The run's folder is made or written to, with what is known before the first step, and no other run may write
    there meanwhile."""
    claims: list[int] = []

    def take() -> None:
        claims.append(beginning.claim(folder, dump_config(config), environment))
        keep_tokenizer(prepared, folder / run_folder.TOKENIZER)
        write_data_statistics(folder, config, prepared)

    try:
        world.first_does("run's folder", take)
        yield
    finally:
        for claim in claims:
            os.close(claim)


def begin_at(config: Config, world: World, say: Callable[[str], None], place: Callable[[str], str]) -> Beginning:
    """Where a run that is not finished begins, by `checkpoint.resume`. All ranks call it and get the same.

    What is renamed is said, on the first rank. Raises ConfigError where a path is no checkpoint or the run's folder has
    others of its own, CheckpointError where what should be gone on from is damaged, StorageError.
    """
    folder, given = Path(config.runs) / config.name, config.checkpoint.resume
    if given == "never":
        return _anew(folder, world, say)
    held: list[int] = []
    # Before anything is looked at: another run may be writing there.
    world.first_does("claim", lambda: held.extend([run_folder.claim(folder)] if folder.is_dir() else []))
    claim = held[0] if held else None
    try:
        beginning = _go_on(config, world, say, place, claim)
    except BaseException:
        _release(claim)
        raise
    if beginning.held is None:
        _release(claim)
    return beginning if beginning.saved is not None else _anew(folder, world, say)


def _go_on(
    config: Config, world: World, say: Callable[[str], None], place: Callable[[str], str], claim: int | None
) -> Beginning:
    """As `begin_at`, once the run's own folder is claimed; FRESH where there is no checkpoint."""
    folder, given = Path(config.runs) / config.name, config.checkpoint.resume
    newest = newest_good(folder / FOLDER, world, say)
    saved = open_checkpoint(newest) if newest is not None else None
    before = saved.state.get("began_from") if saved is not None else None
    auto, start = is_auto(given, folder), identity_of_start(given)
    if saved is not None and (auto or before == start):
        if not auto and world.is_first:
            say(f"{folder} has begun from {given} before; it goes on from its own newest checkpoint, {saved.folder}")
        keep = functools.partial(_keep_result, folder, saved.step, say)
        return Beginning(saved, before, claim, place, rename=keep)
    if auto:
        return FRESH
    # Not before: where the run has begun may be removed by now, by the run itself even.
    wanted, single, inside = world.first_does("path", lambda: _located(given, folder))
    if inside:
        target = _whole(Path(wanted), single, world, say)
        return Beginning(target, start, claim, place, rename=functools.partial(_go_back, folder, target.step, say))
    if saved is not None:
        world.first_does("own", functools.partial(_fail, folder, saved, given, place))
    target = _whole(Path(wanted), single, world, say)
    return Beginning(target, start, None, place, own=False, rename=functools.partial(_move, folder, say))


def _fail(folder: Path, saved: Checkpoint, given: str, place: Callable[[str], str]) -> None:
    raise ConfigError(
        f"{place('checkpoint.resume')} checkpoint.resume: {folder} has checkpoints of its own, the newest "
        f"{saved.folder.name}, which did not begin from {given}; give another name=…, or checkpoint.resume=auto to go "
        "on with them"
    )


def _located(given: str, folder: Path) -> tuple[str, bool, bool]:
    """The path, whether it is one checkpoint, and whether that is the run's own; as one rank sees them."""
    path, inside = locate(given, folder)
    return str(path), is_single(path), inside


def _anew(folder: Path, world: World, say: Callable[[str], None]) -> Beginning:
    world.first_does("folder", lambda: _move(folder, say))
    return FRESH


def _move(folder: Path, say: Callable[[str], None]) -> None:
    old = run_folder.set_aside(folder)
    if old is not None:
        say(f"{folder}: what was there is now in {old}")


def _keep_result(folder: Path, step: int, say: Callable[[str], None]) -> None:
    kept = run_folder.keep_result(folder, step)
    if kept is not None:
        say(f"{folder}: the run was finished and goes on; its result so far is now in {kept}")


def _go_back(folder: Path, step: int, say: Callable[[str], None]) -> None:
    _keep_result(folder, max(steps_in(folder), default=step), say)
    set_aside_newer(folder / FOLDER, step, say)


def _whole(path: Path, single: bool, world: World, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that `path` is, if it is a `single` one, or the newest good one in it.

    Raises CheckpointError where it is damaged.
    """
    if single:
        check_whole(path, world)
        return open_checkpoint(path)
    newest = newest_good(path, world, say, own=False)
    if newest is None:
        raise CheckpointError(f"checkpoint.resume {path}: there is no checkpoint any more")
    return open_checkpoint(newest)


def _release(claim: int | None) -> None:
    if claim is not None:
        os.close(claim)
