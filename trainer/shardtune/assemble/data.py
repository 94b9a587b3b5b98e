"""The texts that a config names. Imports no torch: wrong data is found before anything slow begins."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from shardtune.config import Config
from shardtune.conversations import Conversation, to_text
from shardtune.data.corpus import VERSION, Corpus, load_corpus
from shardtune.data.fields import questions, texts
from shardtune.data.sources import identity, rows
from shardtune.data.splits import Splits, read_splits
from shardtune.data.stream import Mixture, read_judged
from shardtune.data.tables import fingerprint
from shardtune.errors import ConfigError
from shardtune.row_fields import Fields


def read_texts(config: Config) -> Corpus:
    """The examples of the run, or what is remembered of them if neither files nor settings have changed since.

    Raises DataError where a source is missing or wrong.
    """
    data, task = config.data, config.task
    fields, train = fields_of(config), [source.path for source in data.sources]
    judged = config.evaluation.examples

    def key() -> str | None:
        given = [source for source in (*train, data.validation, data.test) if source is not None]
        files = [identity(source) for source in given]
        if data.streaming or None in files:
            return None
        places = [len(train), data.validation is None, data.test is None]
        return fingerprint("texts", VERSION, files, places, data.splits, task.kind, fields.key)

    def read() -> Splits:
        if data.streaming:
            mixed = make_mixture(config) is not None
            assert judged is not None  # see `conflicts`
            return read_judged(train, data.validation, data.test, data.splits, fields, judged, mixed)
        return read_splits(train, data.validation, data.test, data.splits, fields)

    return load_corpus(key, read, fields.labels_of, judged)


def fields_of(config: Config) -> Fields:
    """Which fields of a row make an example, and which are kept beside it."""
    return dataclasses.replace(config.task.fields, beside=tuple(config.evaluation.slices))


def make_mixture(config: Config) -> Mixture | None:
    """How the sources of a stream are mixed; None where one comes after the other."""
    sources = config.data.sources
    if len(sources) == 1:
        return None
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

    A conversation loses the assistant's turns that it ends with: the model is to answer what stands before. Raises
    DataError where the file is missing or a row lacks a field.
    """
    fields = config.task.asked
    if fields.messages is not None:
        return list(questions(rows(str(path), "test"), fields.messages, fields.tools))
    return [text.source for text in texts(rows(str(path), "test"), fields, Counter())]


def source_of(config: Config, text: str) -> str:
    """What the model is to read where a user gives one text: in conversations it is one user turn."""
    if config.task.fields.messages is not None:
        return to_text(Conversation([{"role": "user", "content": text}], []))[0]
    return config.task.source_of(text)
