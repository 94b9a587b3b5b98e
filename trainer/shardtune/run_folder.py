"""The run's folder: what is in it before the first step, and what becomes of an older one."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from shardtune.errors import ConfigError, StorageError

LIBRARIES = (
    "shardtune", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "triton", "datasets", "tokenizers",
    "safetensors", "numpy",
)  # fmt: skip
TOKENIZER = "tokenizer"
"""The folder of what texts and labels were for the run, in the run's folder."""


OF_A_PART = ("command_line", "ranks", "strategy", "devices", "python", "platform", "versions", "git_commit")
"""What environment.json keeps of earlier parts of a run."""


def is_finished(folder: Path) -> bool:
    """Whether a run in `folder` has come to its end."""
    return (folder / "final").is_dir()


def keep_result(folder: Path, step: int) -> Path | None:
    """Renames final/, of a run that was finished at `step` and goes on; None where there is none.

    Raises StorageError where that cannot be done.
    """
    final = folder / "final"
    if not final.is_dir():
        return None
    kept, number = folder / f"final-step-{step}", 1
    while kept.exists():
        number += 1
        kept = folder / f"final-step-{step}-{number}"
    try:
        return final.rename(kept)
    except OSError as error:
        raise StorageError(f"{final}: cannot be renamed: {error.strerror or error}") from error


def check_place(folder: Path) -> None:
    """Raises StorageError where the folder is not there and cannot be made: better known before torch is imported."""
    if folder.exists():
        return
    place = folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"{folder}: cannot be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: cannot be made: {place} is not writable")


def set_aside(folder: Path) -> Path | None:
    """Renames an existing folder to <name>.old-1 (or -2, …) and returns the new path; None where there is none.

    Raises StorageError where that cannot be done or a new one could not be made, ConfigError where a run is writing
    there.
    """
    check_place(folder)
    if not folder.exists():
        return None
    if folder.is_dir():
        os.close(claim(folder))
    number = 1
    while folder.with_name(f"{folder.name}.old-{number}").exists():
        number += 1
    try:
        return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be set aside: {error.strerror or error}") from error


def begin(folder: Path, config_yaml: str, environment: dict[str, Any]) -> int:
    """Makes the folder with config.yaml and environment.json, and claims it for as long as the descriptor is open.

    Raises StorageError where it cannot be written, ConfigError where another run has begun there meanwhile.
    """
    try:
        folder.mkdir(parents=True)
        held = claim(folder)
        _describe(folder, config_yaml, environment)
    except FileExistsError:
        raise _taken(folder) from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return held


def reopen(folder: Path, step: int, config_yaml: str, environment: dict[str, Any]) -> None:
    """Writes config.yaml and environment.json of a part of the run that goes on after `step`, in a claimed folder.

    What the earlier parts ran on is kept in environment.json under `earlier`, with the steps that each has done and
    that still count. Raises StorageError where it cannot be written.
    """
    before = read_environment(folder)
    own = {key: value for key, value in before.items() if key in OF_A_PART}
    parts = [*before.get("earlier", []), {"steps": [before.get("begins_after", 0), step], **own}]
    earlier = [
        {**part, "steps": [part["steps"][0], min(part["steps"][1], step)]} for part in parts if part["steps"][0] < step
    ]
    try:
        _describe(folder, config_yaml, {**environment, "begins_after": step, "earlier": earlier})
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error


def read_environment(folder: Path) -> dict[str, Any]:
    """What environment.json says; nothing where it cannot be read."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def go_where_started(folder: Path) -> None:
    """Changes to the directory that the run was started in, which relative paths of its config are meant from, if it
    is there."""
    directory = read_environment(folder).get("directory")
    if isinstance(directory, str) and Path(directory).is_dir():
        os.chdir(directory)


def _describe(folder: Path, config_yaml: str, environment: dict[str, Any]) -> None:
    """Each file is the old or the new one, whenever it is interrupted."""
    described = json.dumps(environment, indent=2, ensure_ascii=False) + "\n"
    for name, text in (("config.yaml", config_yaml), ("environment.json", described)):
        _replace(folder / name, text)


def write_whole(path: Path, text: str) -> None:
    """The file is the old or the new one, whenever it is interrupted. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def claim(folder: Path) -> int:
    """A descriptor that holds a lock on the folder; the system lifts it when the process ends, however it ends.

    Raises ConfigError where another run holds it, StorageError where it cannot be written in.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        os.close(descriptor)
        raise StorageError(f"{folder}: is not writable")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _taken(folder) from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _taken(folder: Path) -> ConfigError:
    return ConfigError(f"{folder}: another run is writing there; wait for its end, or give this one another name=")


def environment(command_line: list[str], strategy: str, devices: list[str]) -> dict[str, Any]:
    """What a run ran on; `devices` has one entry a rank."""
    return {
        "command_line": command_line,
        "directory": os.getcwd(),
        "ranks": len(devices),
        "strategy": strategy,
        "devices": devices,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "fused": {},
    }


def version(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
