"""Judges a model on a split: its loss, what it writes, and how that scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardtune.data.batching.padded import deal
from shardtune.data.tables import TokenTable
from shardtune.errors import StorageError
from shardtune.metrics import score
from shardtune.protocols import Generation, Strategy, Task, Text
from shardtune.world import World


class Split(NamedTuple):
    """The examples that are judged: the first ones of a split."""

    name: str
    table: TokenTable
    examples: int
    texts: Sequence[Text]
    """As people read them, on the first rank; empty elsewhere."""


class Prediction(NamedTuple):
    """One line of a predictions file."""

    source: str
    reference: str
    prediction: str


class Judged(NamedTuple):
    """What the judgement of a split gave."""

    scores: dict[str, float]
    """The loss and the metrics, on every rank."""
    predictions: list[Prediction]
    """In the split's order, on the first rank; empty elsewhere, and where the task writes none."""


class Evaluator:
    """Spreads a split over all ranks, each example once, whatever their number.

    Every rank makes the same calls in the same order, as sharded models need; the first one scores and writes.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        world: World,
        metrics: Sequence[str],
        max_new_tokens: int,
        beams: int,
        batch_examples: int,
        folder: Path,
        told_to_stop: Callable[[], str | None],
    ) -> None:
        """`folder`: where predictions go, as step-<N>-<split>.jsonl. `told_to_stop`: why this process is to end, if it
        is."""
        self._task = task
        self._strategy = strategy
        self._world = world
        self._metrics = metrics
        self._how = Generation(max_new_tokens, beams, in_step=strategy.in_step)
        self._batch_examples = batch_examples
        self._folder = folder
        self._told_to_stop = told_to_stop

    def run(self, step: int | str, split: Split, advance: Callable[[int], None]) -> Judged | None:
        """Judges the split; the first rank writes the predictions, by the name of `step`.

        `advance` is told how many examples (of all ranks) were judged. None, on every rank: one was told to stop
        meanwhile, and nothing is written.
        """
        table, task = split.table, self._task
        longest_first = np.lexsort((-table.lengths[: split.examples, 1], -table.lengths[: split.examples, 0]))
        mine = deal(longest_first, self._world.size, self._batch_examples)[self._world.rank]
        loss_sum = targets = 0.0
        stopping = False
        written: list[tuple[int, str]] = []
        with self._strategy.evaluating() as model:
            for positions in mine:
                stopping = self._world.sum([float(self._told_to_stop() is not None)])[0] > 0
                if stopping:
                    break
                examples = [table[int(position)] for position in positions]
                batch = task.collate(examples) if examples else task.collate([table[0]]).blank()
                if examples or self._strategy.in_step:
                    loss_sum += float(task.loss_sum(model, batch.to(self._world.device)))
                    targets += batch.targets
                    if task.scores_texts:
                        texts = task.predict(model, examples or [table[0]], self._how)
                        written += zip(positions.tolist(), texts, strict=False)
                advance(len(positions) * self._world.size)
        if stopping:
            return None
        loss_sum, targets = self._world.sum([loss_sum, targets])
        parts = self._world.gather(written)
        predictions = self._predictions(split, dict(pair for part in parts for pair in part))
        return Judged(
            self._world.first_does("scores", lambda: self._scored(step, split, loss_sum / targets, predictions)),
            predictions,
        )

    def _scored(self, step: int | str, split: Split, loss: float, predictions: list[Prediction]) -> dict[str, float]:
        scores = {"loss": loss}
        if "perplexity" in self._metrics:
            scores["perplexity"] = math.exp(min(loss, 700.0))
        if predictions:
            scores |= score(self._metrics, [p.prediction for p in predictions], [p.reference for p in predictions])
            self._write(step, split.name, predictions)
        return scores

    def forget_after(self, step: int) -> None:
        """Removes the predictions of later steps, on the first rank: the run has gone back."""
        for path in self._folder.glob("step-*-*.jsonl"):
            number = path.name.split("-")[1]
            if number.isdecimal() and int(number) > step:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error

    def _predictions(self, split: Split, written: dict[int, str]) -> list[Prediction]:
        return [
            Prediction(text.source, text.target, written[position])
            for position, text in enumerate(split.texts[: split.examples])
            if position in written
        ]

    def _write(self, step: int | str, split: str, predictions: Sequence[Prediction]) -> None:
        path = self._folder / f"step-{step}-{split}.jsonl"
        lines = [json.dumps(prediction._asdict(), ensure_ascii=False) + "\n" for prediction in predictions]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
