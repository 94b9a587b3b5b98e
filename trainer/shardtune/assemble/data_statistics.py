"""data.json: what a run's data is like, written when the run begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardtune.assemble.prepared import Prepared
from shardtune.config import Config
from shardtune.data.splits import NAMES
from shardtune.data.tables import TokenTable
from shardtune.run_folder import write_whole

BINS = 24
"""The most bars of a histogram of lengths."""


def write_data_statistics(folder: Path, config: Config, prepared: Prepared) -> None:
    """Writes data.json to the run's folder, on the first rank. Raises StorageError."""
    text = json.dumps(data_statistics(config, prepared), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "data.json", text)


def data_statistics(config: Config, prepared: Prepared) -> dict[str, Any]:
    """Of each split its examples, lengths in tokens, cut examples, labels and duplicates; how many examples of a split
    stand in another one (`overlap`), and the rows left out by reason (`dropped`: these are in no split). Of training
    data that is streamed only the names of its sources are known."""
    corpus = prepared.corpus
    assert corpus is not None  # the first rank has it
    names = [source.path for source in config.data.sources]
    targets = any(1 in row for row in config.task.rows)
    found: dict[str, Any] = {}
    if config.data.streaming:
        found["train"] = {"streamed": True, "sources": dict.fromkeys(names)}
    for name in NAMES:
        table = prepared.tables.get(name)
        if table is None or not len(table):
            continue
        counts = prepared.train_counts if name == "train" else corpus.judged_counts.get(name, [])
        own = getattr(config.data, name) if name != "train" else None
        sources = {own: len(table)} if own is not None else _added_up(names, counts)
        found[name] = _of_split(table, sources, targets) | {
            "labels": corpus.contents["labels"].get(name, {}),
            "duplicates": corpus.contents["duplicates"][name],
        }
    found["overlap"] = {
        pair: count for pair, count in corpus.contents["overlap"].items() if found.keys() >= set(pair.split("/"))
    }
    if config.data.streaming:  # whose training examples were not read
        found["overlap"] = {pair: count for pair, count in found["overlap"].items() if not pair.startswith("train/")}
    # What a given split shares with train is counted there as a note; here it is in `overlap`.
    found["dropped"] = {what: count for what, count in corpus.dropped.items() if not what.endswith(" also in train")}
    return found


def _added_up(names: list[str], counts: list[int]) -> dict[str, int]:
    """How many examples are from each source; one that is named twice is counted once, with all its examples."""
    found: dict[str, int] = {}
    for name, count in zip(names, counts, strict=False):
        found[name] = found.get(name, 0) + count
    return found


def _of_split(table: TokenTable, sources: dict[str, int], targets: bool) -> dict[str, Any]:
    """`targets`: whether these are tokens, and not the number of a class."""
    found: dict[str, Any] = {"examples": len(table), "sources": sources, "source_tokens": _lengths(table.lengths[:, 0])}
    truncated = {"source": table.source_cut}
    if targets:
        found["target_tokens"] = _lengths(table.lengths[:, 1])
        truncated["target"] = table.target_cut
    return found | {"truncated": truncated}


def _lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """`histogram`: [low, high, count] of each bar, both ends included; bars are alike in width and leave no gap."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    bars = [[low + width * bar, low + width * (bar + 1) - 1, count] for bar, count in enumerate(counts.tolist())]
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "max": high,
        "histogram": bars,
    }
