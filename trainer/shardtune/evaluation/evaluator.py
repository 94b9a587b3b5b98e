"""Spreads a split over the ranks, and scores what they find."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from shardtune.errors import StorageError
from shardtune.evaluation.judged import AS_IT_IS, SPEEDS, Judged, Prediction, Split, Way
from shardtune.evaluation.results import Results
from shardtune.examples import Text
from shardtune.metrics import Scorer
from shardtune.protocols import Generation, Strategy, Task
from shardtune.world import World

FIRST = 20
"""How many predictions are given back; all are in the file."""


class Evaluator:
    """Judges each example of a split once, in batches that are the same for any number of ranks.

    Every rank makes the same calls in the same order, as sharded models need; the first one scores and writes.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        world: World,
        scorer: Scorer,
        how: Generation,
        batch_examples: int,
        folder: Path,
        told_to_stop: Callable[[], str | None],
    ) -> None:
        """`batch_examples`: of one batch. `folder`: the run's. `told_to_stop`: why this process is to end, if it is."""
        self.task = task
        self._strategy = strategy
        self._world = world
        self._scorer = scorer
        self._how = how
        self._batch_examples = batch_examples
        self._folder = folder
        self._told_to_stop = told_to_stop
        self._said: bool | None = None

    def run(self, name: str, split: Split, advance: Callable[[int], None], way: Way = AS_IT_IS) -> Judged | None:
        """Judges the model on the split. On the first rank predictions/<name>-<split>.jsonl and
        statistics/<name>-<split>.npy are written: of each example its source, reference and prediction, and its row of
        the scorer's statistics.

        `advance` is told how many examples (of all ranks) were judged. None, on every rank: one was told to stop
        meanwhile, and nothing is written.
        """
        task, gathered = way.task or self.task, _Gathered(self, name, split, way.task or self.task)
        batches = in_batches(split.table.lengths[: split.examples], self._batch_examples)
        ranks = self._world.size
        stopping, begun = 0.0, time.perf_counter()
        with self._strategy.evaluating() as whole, way.within(whole) as model:
            how = self._how._replace(in_step=self._strategy.in_step, stop=[*self._how.stop, *way.stop])
            for start in range(0, len(batches), ranks):
                asked = [float(self._told_to_stop() is not None), float(gathered.failure is not None)]
                stopping, failed = self._world.sum(asked)
                if stopping or failed:
                    break
                batch = batches[start + self._world.rank] if start + self._world.rank < len(batches) else None
                if batch is not None:
                    found = self._found(task, model, split, batch, how)
                else:
                    found = _NOTHING
                    if how.in_step:
                        self._found(task, model, split, batches[-1][-1:], how, blank=True)
                gathered.add(self._world.gather(found))
                advance(sum(map(len, batches[start : start + ranks])))
        seconds = time.perf_counter() - begun
        if stopping:
            gathered.results.abandon()
            return None
        return self._judged(gathered, seconds)._replace(notes=self._notes(how.in_step))

    def write(
        self, name: str, split: Split, advance: Callable[[int], None], texts_of: Callable[[Sequence[Text]], list[str]]
    ) -> Judged:
        """Judges, as `run`, texts that no model writes: `texts_of` the examples, called on the first rank."""
        gathered = _Gathered(self, name, split, self.task)
        begun = time.perf_counter()
        if self._world.is_first:
            for start in range(0, split.examples, self._batch_examples):
                positions = range(start, min(start + self._batch_examples, split.examples))
                texts = texts_of([split.texts[position] for position in positions])
                gathered.add([{"positions": list(positions), "losses": None, "texts": texts, "tokens": 0}])
                advance(len(positions))
        return self._judged(gathered, time.perf_counter() - begun)

    def forget_after(self, step: int) -> None:
        """Removes the predictions and the statistics of later steps, on the first rank: the run has gone back."""
        for path in (*self._folder.glob("predictions/step-*-*.jsonl"), *self._folder.glob("statistics/step-*-*.npy")):
            number = path.name.split("-")[1]
            if number.isdecimal() and int(number) > step:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error

    def _found(
        self,
        task: Task,
        model: nn.Module,
        split: Split,
        positions: NDArray[np.int64],
        how: Generation,
        blank: bool = False,
    ) -> dict[str, Any]:
        """What this rank finds of a batch; `blank`: only because others compute, and need this rank for that."""
        examples = [split.table[position]._replace(number=position) for position in positions.tolist()]
        batch = task.collate(examples)
        losses = task.losses(model, (batch.blank() if blank else batch).to(self._world.device)).double().tolist()
        written: list[int] = []
        texts = task.predict(model, examples, how._replace(counts=written.append)) if task.scores_texts else []
        return {
            "positions": positions.tolist(),
            "losses": [[loss, task.targets(example)] for loss, example in zip(losses, examples, strict=True)],
            "texts": texts,
            "tokens": sum(written),
        }

    def _judged(self, gathered: _Gathered, seconds: float) -> Judged:
        found = self._world.first_does("scores", lambda: gathered.finish(seconds))
        return Judged(found["scores"], gathered.results.first(FIRST) if self._world.is_first else [], found["speeds"])

    def _notes(self, in_step: bool) -> list[str]:
        if not self._strategy.evaluates or self._said == in_step:
            return []
        self._said = in_step
        return [f"evaluation: {self._strategy.evaluates}"]


_NOTHING: dict[str, Any] = {"positions": [], "losses": [], "texts": [], "tokens": 0}


class _Gathered:
    """What all ranks have found, on the first one."""

    def __init__(self, evaluator: Evaluator, name: str, split: Split, task: Task) -> None:
        self.results = Results(evaluator._folder, f"{name}-{split.name}", split.examples)
        self.failure: Exception | None = None
        """Raised in `finish`: till then other ranks may wait for this one."""
        self._scorer = evaluator._scorer
        self._texts = split.texts
        self._task = task
        self._examples = split.examples
        self._tokens = 0

    def add(self, parts: Sequence[dict[str, Any]]) -> None:
        """What each rank has found."""
        try:
            for part in parts:
                if part["positions"] and self.failure is None:
                    self._add(**part)
        except Exception as error:  # also of a metric that is not ours
            self.failure = error

    def _add(self, positions: list[int], losses: list[Any] | None, texts: list[str], tokens: int) -> None:
        self._tokens += tokens
        predictions: list[Prediction] = []
        references: list[list[str]] = []
        if texts:
            examples = [self._texts[position] for position in positions]
            written = self._task.as_written(examples, texts)
            references = [self._task.references(text) for text in examples]
            predictions = [
                Prediction(text.source, right[0] if right else "", prediction)
                for text, right, prediction in zip(examples, references, written, strict=True)
            ]
        of_losses = np.array(losses, dtype=np.float64) if losses is not None else None
        statistics = self._scorer.statistics([p.prediction for p in predictions], references, of_losses)
        self.results.add(positions, predictions, statistics)

    def finish(self, seconds: float) -> dict[str, dict[str, float]]:
        """Writes the files, and scores. Raises what went wrong on the way."""
        if self.failure is not None:
            self.results.abandon()
            raise self.failure
        scores = self._scorer.scores(self.results.finish())
        speeds = [self._examples / seconds, *([self._tokens / seconds] if self._tokens else [])]
        return {"scores": scores, "speeds": dict(zip(SPEEDS, speeds, strict=False))}


def in_batches(lengths: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """Positions of examples with these lengths [n, 2], longest sources first, in runs of at most `most`.

    They do not depend on the number of ranks, for what is computed of an example depends, in the last bit, on those
    beside it.
    """
    longest_first = np.lexsort((-lengths[:, 1], -lengths[:, 0]))
    return [longest_first[start : start + most] for start in range(0, len(longest_first), most)]
