"""Runs the same steps under several layouts and compares them: the proof that a layout changes nothing.

Imports no torch: the layouts run in processes of their own, all those of one rank count in one process group.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from shardtune.assemble.earlier import take_over
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.conflicts import conflicts
from shardtune.errors import ConfigError, NumbersError
from shardtune.spawn import spawn
from shardtune.text_table import table


class Layout(NamedTuple):
    """How the examples of a step are spread."""

    ranks: int
    strategy: str
    batching: str
    micro_batches: int | None
    """Of each rank and step; None: every example is one."""

    @property
    def name(self) -> str:
        """Fit for a folder, and unique."""
        return f"{self.ranks}-{self.strategy}-{self.batching}-{self.micro_batches or 'each'}"


class Difference(NamedTuple):
    """The largest relative difference of a layout to the first one, over all steps."""

    loss: float
    grad_norm: float


def layouts(
    ranks: Sequence[int], strategies: Sequence[str], batchings: Sequence[str], micro_batches: Sequence[int | None]
) -> list[Layout]:
    """All combinations that can work, by rank count."""
    return [
        Layout(*chosen)
        for chosen in dict.fromkeys(product(sorted(ranks), strategies, batchings, micro_batches))
        if chosen[0] == 1 or chosen[1] != "single"
    ]


def verify(
    config: Config, chosen: Sequence[Layout], steps: int, tolerance: float, folder: Path, say: Callable[[str], None]
) -> str:
    """Trains `steps` steps under every layout, in float32 and without dropout; runs and logs go to `folder`.

    Returns a table of the largest relative differences of loss and gradient norm to the first layout, step by step.
    Raises ConfigError for a layout that the config does not allow, NumbersError with the same table where a difference
    is above `tolerance`, and the error of a run that fails.
    """
    config = take_over(config)
    written = {layout: _write(config, layout, steps, folder) for layout in chosen}
    for ranks in dict.fromkeys(layout.ranks for layout in chosen):
        files = [file for layout, file in written.items() if layout.ranks == ranks]
        say(f"{len(files)} layout{'s' * (len(files) > 1)} on {ranks} rank{'s' * (ranks > 1)}")
        code = spawn([sys.executable, "-m", "shardtune.assemble.many", *map(str, files)], ranks, 1, 0, None)
        if code:
            unfinished = [layout.name for layout in chosen if not (folder / "runs" / layout.name / "final").is_dir()]
            failed = f"layout {unfinished[0]} failed" if unfinished else "the ranks failed after the last layout"
            raise _Failed(code, f"{failed}; {len(chosen) - len(unfinished)} layouts came to their end")
    courses = {layout: list(_course(folder / "runs" / layout.name)) for layout in chosen}
    differences = {layout: compare(courses[layout], courses[chosen[0]]) for layout in chosen}
    worst = Difference(*(max(column) for column in zip(*differences.values(), strict=True)))
    words = (
        f"{_table(differences)}\nlargest relative difference over {len(chosen)} layouts and {steps} steps: "
        f"loss {worst.loss:.1e}, gradient norm {worst.grad_norm:.1e}"
    )
    if max(worst) > tolerance:
        raise NumbersError(f"{words}\nthat is above {tolerance:g}")
    return words


class _Failed(NumbersError):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


def compare(course: Sequence[Difference], reference: Sequence[Difference]) -> Difference:
    """The largest relative differences of losses and of gradient norms, step by step."""
    pairs = list(zip(course, reference, strict=True))
    loss, norm = (
        max(abs(mine[index] - first[index]) / max(abs(first[index]), 1e-30) for mine, first in pairs)
        for index in (0, 1)
    )
    return Difference(loss, norm)


def _course(run: Path) -> Iterator[Difference]:
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        if "grad_norm" in step:
            yield Difference(step["loss"], step["grad_norm"])


def _table(differences: Mapping[Layout, Difference]) -> str:
    rows = [
        [str(at.ranks), at.strategy, at.batching, str(at.micro_batches or "each"), f"{far.loss:.1e}",
         f"{far.grad_norm:.1e}"]
        for at, far in differences.items()
    ]  # fmt: skip
    return table(rows, ["ranks", "strategy", "batching", "micro-batches", "loss", "gradient norm"])


def _write(config: Config, layout: Layout, steps: int, folder: Path) -> Path:
    """The layout's config file."""
    batch: dict[str, Any] = {"examples": config.batch.examples, "tokens": config.batch.tokens}
    if layout.micro_batches is None or config.batch.examples is None:
        batch |= {"micro_examples": 1, "micro_tokens": None}
        if layout.micro_batches is not None and config.batch.tokens is not None:
            share = -(-config.batch.tokens // (layout.ranks * layout.micro_batches))
            batch |= {"micro_examples": None, "micro_tokens": share}
    else:
        share = -(-config.batch.examples // (layout.ranks * layout.micro_batches))
        batch |= {"micro_examples": share, "micro_tokens": None}
    given = config.model.attention  # flash attention computes in 16 bits only
    attention = "sdpa" if given == "flash_attention_2" else given
    changes: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32", "dropout": 0.0, "attention": attention},
        "data": {"batching": layout.batching},
        "batch": batch,
        "tuning": {"dropout": 0.0} if hasattr(config.tuning, "dropout") else {},
        "strategy": {"kind": layout.strategy},
        "duration": {"epochs": None, "steps": steps},
        "checkpoint": {"resume": "never"},
        "evaluation": {"baseline": False, "every": steps + 1, "examples": 1, "max_new_tokens": 1},
        "tracking": {"tensorboard": False, "every": 1},
    }
    values = config.model_dump(mode="json")
    for section, keys in changes.items():
        values[section] |= keys
    values |= {"name": layout.name, "runs": str(folder / "runs")}
    changed = Config.model_validate(values)
    for key, problem in conflicts(changed):
        raise ConfigError(f"command line: layout {layout.name} cannot be: {key}: {problem}")
    path = folder / f"{layout.name}.yaml"
    path.write_text(dump_config(changed), encoding="utf-8")
    return path
