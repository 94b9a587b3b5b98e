"""`shardtune prepare`: the data read, checked and tokenized before a run, and what it is like."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from shardtune.assemble.parts import BATCHINGS, make_budget
from shardtune.assemble.prepared import Prepared, prepare
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.steps import describe_sources, make_order
from shardtune.config import Config
from shardtune.data.corpus import Corpus
from shardtune.data.tables import cache_folder
from shardtune.errors import ConfigError
from shardtune.protocols import Batching
from shardtune.text_table import table
from shardtune.world import World

SAMPLED_STEPS = 50
"""Steps at the start of the first epoch, of which padding is told."""


def prepare_data(config: Config, corpus: Corpus, ranks: int) -> str:
    """Fills the cache for runs of this config, and describes the data and how `ranks` ranks would pad it.

    Neither weights nor other processes are needed. Raises ConfigError for a stream, which is not kept.
    """
    if config.data.streaming:
        raise ConfigError("data.streaming: a stream is tokenized while it is trained on; there is nothing to prepare")
    with quiet_libraries():
        prepared = prepare(config, World(0, 1, 0, torch.device("cpu")), corpus)
    columns = ["split", "examples", "tokens", "of", "median", "90%", "99%", "longest", "cut"]
    dropped = [f"left out or noted: {count:,} {reason}" for reason, count in corpus.dropped.items()]
    padding = [[name, f"{share:.1%}"] for name, share in _padding(config, prepared, ranks)]
    steps = f"the first {SAMPLED_STEPS} steps on {ranks} rank{'s' * (ranks > 1)}"
    return "\n".join([
        table(list(_lengths(config, prepared)), columns),
        *describe_sources(config, prepared.tables["train"], prepared.train_counts),
        *dropped,
        "",
        table(padding, ["data.batching", f"padding in {steps}"]),
        "",
        f"the tokens are in {cache_folder() / 'tokens'}; runs with this data and these settings begin with them",
    ])  # fmt: skip


def _lengths(config: Config, prepared: Prepared) -> Iterator[list[str]]:
    """A row for sources and one for targets of each split."""
    for name, tokens in prepared.tables.items():
        columns = [("source", tokens.source_cut), ("target", tokens.target_cut)]
        for column, (what, cut) in enumerate(columns[: 1 + any(1 in row for row in config.task.rows)]):
            lengths = tokens.lengths[:, column]
            if len(lengths):
                points = [f"{round(point):,}" for point in np.percentile(lengths, [50, 90, 99, 100])]
                yield [name, f"{len(lengths):,}", f"{int(lengths.sum()):,}", what, *points, f"{cut:,}"]


def _padding(config: Config, prepared: Prepared, ranks: int) -> Iterator[tuple[str, float]]:
    """The share of computed positions that hold no token, by the way of batching."""
    tokens = prepared.tables["train"]
    order = make_order(config, tokens, prepared.train_counts)
    steps, cursor = [], 0
    while cursor < order.examples and len(steps) < SAMPLED_STEPS:
        steps.append(tokens.lengths[order.take(0, cursor)])
        cursor += len(steps[-1])
    used = sum(int(_rows(config, lengths).sum()) for lengths in steps)
    for name, batching in BATCHINGS.items():
        if name == "packed" and not config.task.packs:
            continue
        yield name, 1 - used / sum(_slots(config, lengths, batching(), ranks) for lengths in steps)


def _rows(config: Config, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, rows]: the lengths of what is padded on its own: source and target, both in one row, or the source alone."""
    return np.stack([lengths[:, list(row)].sum(axis=1) for row in config.task.rows], axis=1)


def _slots(config: Config, lengths: NDArray[np.int64], batching: Batching, ranks: int) -> int:
    """Positions that all ranks compute on in a step."""
    rows = _rows(config, lengths)
    layout = batching.layout(lengths, ranks, make_budget(config.batch))
    parts = [rows[positions if len(positions) else [0]] for rank in layout for positions in rank]
    return sum(int(part.sum()) if batching.packed else len(part) * int(part.max(axis=0).sum()) for part in parts)
