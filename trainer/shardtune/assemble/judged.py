"""What a run is judged by, whose weights are its result, and how that compares with what there was before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardtune.assemble.parts import metric_names
from shardtune.assemble.run_again import steps_in
from shardtune.best import Best
from shardtune.boundary import Boundaries
from shardtune.checkpoint.finding import agreed_reasons
from shardtune.checkpoint.names import FOLDER, folder_name
from shardtune.checkpoint.reading import Checkpoint, open_checkpoint
from shardtune.comparing import compare
from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.evaluation import Evaluator, Split
from shardtune.judging import BEST, WATCHED, Judge
from shardtune.metrics import Scorer, lower_is_better
from shardtune.overfitting import Noise, standard_error
from shardtune.progress import Progress
from shardtune.protocols import VALUE, Strategy
from shardtune.records import Records
from shardtune.run_folder import write_whole
from shardtune.state import TrainingState
from shardtune.world import World

STATISTICS = "statistics"
"""The folder of each example's statistics, in the run's folder."""
LOSSES = ("loss", "perplexity")
"""Scores that say less of single examples than those of predictions."""
COMPARISON = "comparison.json"


def make_judge(
    config: Config,
    folder: Path,
    world: World,
    evaluator: Evaluator,
    splits: Sequence[Split],
    records: Records,
    progress: Progress,
    state: TrainingState,
    total_steps: int | None,
) -> Judge:
    """All ranks call it. Raises ConfigError where the best is to be found in a validation without examples."""
    best, wanted = None, config.evaluation
    if wanted.best is not None or wanted.patience is not None:
        if not any(split.name == WATCHED for split in splits):
            key = "best" if wanted.best is not None else "patience"
            raise ConfigError(f"evaluation.{key}: looks at validation, which has no examples here")
        score = wanted.best or "loss"
        best = Best(score, lower_is_better(score), wanted.patience)
    kept = set(world.first_does("checkpoints", lambda: steps_in(folder)))
    return Judge(
        evaluator, splits, records, progress, state, total_steps, wanted.every, best, keeps=wanted.best is not None,
        kept=lambda step: wanted.best is None or step in kept, noise=_noise(folder),
    )  # fmt: skip


def judge_result(
    config: Config,
    folder: Path,
    world: World,
    judge: Judge,
    boundaries: Boundaries,
    strategy: Strategy,
    shapes: Mapping[str, torch.Size],
    state: TrainingState,
    say: Callable[[str], None],
) -> int:
    """Judges after the last step; where the best step is asked for, the model gets its weights and is judged again.
    Returns the step that the weights are of; the arguments are as in `take_best`. Raises Stopped where a rank was told
    to stop meanwhile."""
    if not judge.after_training():
        boundaries.stop()
    if config.evaluation.best is None or judge.best is None:
        return state.step
    boundaries.settle()
    chosen = take_best(judge.best, folder, world, state, strategy, shapes, say)
    if chosen != state.step and not judge.of_best():
        boundaries.stop()
    return chosen


def take_best(
    best: Best,
    folder: Path,
    world: World,
    state: TrainingState,
    strategy: Strategy,
    shapes: Mapping[str, torch.Size],
    say: Callable[[str], None],
) -> int:
    """Gives the model the weights of the best step that can still be had, and returns that; all ranks call it.

    `strategy`: as the loop has it; `shapes`: of the trained parameters. Checkpoints are read whole before one is taken;
    what is wrong with a better one is said. Where the best is the last step, nothing is done.
    """
    for step in best.ranked():
        if step == state.step:
            return step
        path = folder / FOLDER / folder_name(step)
        if world.first_does("best checkpoint", path.is_dir):
            reasons = agreed_reasons(path, world)
        else:
            reasons = [f"{path}: is not there any more"]
        if not reasons:
            take(open_checkpoint(path), strategy, shapes)
            say(f"step {step:,} is the best by {best.score} of validation: {folder / 'final'} gets its weights")
            return step
        say(
            f"warning: step {step:,} is the best by {best.score}, but the next best is taken:\n  "
            + "\n  ".join(reasons)
        )
    return state.step


def take(saved: Checkpoint, strategy: Strategy, shapes: Mapping[str, torch.Size]) -> None:
    """Gives a model that is being trained the weights of a checkpoint of the same run, and what its optimizer kept: of
    some optimizers the weights to evaluate follow from both. Raises CheckpointError."""
    for name, shape in shapes.items():
        strategy.overwrite(name, saved.read(name, VALUE, 0, shape.numel()).float().view(shape))
    strategy.restore(saved)


def write_comparison(
    config: Config, folder: Path, judge: Judge, splits: Sequence[Split], labels: Sequence[str], chosen: int, last: int
) -> dict[str, Any]:
    """Compares what was judged, on the first rank, writes comparison.json and returns what it says.

    `chosen`: the step that the result is of. Raises StorageError.
    """
    main = config.evaluation.best if config.evaluation.best not in LOSSES else None
    scorer, found = Scorer(metric_names(config), labels), {}
    for split in splits:
        base, tuned = sides(judge, split.name, chosen, last)
        statistics = _statistics(folder, split.name, [*judge.contended[split.name], *_steps(judge, split.name)])
        if tuned not in statistics:
            continue
        columns = statistics[tuned].shape
        statistics = {name: rows for name, rows in statistics.items() if rows.shape == columns}
        fields = {
            field: [text.beside[index] for text in split.texts[: split.examples]]
            for index, field in enumerate(config.evaluation.slices)
        }
        lengths = split.table.lengths[: split.examples, 0].tolist()
        found[split.name] = {
            **compare(
                scorer, statistics, tuned, base if base in statistics else None, main,
                lengths=lengths, fields=fields, seed=config.seed,
            ),
            "step": chosen,
            "last": last,
        }  # fmt: skip
    write_whole(folder / COMPARISON, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return found


def sides(judge: Judge, split: str, chosen: int, last: int) -> tuple[str | None, str]:
    """The names of what was there before and of what became of it: the result; of a run without training, whose result
    is what was there before, the base with the most examples in its prompt."""
    contended, steps = judge.contended[split], [step for step, _ in judge.history[split]]
    base = "base" if "base" in contended else "step-0" if 0 in steps else None
    if last == 0:
        shots = sorted((name for name in contended if name.startswith("shots-")), key=lambda name: int(name[6:]))
        if shots:
            return base, shots[-1]
        return (base if base == "base" else None), "step-0"
    return base, f"step-{chosen}" if chosen in steps else BEST


def _steps(judge: Judge, split: str) -> list[str]:
    return [f"step-{step}" for step, _ in judge.history[split]]


def _statistics(folder: Path, split: str, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Those that are there."""
    found = {}
    for name in names:
        rows = _read(folder / STATISTICS / f"{name}-{split}.npy")
        if rows is not None:
            found[name] = rows
    return found


def _noise(folder: Path) -> Noise:
    def noise(first: int, second: int) -> float | None:
        rows = [_read(folder / STATISTICS / f"step-{step}-{WATCHED}.npy") for step in (first, second)]
        if rows[0] is None or rows[1] is None or rows[0].shape != rows[1].shape:
            return None
        return standard_error(rows[0], rows[1])

    return noise


def _read(path: Path) -> NDArray[np.float64] | None:
    """None where nothing is there that can be read: an earlier part of the run may have been judged otherwise."""
    try:
        return np.load(path)
    except (OSError, ValueError):
        return None
