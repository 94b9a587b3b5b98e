"""What the folder of a run tells before anything is loaded: whether it is finished, where it can go on. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from shardtune.assemble.resumable import UNSAID, is_longer, shown
from shardtune.checkpoint.names import DAMAGED, FOLDER, MANIFEST, folder_name, step_of
from shardtune.config import Config
from shardtune.config_file import flat, load_config
from shardtune.errors import CheckpointError, ConfigError
from shardtune.run_folder import is_finished, read_environment


def finished(config: Config) -> list[str] | None:
    """What to say where the run has come to its end and there is nothing to go on with; None otherwise.

    A finished run goes on where it is now to last longer, or in another unit, or is to wait longer for a better
    evaluation, or to go back to an earlier step.
    """
    folder, given = Path(config.runs) / config.name, config.checkpoint.resume
    if given == "never" or not is_finished(folder):
        return None
    if not is_auto(given, folder) and read_environment(folder).get("began_from") != identity_of_start(given):
        return None
    lines = [f"{folder}: this run is finished; its result is in {folder / 'final'}."]
    try:
        then = load_config(folder / "config.yaml", [])
    except ConfigError:
        then = config
    if is_longer(config.duration, then.duration) is not False or _is_more_patient(config, then):
        if steps_in(folder):
            return None
        damaged = _damaged_in(folder)
        why = f"those that it had are damaged: {', '.join(damaged)}" if damaged else "it has none any more"
        raise CheckpointError(
            f"{lines[0]}\nIt cannot go on for longer, as that takes a checkpoint: {why}. tuning.from and model.path "
            "begin another run with its result"
        )
    old, new = flat(then), flat(config)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in UNSAID]
    lines += [f"  it was trained with {key}: {shown(old.get(key))}, not {shown(new.get(key))}" for key in changed]
    return [*lines, "Give checkpoint.resume=never to set it aside and start anew, or another name."]


def _is_more_patient(now: Config, then: Config) -> bool:
    """Whether a run whose patience may have come to its end is to have more of it."""
    before, patience = then.evaluation.patience, now.evaluation.patience
    return before is not None and (patience is None or patience > before)


def to_resume(folder: Path, overrides: Sequence[str], ranks: int | None, gpus: int) -> tuple[Path, list[str], int]:
    """The config's file, the overrides and the ranks by which the run in `folder` goes on: as many ranks as it had,
    unless `ranks` are given or there are fewer GPUs (0: it runs on the CPU).

    Raises ConfigError where there is nothing to go on from.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"command line --run: {folder} is no run's folder (no config.yaml)")
    named = folder if folder.name not in ("", "..") else folder.resolve()
    if not (steps_in(folder) or _damaged_in(folder) or is_finished(folder)):
        raise ConfigError(
            f"command line --run: {folder} has no checkpoint to go on from; begin anew with shardtune train --config "
            f"{file}"
        )
    if ranks is None:
        had = read_environment(folder).get("ranks", 1)
        ranks = had if isinstance(had, int) and had > 0 else 1
        ranks = min(ranks, gpus) if gpus else ranks
    own = {"name": named.name, "runs": str(named.parent), "checkpoint.resume": "auto"}
    return file, [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *overrides], ranks


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints that a run's folder has, whole by their names."""
    return sorted(step for path in _entries(folder / FOLDER) if (step := step_of(path)) is not None)


def _damaged_in(folder: Path) -> list[str]:
    """The names of the checkpoints of a run's folder that were set aside as damaged."""
    return sorted(path.name for path in _entries(folder / FOLDER) if DAMAGED.fullmatch(path.name))


def what_is_kept(config: Config) -> str:
    """How a run goes on that has ended in the middle of a step."""
    folder = Path(config.runs) / config.name
    steps = steps_in(folder)
    if not steps:
        return f"{folder} has no checkpoint yet; the same command begins anew"
    kept = f"{folder / FOLDER / folder_name(steps[-1])} is kept"
    return f"{kept}; go on from there with\n  shardtune resume --run {folder}"


def is_auto(given: str, folder: Path) -> bool:
    """Whether `checkpoint.resume` means the newest good checkpoint of the run's own folder."""
    return given == "auto" or Path(given).expanduser().resolve() in (folder.resolve(), (folder / FOLDER).resolve())


def is_single(path: Path) -> bool:
    """Whether a folder is, by its looks, one checkpoint, and not a folder of them."""
    return (path / MANIFEST).is_file() or (step_of(path) is not None and path.is_dir())


def identity_of_start(given: str) -> str:
    """What a checkpoint remembers of the path that its run began from."""
    return str(Path(given).expanduser().resolve())


def locate(given: str, folder: Path) -> tuple[Path, bool]:
    """The checkpoint, or the folder of checkpoints, that `checkpoint.resume` names; and whether it is in the run's
    `folder`. Raises ConfigError where there is none, with the nearest one that there is."""
    path = Path(given).expanduser()
    if is_single(path):
        return path, path.resolve().parent == (folder / FOLDER).resolve()
    for checkpoints in (path, path / FOLDER):
        if any(step_of(inner) is not None for inner in _entries(checkpoints)):
            return checkpoints, False
    problem = "holds no checkpoint" if path.exists() else "there is no such folder"
    raise ConfigError(f"checkpoint.resume {given}: {problem}{_hint(path, folder)}")


def _hint(path: Path, folder: Path) -> str:
    """The checkpoint that is most likely meant."""
    near = {
        inner.name: inner
        for place in (path.parent, path.parent / FOLDER, folder / FOLDER)
        for inner in _entries(place)
        if step_of(inner) is not None
    }
    if not near:
        return "; auto goes on from the newest checkpoint of the run's folder, or begins anew"
    numbers = {str(step_of(inner)): inner for inner in near.values()}
    digits = "".join(letter for letter in path.name if letter.isdigit()).lstrip("0")
    match = difflib.get_close_matches(path.name, near, 1, 0.0)
    return f"; did you mean {numbers.get(digits) or near[match[0]]}?"


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where that cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
