"""The training loop: what one optimizer step is, on one page."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
import torch

from shardtune.data.steps import Step, StepSource
from shardtune.errors import DataError, NumbersError
from shardtune.protocols import Strategy, Task
from shardtune.state import TrainingState
from shardtune.world import World


class StepReport(NamedTuple):
    """What one step was, over all ranks."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    padding_share: float
    seconds: float
    data_seconds: float


class Boundary(Protocol):
    """What the ranks agree on between two steps: whether to save, to stop, to go on."""

    def asks(self, failure: DataError | None) -> list[float]:
        """What this rank asks for; `failure`: why it has no data for the next step. The loop sums it over ranks."""
        ...

    def agreed(self, asked: list[float]) -> bool:
        """Acts on the sums, on every rank alike. False: no further step. Raises ShardtuneError to end the run."""
        ...


class Telling(Protocol):
    """What each rank tells of itself with every step; the loop only carries it."""

    def forward(self) -> AbstractContextManager[None]:
        """Surrounds the forward pass of a micro-batch."""
        ...

    def own(self, waited: float) -> list[float]:
        """What this rank tells, after it has waited so many seconds for data. The loop sums it over ranks."""
        ...

    def told(self, sums: list[float]) -> None:
        """Takes the sums, on every rank."""
        ...


def train(
    state: TrainingState,
    total_steps: int,
    steps: StepSource,
    task: Task,
    strategy: Strategy,
    world: World,
    learning_rate: Callable[[TrainingState], float],
    clip_scale: Callable[[float], float],
    boundary: Boundary,
    telling: Telling,
    after_step: Callable[[StepReport], None],
) -> None:
    """Trains from `state` to `total_steps` optimizer steps; `after_step` logs and evaluates when that is due.

    A step's loss is the sum over all its targets, on all ranks and in all micro-batches, divided by their number;
    they are counted before the backward pass, so that gradients do not depend on the layout.
    Raises NumbersError before a step whose loss or gradient is not finite, and what `boundary` raises.
    """
    earlier, started = state.seconds, time.perf_counter()
    while state.step < total_steps:
        begun = time.perf_counter()
        step, failure = _next(steps, state)
        counts = [[float(b.targets), float(b.tokens), float(b.slots)] for b in step.micro_batches]
        waited = time.perf_counter() - begun
        clock = earlier + begun - started if world.is_first else 0.0
        own = [sum(column) for column in zip([0.0, 0.0, 0.0], *counts, strict=True)]
        told = telling.own(waited)
        targets, tokens, slots, state.seconds, *rest = world.sum([*own, clock, *told, *boundary.asks(failure)])
        telling.told(rest[: len(told)])
        if not boundary.agreed(rest[len(told) :]):
            return

        loss_sum = torch.zeros((), device=world.device)
        for index, micro_batch in enumerate(step.micro_batches):
            with telling.forward(), strategy.forward(last=index == len(step.micro_batches) - 1):
                loss = task.loss_sum(strategy.model, micro_batch.to(world.device)) / max(targets, 1.0)
            strategy.backward(loss)
            loss_sum += loss.detach()

        loss, grad_norm = world.sum([float(loss_sum)])[0], strategy.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NumbersError(
                f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite; the step was not taken. "
                f"Its examples are rows {', '.join(map(str, step.examples[:16]))}{' …' * (len(step.examples) > 16)} "
                "of the training data; a lower optimizer.lr may help, or model.dtype=float32 if it is another"
            )
        lr = learning_rate(state)
        strategy.step(lr, clip_scale(grad_norm))

        state.step += 1
        state.cursor += len(step.examples)
        if step.ends_epoch:
            state.epoch, state.cursor = state.epoch + 1, 0
        state.examples += len(step.examples)
        state.tokens += int(tokens)
        state.target_tokens += int(targets)
        state.digest = _chained(state.digest, step)
        state.recent_loss, state.recent_steps = state.recent_loss + loss, state.recent_steps + 1
        seconds = time.perf_counter() - begun
        after_step(StepReport(loss, grad_norm, lr, int(tokens), 1 - tokens / slots, seconds, waited))


def _next(steps: StepSource, state: TrainingState) -> tuple[Step, DataError | None]:
    """A step of nothing where there is no data for it: other ranks must learn that before they compute."""
    try:
        return steps.at(state.epoch, state.cursor), None
    except DataError as error:
        return Step(np.zeros(0, np.int64), [], False), error


def _chained(digest: int, step: Step) -> int:
    """The first 48 bits of the SHA-256 of the digest so far and the step's examples: a number that JSON keeps."""
    content = digest.to_bytes(8, "little") + step.examples.astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "little")
