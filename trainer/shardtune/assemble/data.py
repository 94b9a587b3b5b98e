"""The texts that a config names. Imports no torch: wrong data is found before anything slow begins."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from shardtune.config import CausalConfig, ClassificationConfig, Config
from shardtune.data.fields import Fields, texts
from shardtune.data.sources import rows
from shardtune.data.splits import Splits, read_splits
from shardtune.errors import ConfigError


def read_texts(config: Config) -> Splits:
    """All examples of the run, as text.

    Raises DataError where a source is missing or wrong.
    """
    task, data = config.task, config.data
    if isinstance(task, ClassificationConfig):
        fields = Fields(input=task.text, prompt=task.prompt, target=task.label)
    elif isinstance(task, CausalConfig):
        fields = Fields(input=task.text or task.source, prompt=task.prompt, target=task.target)
    else:
        fields = Fields(input=task.source, prompt=task.prompt, target=task.target)
    labels, train = task.kind == "classification", [source.path for source in data.sources]
    return read_splits(train, data.validation, data.test, data.splits, fields, labels)


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
    task = config.task
    field = task.text if isinstance(task, ClassificationConfig) else task.source
    if isinstance(task, CausalConfig):
        field = task.text or task.source
    fields = Fields(input=field, prompt=task.prompt, target=None)
    return [text.source for text in texts(rows(str(path), "test"), fields, labels=False, dropped=Counter())]
