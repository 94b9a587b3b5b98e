"""Trains several configs in one process group, and reads what they left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import plain
import tiny
from forked import MANY, run_group

LONGEST = 400
"""Seconds that a process group may take."""


def config(folder: Path, name: str, model: Path, task: str, **options: Any) -> Path:
    """A config of 12 examples a step, all of them in each, so that the loss of one step can be compared with another's.

    Its runs are in `folder`/runs; keys of `options` as in `tiny.tiny_config`.
    """
    limits = {"max_source_tokens": plain.SOURCE_LIMIT}
    if task != "classification":
        limits["max_target_tokens"] = plain.TARGET_LIMIT
    given = {
        "name": name,
        "runs": str(folder / "runs"),
        "model__path": str(model),
        "model__weights": "pretrained",
        "model__tokenizer": None,
        "task": {**tiny.TASKS[task], **limits},
        "data__train": str(tiny.write_rows(folder / "train.jsonl", tiny.rows(12, seed=1))),
        "data__validation": str(tiny.write_rows(folder / "validation.jsonl", tiny.rows(7, seed=2))),
        "optimizer__lr": 3e-2,
        "evaluation__examples": 20,
        **options,
    }
    return tiny.tiny_config(folder / "configs" / name, "t5", **given)


def train(folder: Path, configs: Sequence[Path], ranks: int, **variables: str) -> None:
    """Runs them one after the other, with `variables` in their environment; fails with what was said where one does
    not come to its end."""
    said = folder / f"{ranks}-ranks-{configs[0].parent.name}.log"
    variables = {"SHARDTUNE_CACHE": str(folder / f"cache-{ranks}"), **variables}
    run_group([MANY, *configs], ranks, said, variables, LONGEST)
    for path in configs:
        run = folder / "runs" / path.parent.name
        if not (run / "final").is_dir():
            log = run.with_suffix(".log")
            text = log.read_text(encoding="utf-8") if log.exists() else ""
            raise AssertionError(f"{run.name} did not finish\n{text}\n{said.read_text(encoding='utf-8')}"[-6000:])


def train_both(folder: Path, on_one: Sequence[Path], on_two: Sequence[Path]) -> None:
    """Runs those of one rank and those of two, both at the same time."""
    with ThreadPoolExecutor(2) as pool:
        groups = [pool.submit(train, folder, configs, ranks) for ranks, configs in ((1, on_one), (2, on_two))]
    for group in groups:
        group.result()


def metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of the steps, and those of the evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "grad_norm" in line], [line for line in lines if "split" in line]


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")
