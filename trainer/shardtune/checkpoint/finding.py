"""Finds checkpoints by looking, never by a pointer, and trusts none that was not read. Needs no torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardtune.checkpoint.contents import read_contents
from shardtune.checkpoint.manifest import problems
from shardtune.checkpoint.names import DAMAGED, PARTIAL, WHOLE
from shardtune.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from shardtune.world import World


class Found(NamedTuple):
    """An entry of the folder of checkpoints."""

    path: Path
    step: int
    bytes: int
    """Of all files in it."""
    changed: float
    """When something was last written in it, in seconds since 1970."""
    reasons: list[str]
    """Why it is not whole; empty if it is."""


def listing(folder: Path) -> list[Found]:
    """Every checkpoint in `folder`, and what was or is to become one, by its step; every byte of them is read."""
    found = []
    for pattern in (WHOLE, DAMAGED, PARTIAL):
        for path, step in called(folder, pattern):
            reasons = ["unfinished: being written, or left by a run that ended meanwhile"]
            if pattern is not PARTIAL:
                reasons = reasons_against(path)
                if pattern is DAMAGED:
                    reasons = reasons or [
                        "set aside as damaged, but whole now; take .damaged out of its name to use it"
                    ]
            found.append(Found(path, step, bytes_in(path), path.lstat().st_mtime, reasons))
    return sorted(found, key=lambda entry: (entry.step, entry.path.name))


def newest_good(folder: Path, world: World, say: Callable[[str], None], own: bool = True) -> Path | None:
    """The newest whole checkpoint in `folder`; None only where there has never been one.

    All ranks call it and get the same; they share the reading. What is damaged is said, on the first rank, and in the
    run's `own` folder set aside: renamed to step-….damaged (-2, …). Raises CheckpointError where only damaged ones are
    left.
    """
    kept: set[str] = set()  # damaged ones that have their names still
    while True:
        names = world.first_does("checkpoints", lambda: [path.name for path, _ in called(folder, WHOLE)])
        names = [name for name in names if name not in kept]
        if not names:
            break
        path = folder / names[-1]
        reasons = agreed_reasons(path, world)
        if not reasons:
            return path
        aside = world.first_does("set aside", lambda path=path, reasons=reasons: _set_aside(path, reasons, say, own))
        if not aside:
            kept.add(path.name)
    damaged = world.first_does("damaged", lambda: [path.name for path, _ in called(folder, DAMAGED)]) + sorted(kept)
    if damaged:
        against = {name: agreed_reasons(folder / name, world) for name in damaged}
        world.first_does("none whole", lambda: _fail(folder, against))
    return None


def check_whole(path: Path, world: World) -> None:
    """Reads every byte of a checkpoint that was asked for by name; all ranks call it and share the reading.

    Raises CheckpointError where it is not whole; it stays as it is.
    """
    reasons = agreed_reasons(path, world)
    if reasons:
        world.first_does("not whole", lambda: _refuse(path, reasons))


def reasons_against(path: Path) -> list[str]:
    """Why a checkpoint cannot be used, a line each, `FOLDER/FILE: what`; every byte is read."""
    found = [f"{path}/{problem}" for problem in problems(path)]
    return found or _unfitting(path)


def set_aside_newer(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Renames the checkpoints of later steps to step-….undone (-2, …), on the first rank, and says so.

    Raises StorageError where that cannot be done.
    """
    for path, later in reversed(called(folder, WHOLE)):  # so that the rest is the same run, if this is interrupted
        if later <= step:
            return
        aside = _free(path, "undone")
        try:
            path.rename(aside)
        except OSError as error:
            raise StorageError(f"{path}: cannot be set aside: {error.strerror or error}") from error
        say(f"warning: the run goes back to step {step:,}; {path} is now {aside.name}, and may be removed")


def bytes_in(path: Path) -> int:
    """Of the files in a folder; 0 of what is none."""
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0


def called(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, int]]:
    """Entries of a folder, which need not be there, whose names match, and their steps; the oldest first.

    Raises CheckpointError where the folder cannot be read.
    """
    try:
        matches = [match for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return [
        (folder / match[0], int(match[1])) for match in sorted(matches, key=lambda match: (int(match[1]), match[0]))
    ]


def clear_partial(folder: Path) -> list[Path]:
    """Removes what runs have left that ended while they wrote a checkpoint; for the one that holds the run's folder.

    Returns those that could not be removed.
    """
    left = [path for path, _ in called(folder, PARTIAL)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in left if os.path.lexists(path)]


def agreed_reasons(path: Path, world: World) -> list[str]:
    """As `reasons_against`, the reading shared by the ranks; the same on all of them."""
    own = [f"{path}/{problem}" for problem in problems(path, (world.rank, world.size))] if path.is_dir() else None
    heard = world.gather(own)

    def judge() -> list[str]:
        blind = [rank for rank, reasons in enumerate(heard) if reasons is None]
        if blind and heard[0] is not None:
            raise CheckpointError(
                f"{path}: rank {blind[0]} does not see it, rank 0 does: the run's folder must be on storage that all "
                "ranks share"
            )
        said = dict.fromkeys(
            reason for reasons in heard for reason in reasons or [f"{path}: not a folder"] * bool(blind)
        )
        return list(said) or _unfitting(path)

    return world.first_does("whole or not", judge)


def _unfitting(path: Path) -> list[str]:
    """Why files that are as they were written are no checkpoint."""
    try:
        read_contents(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def _set_aside(path: Path, reasons: list[str], say: Callable[[str], None], own: bool) -> bool:
    """Renames a damaged checkpoint and says so, or why not; one that is not the run's `own` stays as it is."""
    aside = _free(path, "damaged")
    lines = "".join(f"\n  {reason}" for reason in reasons)
    outcome = "was left as it is"
    try:
        if own:
            path.rename(aside)
            outcome = f"was set aside as {aside.name}"
    except OSError as error:
        outcome = f"could not be set aside ({error.strerror or error})"
    say(f"warning: {path} is damaged, and {outcome}; an older one is looked for:{lines}")
    return not os.path.lexists(path)


def _free(path: Path, ending: str) -> Path:
    """The path with an ending, and a number where that is taken."""
    free, number = path.with_name(f"{path.name}.{ending}"), 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{ending}-{number}")
    return free


def _refuse(path: Path, reasons: list[str]) -> None:
    """Raises CheckpointError."""
    raise CheckpointError(
        "\n".join(reasons) + f"\n{path}: is not whole, so the run does not begin from it; it was left as it is. Name "
        "another one, or go on from the newest good one of the run with checkpoint.resume=auto"
    )


def _fail(folder: Path, against: dict[str, list[str]]) -> None:
    """Says why no checkpoint serves. Raises CheckpointError."""
    lines = []
    for name, reasons in against.items():
        lines += reasons or [f"{folder / name}: is whole; take .damaged out of its name to go on from it"]
    raise CheckpointError(
        "\n".join(lines) + f"\n{folder}: no checkpoint there is whole, so the run does not go on; nothing was removed. "
        "Put a good copy there, or begin anew with checkpoint.resume=never, which sets the run's folder aside"
    )
