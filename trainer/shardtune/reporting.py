"""What a run says while it goes: metrics.jsonl, trackers, progress, and the table of before and after."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from shardtune.errors import StorageError
from shardtune.evaluation import Evaluator, Prediction, Split
from shardtune.loop import StepReport
from shardtune.progress import Progress
from shardtune.state import TrainingState
from shardtune.text_table import table
from shardtune.tracking import MetricsFile, TensorBoardTracker, Tracker
from shardtune.world import World

SHOWN_PREDICTIONS = 5
"""How many predictions of a split go to the trackers as text."""


class Reporter:
    """Writes on the first rank and is silent on the others."""

    def __init__(
        self,
        folder: Path,
        world: World,
        state: TrainingState,
        total_steps: int | None,
        examples_of: Callable[[int], int | None],
        every: int,
        evaluate_every: int,
        tensorboard: bool,
        evaluator: Evaluator,
        splits: Sequence[Split],
        settings: dict[str, object],
        limit: float | None = None,
        goes_on: bool = False,
    ) -> None:
        """`total_steps`: None where the run ends after `limit` seconds. `examples_of`: how many examples an epoch
        visits, by its number, or None where that is not known before. `every`: steps between training lines;
        `evaluate_every`: between evaluations of the first split. `goes_on`: the figures of an earlier part of the run
        stay, as far as `state`; all ranks then wait for the first."""
        self._world = world
        self._state = state
        self._total_steps = total_steps
        self._examples_of = examples_of
        self._every = every
        self._evaluate_every = evaluate_every
        self._evaluator = evaluator
        self._splits = splits
        self._trackers: list[Tracker] = []
        self._metrics_file: MetricsFile | None = None
        self._history: dict[str, list[tuple[int, dict[str, float]]]] = {split.name: [] for split in splits}
        self._judged_at = {split.name: -1 for split in splits}
        self._since: list[StepReport] = []
        self.progress = Progress(total_steps, state.step, world.is_first, every, limit=limit)
        after = state.step if goes_on else None
        if world.is_first and not goes_on:
            self._metrics_file = MetricsFile(folder / "metrics.jsonl")
        if goes_on:
            self._take_up(world.first_does("metrics", lambda: self._cut_back(folder / "metrics.jsonl")))
        if world.is_first:
            if tensorboard:
                self._trackers.append(TensorBoardTracker(folder / "tensorboard", after))
            for tracker in self._trackers:
                tracker.start(settings)

    def _cut_back(self, path: Path) -> list[dict[str, Any]]:
        """Opens the metrics of an earlier part of the run; returns its evaluations."""
        self._evaluator.forget_after(self._state.step)
        self._metrics_file = MetricsFile(path, self._state.step)
        return [line for line in self._metrics_file.kept if line.get("split") in self._history]

    def _take_up(self, evaluations: Sequence[dict[str, Any]]) -> None:
        """What was judged before the run was interrupted; the same on every rank."""
        for line in evaluations:
            scores = {key: value for key, value in line.items() if key not in ("step", "split")}
            self._history[line["split"]].append((line["step"], scores))
            self._judged_at[line["split"]] = line["step"]

    def after_step(self, report: StepReport) -> None:
        """Logs and evaluates where that is due."""
        state = self._state
        self._since.append(report)
        tokens_per_second = sum(r.tokens for r in self._since) / sum(r.seconds for r in self._since)
        if state.step in (1, self._total_steps) or state.step % self._every == 0:
            self._log()
        # The state's seconds are those at which the step began.
        ended = state.seconds + report.seconds
        self.progress.step(state.step, report.loss, report.lr, tokens_per_second, ended)
        self.evaluate_where_due()

    def evaluate_where_due(self) -> None:
        """On the way: after a step, and where a run begins whose evaluation of that step was cut off; all ranks call
        it."""
        step = self._state.step
        if step > 0 and step % self._evaluate_every == 0 and step != self._total_steps:
            self.evaluate([split for split in self._splits if split.name == "validation"])

    def after_training(self) -> bool:
        """Logs the last step, where that was not known for the last, and evaluates; returns what `evaluate` does."""
        if self._since:
            self._log()
        self.progress.say_last()
        return self.evaluate()

    def _log(self) -> None:
        """A line of the last step, with the means of the steps since the line before."""
        since, self._since = self._since, []
        if self._metrics_file is None:
            return
        state, report, seconds = self._state, since[-1], sum(r.seconds for r in since)
        line = {
            "step": state.step,
            "epoch": round(state.epochs(self._examples_of(state.epoch)), 6),
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "examples": state.examples,
            "tokens": state.tokens,
            "target_tokens": state.target_tokens,
            "examples_digest": state.digest,
            "padding_share": report.padding_share,
            "step_seconds": seconds / len(since),
            "data_seconds": sum(r.data_seconds for r in since) / len(since),
            "tokens_per_second": sum(r.tokens for r in since) / seconds,
            "peak_memory_bytes": peak_memory_bytes(self._world.device),
        }
        self._metrics_file.write(line)
        for tracker in self._trackers:
            figures = {key: value for key, value in line.items() if key not in ("step", "examples_digest")}
            tracker.scalars(state.step, {f"train/{key}": value for key, value in figures.items()})

    def evaluate(self, splits: Sequence[Split] | None = None) -> bool:
        """Judges the splits (all by default) at the present step, unless that was done; all ranks call it. False: a
        rank was told to stop meanwhile, so that not all of them were judged."""
        for split in self._splits if splits is None else splits:
            if self._judged_at[split.name] == self._state.step:
                continue
            with self.progress.evaluating(split.name, split.examples) as advance:
                judged = self._evaluator.run(self._state.step, split, advance)
            if judged is None:
                self.progress.say(f"{split.name} at step {self._state.step} left out: the run was told to stop")
                return False
            self._judged_at[split.name] = self._state.step
            scores, predictions = judged
            if self._metrics_file is None:
                continue
            self._metrics_file.write({"step": self._state.step, "split": split.name, **scores})
            self._history[split.name].append((self._state.step, scores))
            shown = [_as_text(prediction) for prediction in predictions[:SHOWN_PREDICTIONS]]
            for tracker in self._trackers:
                tracker.scalars(self._state.step, {f"{split.name}/{key}": value for key, value in scores.items()})
                tracker.texts(self._state.step, f"{split.name}/predictions", shown)
            figures = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
            self.progress.say(f"{split.name} at step {self._state.step}  {figures}")
        return True

    def before_and_after(self) -> str:
        """A table of the first and the last evaluation of every split."""
        rows = []
        for name, history in self._history.items():
            if not history:
                continue
            first, last = history[0], history[-1]
            before = first[1] if first[0] == 0 and len(history) > 1 else {}
            for key, value in last[1].items():
                rows.append([name, key, f"{before[key]:.4f}" if key in before else "-", f"{value:.4f}"])
        return table(rows, ["split", "metric", "before", "after"]) if rows else ""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes; after an error, it is that one which is to be said, not one that comes of it."""
        with suppress(StorageError) if error is not None else nullcontext():
            self.close()

    def close(self) -> None:
        """Ends the bar and writes out what trackers hold."""
        self.progress.close()
        try:
            for tracker in self._trackers:
                tracker.close()
        finally:
            if self._metrics_file is not None:
                self._metrics_file.close()


def _as_text(prediction: Prediction) -> str:
    return f"**prediction** {prediction.prediction}\n\n**reference** {prediction.reference}\n\n{prediction.source}"


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated on the device; on a CPU the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
