"""What every rank knows before the weights are loaded: architecture, tokenizer, tokenized examples."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shardtune.assemble.device_padding import device_padding
from shardtune.assemble.parts import (
    is_chat,
    saved_labels,
)
from shardtune.assemble.positions import check_positions
from shardtune.config import Config
from shardtune.conversations import contents
from shardtune.data.corpus import Corpus
from shardtune.data.publishing import published
from shardtune.data.tables import TokenTable, cache_folder, fingerprint, open_table, write_table
from shardtune.errors import DataError, StorageError
from shardtune.evaluation import Split
from shardtune.examples import Text
from shardtune.model.skeleton import load_architecture, set_dropout
from shardtune.model.tokenizer import fit_config, identity, load_tokenizer, save_tokenizer, train_tokenizer
from shardtune.protocols import Task
from shardtune.task.chat_template import set_template
from shardtune.task.section import Parts
from shardtune.world import World

ENCODED_AT_ONCE = 4096
"""Texts handed to the tokenizer together; it spreads them over the processor's cores."""


@dataclass
class Prepared:
    """What every rank knows before the weights are loaded."""

    architecture: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    labels: list[str]
    tables: dict[str, TokenTable]
    train_counts: list[int]
    """How many training examples are from each source."""
    corpus: Corpus | None
    """What is known of the texts, on the first rank."""


def prepare(config: Config, world: World, corpus: Corpus | None, result: Path | None = None) -> Prepared:
    """Architecture, tokenizer and tokenized examples; what takes long is done once, on the first rank.

    With a `result`'s folder its tokenizer and labels are used, whatever the data would give today.
    """
    trust = config.model.trust_remote_code
    architecture = load_architecture(config.model.path, config.task.head, trust)
    if config.model.dropout is not None:
        set_dropout(architecture, config.model.dropout, config.task.head)
    given = config.model.tokenizer
    newly_trained = given is not None and given.startswith("train:")
    side = config.task.truncation_side
    source = given or config.model.path
    if result is not None:
        source = str(result)
    elif newly_trained:
        source = world.first_does("tokenizer", lambda: _trained_tokenizer(config, corpus))
    tokenizer = load_tokenizer(source, side, trust)
    fit_config(architecture, tokenizer, newly_trained)
    labels: list[str] = []
    if config.task.fields.labels_of is not None:
        known = functools.partial(_labels, corpus, config.task.least_labels)
        labels = saved_labels(result) if result is not None else world.first_does("labels", known)
    config.task.fit(architecture, labels)
    check_positions(config, architecture)
    if is_chat(config.task) and result is None:  # a result's tokenizer has the template
        set_template(tokenizer, getattr(config.task, "template", None))
    fused = config.kernels.fused
    lay_out = device_padding(world.device) if fused == "auto" or "padding" in fused else None
    task = config.task.make(Parts(tokenizer, architecture, config.model.path, labels, lay_out))
    folders = world.first_does("tables", lambda: _tokenize(config, task, tokenizer, labels, corpus))
    counts = world.first_does(
        "sources", lambda: {"train": corpus.train_counts, **corpus.judged_counts} if corpus is not None else {}
    )
    tables = {}
    for name, folder in folders.items():
        table = open_table(Path(folder))
        if table is None:
            raise DataError(f"{folder}: the tokenized {name} split is not there; do all nodes see this folder?")
        table.counts = counts.get(name, ())
        tables[name] = table
    return Prepared(architecture, tokenizer, task, labels, tables, counts["train"], corpus)


def keep_tokenizer(prepared: Prepared, folder: Path) -> None:
    """Writes the tokenizer and the labels, so that the result of any step can be told without the data.

    Raises StorageError.
    """
    try:
        save_tokenizer(prepared.tokenizer, folder)
        if prepared.labels:
            (folder / "labels.json").write_text(json.dumps(prepared.labels, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error


def evaluated_splits(prepared: Prepared, limit: int | None) -> list[Split]:
    """Validation and test, those of them that have examples, and of these the first `limit`; None: all."""
    found = []
    for name in ("validation", "test"):
        table = prepared.tables.get(name)
        if table is not None and len(table):
            texts = prepared.corpus.judged[name] if prepared.corpus is not None else []
            found.append(Split(name, table, min(len(table), limit or len(table)), texts))
    return found


def _trained_tokenizer(config: Config, corpus: Corpus | None) -> str:
    assert corpus is not None
    assert config.model.tokenizer is not None
    pieces = int(config.model.tokenizer.removeprefix("train:"))
    key = fingerprint("tokenizer", 1, corpus.fingerprint, pieces, config.task.head)
    folder = cache_folder() / "tokenizers" / key
    trained = folder / "tokenizer.json"
    if not trained.exists():
        parts = contents if is_chat(config.task) else lambda source, target: [source, target]
        texts = [text for example in corpus.splits().train for text in parts(example.source, example.target)]
        with published(folder, "the tokenizer", trained.exists) as made:
            train_tokenizer(texts, pieces, config.task.head, made)
    return str(folder)


def _labels(corpus: Corpus | None, least: int) -> list[str]:
    assert corpus is not None
    labels = corpus.labels
    if not labels:
        raise DataError("no training example has a label; there is nothing to tell apart")
    if len(labels) < least:
        raise DataError(f"every training example has the label {labels[0]!r}; there is nothing to tell apart")
    return labels


def _tokenize(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, labels: list[str], corpus: Corpus | None
) -> dict[str, str]:
    """Token tables of all splits, from the cache where they are there. Split -> folder."""
    assert corpus is not None
    settings = config.task.model_dump(exclude={"prompt", "template"})
    if is_chat(config.task):  # the template's text, for a file can change under its name; tools are in the sources
        settings["chat_template"] = tokenizer.chat_template
    folders = {}
    tokenizer_identity = identity(tokenizer)  # before tokenizing, which leaves its settings in the tokenizer
    for name in ("validation", "test") if config.data.streaming else ("train", "validation", "test"):
        key = fingerprint("tokens", 1, corpus.fingerprint, name, settings, labels, tokenizer_identity)
        folder = cache_folder() / "tokens" / key
        if open_table(folder) is None:
            texts: list[Text] = getattr(corpus.splits(), name)
            pieces = (texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE))
            write_table(folder, (encoded for piece in pieces for encoded in task.encode(piece)))
        folders[name] = str(folder)
    return folders
