"""Several tasks in one run, for models that are told which one each example is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from shardtune.examples import Batch, Encoded, Text, Tokens
from shardtune.protocols import Generation, Task


class Multitask:
    """Implements the Task protocol: another one, whose model also takes `task_ids` [b], int64, in every call."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.scores_texts = task.scores_texts

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """As without."""
        return self._task.encode(texts)

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """As without, and which task each row is of."""
        batch = self._task.collate(examples, packed)
        return replace(batch, inputs={**batch.inputs, "task_ids": _tasks(examples)})

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """As without."""
        return self._task.loss_sum(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """As without."""
        return self._task.losses(model, batch)

    def targets(self, example: Tokens) -> int:
        """As without."""
        return self._task.targets(example)

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """As without."""
        return self._task.as_written(texts, predictions)

    def references(self, text: Text) -> list[str]:
        """As without."""
        return self._task.references(text)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """As without."""
        return self._task.predict(cast(nn.Module, _Told(model, _tasks(examples))), examples, how)


def of_one(task: Task) -> Task:
    """The task for a model that is not told which of several an example is of."""
    return task._task if isinstance(task, Multitask) else task


def _tasks(examples: Sequence[Tokens]) -> Tensor:
    return torch.tensor([example.origin for example in examples])


class _Told:
    """A model that is told the tasks [b] of the rows that it is called on."""

    def __init__(self, model: Any, tasks: Tensor) -> None:
        self._model = model
        self._tasks = tasks

    def __call__(self, **inputs: Any) -> Any:
        return self._model(task_ids=self._tasks, **inputs)

    def generate(self, **inputs: Any) -> Any:
        return self._model.generate(task_ids=self._tasks.to(inputs["input_ids"].device), **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
