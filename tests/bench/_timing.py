"""What a peer's process notes of each optimizer step. Imports nothing of shardtune: peers have environments of their
own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

IGNORED = -100


class Notes(TrainerCallback):
    """The time of each step's end, and the tokens of the micro-batches that were collated, in order."""

    def __init__(self, path: Path, collate: Callable[[list[Any]], Any], micro_batches: int, one_sequence: bool) -> None:
        """`collate` is the peer's own; `one_sequence`: the labels lie in the places of the inputs (decoders)."""
        self._path = path
        self._collate = collate
        self._micro_batches = micro_batches
        self._one_sequence = one_sequence
        self._times: list[float] = []
        self._batches: list[tuple[int, int]] = []

    def collate(self, features: list[Any]) -> Any:
        """The peer's collation, its real and computed positions noted."""
        batch = self._collate(features)
        slots = batch["input_ids"].numel()
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else slots
        if not self._one_sequence:
            slots += batch["labels"].numel()
            tokens += int((batch["labels"] != IGNORED).sum())
        self._batches.append((tokens, slots))
        return batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes a list of steps, with what this rank computed."""
        steps = []
        for step in range(len(self._times) - 1):
            batches = self._batches[step * self._micro_batches : (step + 1) * self._micro_batches]
            tokens, slots = (sum(column) for column in zip(*batches, strict=True))
            steps.append({"tokens": tokens, "slots": slots, "seconds": self._times[step + 1] - self._times[step]})
        self._path.write_text(json.dumps(steps), encoding="utf-8")


def some_of(order: list[int], per_step: int, groups: int, steps: int) -> list[int]:
    """The examples of the first `steps` steps out of an epoch's order.

    Length grouping sorts the first `groups` steps from long to short: steps spread evenly over them stand for all.
    """
    chosen: list[int] = []
    for step in range(steps):
        first = int((step + 0.5) * groups / steps) * per_step
        chosen += order[first : first + per_step]
    return chosen
