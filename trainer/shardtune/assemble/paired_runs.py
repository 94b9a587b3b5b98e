"""`shardtune report` with several runs: their results tested against the first one's, example by example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardtune.assemble.parts import metric_names
from shardtune.comparing import compare
from shardtune.config_file import load_config
from shardtune.errors import ShardtuneError
from shardtune.metrics import Scorer
from shardtune.report.files import RunFiles
from shardtune.report.scores import parts_of
from shardtune.report.several import LETTERS, Pairs, judged_alike
from shardtune.run_folder import TOKENIZER


def paired_runs(runs: Sequence[RunFiles]) -> tuple[Pairs, list[str]]:
    """How each later run compares with the first, in the splits of which both judged the same examples; and, as notes,
    why others could not be tested."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    notes = []
    for index, run in enumerate(runs[1:], 1):
        for split in judged_alike(runs[0], run):
            letter = LETTERS[index]
            try:
                found[index, split] = _paired(runs[0], run, letter, split)
            except (OSError, ValueError, ShardtuneError) as error:
                notes.append(f"{letter} and A cannot be tested on {split}: {error}")
    return found, notes


def _paired(first: RunFiles, other: RunFiles, letter: str, split: str) -> dict[str, Any]:
    """Raises ValueError where their metrics differ, OSError for files that cannot be read, ConfigError for a metric of
    one's own that is not there."""
    kinds = [_measured(run) for run in (first, other)]
    if kinds[0] != kinds[1]:
        raise ValueError("their metrics, or their labels, are not the same")
    parts = [parts_of(run)[split] for run in (first, other)]
    rows = [
        np.load(run.statistics(str(part["tuned"]), split), allow_pickle=False)
        for run, part in zip((first, other), parts, strict=True)
    ]
    metric = parts[0].get("metric")
    scorer = Scorer(*kinds[0])
    return compare(scorer, {"A": rows[0], letter: rows[1]}, letter, "A", metric if metric in scorer.names else None)


def _measured(run: RunFiles) -> tuple[list[str], list[str]]:
    """The run's metrics, and the labels that fix their statistics."""
    config = load_config(run.folder / "config.yaml", [])
    path = run.folder / TOKENIZER / "labels.json"
    return metric_names(config), json.loads(path.read_text("utf-8")) if path.is_file() else []
