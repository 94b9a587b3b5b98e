"""What a run needs of its texts, remembered from an earlier reading of the same files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from shardtune.data.contents import contents
from shardtune.data.publishing import published
from shardtune.data.splits import NAMES, LabelsOf, Splits, labels_in
from shardtune.data.tables import cache_folder
from shardtune.errors import DataError
from shardtune.examples import Text

VERSION = 5
"""Of what is remembered, and of how texts are read: a change of either needs another number."""
JUDGED = ("validation", "test")


class Corpus:
    """The examples of a run; its texts are read only where they are asked for."""

    def __init__(self, facts: dict[str, Any], judged: dict[str, list[Text]], read: Callable[[], Splits]) -> None:
        self.fingerprint: str = facts["fingerprint"]
        """As in Splits."""
        self.train_fingerprint: str = facts["train_fingerprint"]
        """As in Splits."""
        self.train_counts: list[int] = facts["train_counts"]
        """As in Splits."""
        self.judged_counts: dict[str, list[int]] = facts["judged_counts"]
        """As in Splits."""
        self.dropped: dict[str, int] = facts["dropped"]
        """As in Splits."""
        self.labels: list[str] = facts["labels"]
        """The labels of the training examples, sorted; empty where targets are no labels."""
        self.contents: dict[str, Any] = facts["contents"]
        """Duplicates, overlap and labels of the splits, as in `contents.contents`."""
        self.judged = judged
        """The first examples of validation and test, as people read them."""
        self._read = read
        self._splits: Splits | None = None

    def splits(self) -> Splits:
        """All texts. Raises DataError where they are no longer what is remembered."""
        if self._splits is not None:
            return self._splits
        splits = self._read()
        if splits.fingerprint != self.fingerprint:
            raise DataError(
                "the data has changed, but its files have the size and the time of change that they had; "
                "`touch` them, so that they are read again"
            )
        self._splits = splits
        return splits


def load_corpus(
    key: Callable[[], str | None], read: Callable[[], Splits], labels_of: LabelsOf | None, judged: int | None
) -> Corpus:
    """The corpus remembered under `key`, or else what `read` gives, which is remembered.

    `key` stands for files and settings; None: nothing is remembered. `labels_of`: the labels that a target names.
    `judged`: how many examples of validation and test are wanted; None: all. Raises what `read` raises, and
    StorageError where the cache cannot be written.
    """
    before = key()
    folder = cache_folder() / "texts" / str(before)
    if before is not None and (found := _load(folder, read, judged)) is not None:
        return found
    splits = read()
    facts = {
        "version": VERSION,
        "fingerprint": splits.fingerprint,
        "train_fingerprint": splits.train_fingerprint,
        "train_counts": splits.train_counts,
        "judged_counts": splits.judged_counts,
        "dropped": splits.dropped,
        "labels": sorted(labels_in(splits.train, labels_of)) if labels_of is not None else [],
        "contents": contents({name: getattr(splits, name) for name in NAMES}, labels_of),
    }
    if before is not None and key() == before:  # else a file has changed meanwhile
        _store(folder, facts, splits)
    return Corpus(facts, {name: getattr(splits, name)[:judged] for name in JUDGED}, lambda: splits)


def _load(folder: Path, read: Callable[[], Splits], judged: int | None) -> Corpus | None:
    """None where nothing is remembered, or the files are damaged, as far as they are read; `judged` None: whole."""
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        if facts["version"] != VERSION:
            return None
        texts = {}
        for name in JUDGED:
            with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
                texts[name] = [_text(line) for line in islice(file, judged)]
        return Corpus(facts, texts, read)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _text(line: str) -> Text:
    place, source, target, beside = json.loads(line)
    return Text(place, source, target, tuple(beside))


def _store(folder: Path, facts: dict[str, Any], splits: Splits) -> None:
    with published(folder, "the cache", lambda: _load(folder, lambda: splits, None) is not None) as texts:
        for name in JUDGED:
            _write_lines(texts / f"{name}.jsonl", getattr(splits, name))
        (texts / "facts.json").write_text(json.dumps(facts), "utf-8")


def _write_lines(path: Path, texts: Iterable[Text]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
