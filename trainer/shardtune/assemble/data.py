"""The texts that a config names. Imports no torch: wrong data is found before anything slow begins."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from shardtune.config import CausalConfig, ClassificationConfig, Config
from shardtune.conversations import Conversation, to_text
from shardtune.data.fields import Fields, questions, texts
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
        fields = Fields(task.text or task.source, task.prompt, task.target, task.messages, task.tools)
    else:
        fields = Fields(input=task.source, prompt=task.prompt, target=task.target)
    labels = task.kind == "classification"
    return read_splits(data.train, data.validation, data.test, data.splits, fields, labels)


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

    A conversation loses the assistant's turns that it ends with: the model is to answer what stands before. Raises
    DataError where the file is missing or a row lacks a field.
    """
    task = config.task
    if isinstance(task, CausalConfig) and task.messages is not None:
        return list(questions(rows(str(path), "test"), task.messages, task.tools))
    field = task.text if isinstance(task, ClassificationConfig) else task.source
    if isinstance(task, CausalConfig):
        field = task.text or task.source
    fields = Fields(input=field, prompt=task.prompt, target=None)
    return [text.source for text in texts(rows(str(path), "test"), fields, labels=False, dropped=Counter())]


def source_of(config: Config, text: str) -> str:
    """What the model is to read where a user gives one text: in conversations it is one user turn."""
    if isinstance(config.task, CausalConfig) and config.task.messages is not None:
        return to_text(Conversation([{"role": "user", "content": text}], []))[0]
    return text
