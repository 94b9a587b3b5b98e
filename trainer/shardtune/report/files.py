"""What a run's folder says, read as far as it can be: runs may be old, unfinished, or of tasks that write no texts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from shardtune.errors import ConfigError

Line = dict[str, Any]
"""One of metrics.jsonl."""


@dataclass
class RunFiles:
    """The files of one run but for the large ones, which are read when they are asked for."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    comparison: dict[str, Any]
    """Of each split, as in comparison.json."""
    data: dict[str, Any]
    training: list[Line]
    """The lines of training, by step."""
    evaluations: list[Line]
    """The lines of evaluations, as they were written."""
    missing: list[str] = field(default_factory=list)
    """The files that are not there, or cannot be used, each with the reason."""

    @property
    def name(self) -> str:
        """The run's, or the folder's where its config says none."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "final").is_dir()

    @property
    def last_step(self) -> int:
        """The last one that a line tells of; 0 where there is none."""
        return max((line["step"] for line in [*self.training, *self.evaluations]), default=0)

    def setting(self, path: str, default: Any = None) -> Any:
        """A key of the config, with dots; `default` where it is not there or null."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return default if value is None else value

    def predictions(self, name: str, split: str, positions: Sequence[int]) -> dict[int, dict[str, str]]:
        """Source, reference and prediction of the examples at these lines of a predictions file, as far as they are
        there; one of its lines is held at a time."""
        wanted = set(positions)
        found: dict[int, dict[str, str]] = {}
        try:
            with (self.folder / "predictions" / f"{name}-{split}.jsonl").open(
                encoding="utf-8", errors="replace"
            ) as file:
                for position, text in zip(range(max(wanted, default=-1) + 1), file, strict=False):
                    line = _object(text) if position in wanted else None
                    if line is not None:
                        found[position] = {key: _shown(line.get(key)) for key in ("source", "reference", "prediction")}
        except OSError:
            return {}
        return found

    def statistics(self, name: str, split: str) -> Path:
        """Where the evaluator leaves them."""
        return self.folder / "statistics" / f"{name}-{split}.npy"

    def has_statistics(self, name: str, split: str) -> bool:
        """Whether they are there."""
        return self.statistics(name, split).is_file()

    def digest(self, name: str, split: str) -> str | None:
        """SHA-256, in hex, of the sources and references of a predictions file; None where there is none."""
        found = hashlib.sha256()
        try:
            with (self.folder / "predictions" / f"{name}-{split}.jsonl").open(encoding="utf-8") as file:
                for text in file:
                    line = json.loads(text)
                    found.update(json.dumps([line["source"], line["reference"]]).encode())
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return found.hexdigest()


def read_run(folder: Path) -> RunFiles:
    """Raises ConfigError where `folder` is no run's."""
    if not folder.is_dir():
        raise ConfigError(f"command line --run: there is no folder {folder}{_those_beside(folder)}")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(
            f"command line --run: {folder} is no run's folder (no config.yaml, no metrics.jsonl){_those_in(folder)}"
        )
    missing: list[str] = []
    config_text = _text(folder / "config.yaml", missing)
    training, evaluations = _metrics(folder / "metrics.jsonl", missing)
    return RunFiles(
        folder=folder,
        config=_config(config_text, missing),
        config_text=config_text,
        environment=_json(folder / "environment.json", missing),
        comparison=_json(folder / "comparison.json", missing),
        data=_json(folder / "data.json", missing),
        training=training,
        evaluations=evaluations,
        missing=missing,
    )


def finite(value: object) -> float | None:
    """A number as it is, anything else (and what is not finite) as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there")
    except OSError as error:
        missing.append(f"{path.name} cannot be read: {error.strerror or error}")
    return ""


def _config(text: str, missing: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        missing.append("config.yaml is no YAML")
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    text = _text(path, missing)
    found = _object(text) if text else {}
    if found is None:
        missing.append(f"{path.name} holds no JSON object")
    return found or {}


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _metrics(path: Path, missing: list[str]) -> tuple[list[Line], list[Line]]:
    """Training lines and those of evaluations; a line that was cut off is left out."""
    training: list[Line] = []
    evaluations: list[Line] = []
    try:
        for line in _lines(path):
            if isinstance(line.get("step"), int):
                (evaluations if "split" in line else training).append(line)
    except FileNotFoundError:
        missing.append("metrics.jsonl is not there")
    except OSError as error:
        missing.append(f"metrics.jsonl cannot be read: {error.strerror or error}")
    return sorted(training, key=lambda line: line["step"]), evaluations


def _lines(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _object(text)
            if line is not None:
                yield line


def _shown(value: object) -> str:
    """A text; where a reference is several, the first one."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _those_in(folder: Path) -> str:
    """The runs in a folder, as a suggestion."""
    try:
        runs = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    except OSError:
        runs = []
    shown = ", ".join(runs[:12]) + (", …" if len(runs) > 12 else "")
    return f"; the runs in it are: {shown}" if runs else ""


def _those_beside(folder: Path) -> str:
    for above in folder.parents:
        if above.is_dir():
            return _those_in(above).replace("in it", f"in {above}")
    return ""


def called_apart(runs: Sequence[RunFiles]) -> list[str]:
    """A name for each run: its own, where no other has the same; else with its folder, or with a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    seen: dict[str, Iterator[int]] = {}
    called = []
    for name in names:
        number = next(seen.setdefault(name, count(1)))
        called.append(name if number == 1 else f"{name} ({number})")
    return called
