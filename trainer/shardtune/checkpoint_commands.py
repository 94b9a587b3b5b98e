"""The commands about checkpoints: is one whole, and which ones are there. Need no torch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from shardtune.checkpoint.finding import Found, bytes_in, called, listing, reasons_against
from shardtune.checkpoint.manifest import read_manifest
from shardtune.checkpoint.names import DAMAGED, FOLDER, MANIFEST, PARTIAL, STATE, WHOLE, folder_name, step_of
from shardtune.errors import CheckpointError, ConfigError
from shardtune.text_table import table

AGES = ((86400, "d"), (3600, "h"), (60, "min"))
"""Seconds of a unit, and what it is called."""


def verify(options: argparse.Namespace) -> int:
    """`shardtune verify`. Raises CheckpointError with all that is wrong, ConfigError where no checkpoint is meant."""
    path: Path = options.checkpoint.resolve()
    if not _is_checkpoint(path):
        raise ConfigError(f"command line --checkpoint: {options.checkpoint} is no checkpoint{_meant(path)}")
    reasons = reasons_against(path)
    if reasons:
        raise CheckpointError("\n".join([*reasons, f"{options.checkpoint} is not whole; it was left as it is"]))
    manifest = read_manifest(path)
    files = len(manifest.files) + 2  # the manifest and its hash
    print(f"{options.checkpoint} is whole: step {manifest.step}, {files} files, {bytes_in(path):,} bytes")
    return 0


def checkpoints(options: argparse.Namespace) -> int:
    """`shardtune checkpoints`. Raises CheckpointError where none is whole, ConfigError where there is no such run."""
    if not options.folder.is_dir():
        raise ConfigError(f"command line --run: {options.folder} is no folder")
    folder: Path = options.folder / FOLDER
    if not folder.is_dir() and not (options.folder / "config.yaml").is_file():
        raise ConfigError(f"command line --run: {options.folder} is no run's folder{_run_above(options.folder)}")
    found = listing(folder)
    if found:
        print(
            table([row for entry in found for row in _rows(entry)], ["step", "folder", "MB", "age", "whole", "why not"])
        )
    if all(entry.reasons for entry in found):
        raise CheckpointError(f"{folder}: {'none of them is whole' if found else 'there is no checkpoint yet'}")
    return 0


def _rows(found: Found) -> list[list[str]]:
    """An entry's row, and one for each further reason."""
    first, *more = [reason.removeprefix(f"{found.path}/") for reason in found.reasons] or [""]
    size, age = f"{found.bytes / 1e6:,.1f}", _age(time.time() - found.changed)
    row = [str(found.step), found.path.name, size, age, "no" if found.reasons else "yes", first]
    return [row, *(["", "", "", "", "", reason] for reason in more)]


def _age(seconds: float) -> str:
    for unit, name in AGES:
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{max(int(seconds), 0)} s"


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is one, however damaged."""
    named = any(pattern.fullmatch(path.name) for pattern in (WHOLE, DAMAGED, PARTIAL))
    return path.is_dir() and (named or (path / MANIFEST).exists() or (path / STATE).exists())


def _meant(path: Path) -> str:
    """What may have been meant by a path that is no checkpoint."""
    if not path.exists():
        return ": there is nothing of that name"
    for folder in (path, path / FOLDER):
        there = called(folder, WHOLE) if folder.is_dir() else []
        if there:
            run = folder.parent if folder.name == FOLDER else folder
            return f"; did you mean {there[-1][0]}? `shardtune checkpoints --run {run}` looks at all of them"
    return "; they are called RUN/checkpoints/step-…"


def _run_above(path: Path) -> str:
    """The run in which a path lies, as a suggestion."""
    for folder in path.resolve().parents:
        if (folder / FOLDER).is_dir():
            return f"; did you mean {folder}?"
    return ""


def checkpoint_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step of `run` is. Raises ConfigError where there is none."""
    path = run / FOLDER / folder_name(step)
    if not path.is_dir():
        there = sorted(found for entry in (run / FOLDER).glob("*") if (found := step_of(entry)) is not None)
        steps = ", ".join(map(str, there)) or "none"
        raise ConfigError(f"command line --step: {run} has no checkpoint of step {step}; it has {steps}")
    return path
