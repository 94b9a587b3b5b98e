"""The steps that a run goes through: which examples, in which order, how they reach the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from shardtune.assemble.parts import BATCHINGS, make_budget
from shardtune.config import Config
from shardtune.data.order import Order, TokenLimit
from shardtune.data.steps import Steps, StepSource
from shardtune.data.tables import TokenTable
from shardtune.protocols import Task
from shardtune.world import World


class Course(NamedTuple):
    """What a run goes through."""

    steps: StepSource
    total_steps: int
    examples_of: Callable[[int], int | None]
    """How many examples an epoch visits, by its number; None where that is not known before."""


def make_course(config: Config, world: World, task: Task, table: TokenTable) -> Course:
    """The steps over a table of examples."""
    batch = config.batch
    per_step = batch.examples or TokenLimit(batch.tokens or 1, table.lengths.sum(axis=1))
    order = Order(len(table), per_step, config.seed, config.data.shuffle)
    total_steps = config.duration.steps
    if total_steps is None:
        total_steps = order.total_steps(config.duration.epochs or 1)
    batching = BATCHINGS[config.data.batching]()
    steps = Steps(table, order, batching, task.collate, world.rank, world.size, make_budget(batch))
    return Course(steps, total_steps, order.examples_of)
