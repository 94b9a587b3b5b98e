"""The texts that a config names. Imports no torch: wrong data is found before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from shardtune.config import CausalConfig, ClassificationConfig, Config, TaskConfig
from shardtune.data.fields import Fields, texts
from shardtune.data.sources import rows
from shardtune.data.splits import Splits, read_splits
from shardtune.data.stream import Mixture, read_judged
from shardtune.errors import ConfigError


def read_texts(config: Config) -> Splits:
    """All examples of the run, as text; of a stream those that are judged.

    Raises DataError where a source is missing or wrong.
    """
    data = config.data
    fields, train = make_fields(config.task), [source.path for source in data.sources]
    if data.streaming:
        mixed = make_mixture(config) is not None
        limit = config.evaluation.examples
        return read_judged(train, data.validation, data.test, data.splits, fields, limit, mixed)
    labels = config.task.kind == "classification"
    return read_splits(train, data.validation, data.test, data.splits, fields, labels)


def make_fields(task: TaskConfig) -> Fields:
    """Which fields of a row make an example."""
    if isinstance(task, ClassificationConfig):
        return Fields(input=task.text, prompt=task.prompt, target=task.label)
    if isinstance(task, CausalConfig):
        return Fields(input=task.text or task.source, prompt=task.prompt, target=task.target)
    return Fields(input=task.source, prompt=task.prompt, target=task.target)


def make_mixture(config: Config) -> Mixture | None:
    """How the sources of a stream are mixed; None where one comes after the other."""
    sources = config.data.sources
    parts = [source.tokens or source.weight or 0.0 for source in sources]
    if not sum(parts):
        return None
    return Mixture([part / sum(parts) for part in parts], of_tokens=sources[0].tokens is not None)


def check_model_path(config: Config) -> None:
    """Finds a local model that is not there, without asking a hub.

    Raises ConfigError; a path of the form owner/name may be a hub id and passes.
    """
    path = config.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ConfigError(f"model.path {path}: the folder has no config.json, so it holds no model")
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or (folder.parent.is_dir() and "/" in path)
    if looks_local:
        raise ConfigError(f"model.path {path}: there is no such folder")


def read_sources(config: Config, path: Path) -> list[str]:
    """What the model is to read for each row of a file; the rows need no target.

    Raises DataError where the file is missing or a row lacks a field.
    """
    fields = dataclasses.replace(make_fields(config.task), target=None)
    return [text.source for text in texts(rows(str(path), "test"), fields, labels=False, dropped=Counter())]
