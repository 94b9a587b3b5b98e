"""The steps that a run goes through: which examples, in which order, how they reach the ranks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from shardtune.assemble.data import fields_of, make_mixture
from shardtune.assemble.parts import BATCHINGS, make_budget
from shardtune.assemble.prepared import Prepared
from shardtune.config import Config, SourceConfig
from shardtune.data.order import Order, Portion, TokenLimit
from shardtune.data.prefetch import Prefetch
from shardtune.data.steps import Layout, Steps, StepSource
from shardtune.data.stream import Stream
from shardtune.data.stream_steps import StreamSteps
from shardtune.data.tables import TokenTable
from shardtune.errors import ConfigError
from shardtune.optim.schedule import learning_rate, learning_rate_by_time
from shardtune.protocols import Task
from shardtune.state import TrainingState
from shardtune.world import World


class Course(NamedTuple):
    """What a run goes through."""

    steps: StepSource
    total_steps: int | None
    """None: as many as there is time for (`duration.minutes`)."""
    examples_of: Callable[[int], int | None]
    """How many examples an epoch visits, by its number; None where that is not known before."""


def make_course(
    config: Config, world: World, task: Task, table: TokenTable, counts: Sequence[int], done: int
) -> Course:
    """The steps over a table of examples, of which so many are from each source; `done`: steps that are not asked for
    any more."""
    batch, order = config.batch, make_order(config, table, counts)
    total_steps = config.duration.steps
    if config.duration.epochs is not None:
        total_steps = order.total_steps(config.duration.epochs)
    batching = BATCHINGS[config.data.batching]()
    steps = Steps(table, order, batching, task.collate, world.rank, world.size, make_budget(batch))
    return Course(prefetched(config, world, steps, total_steps, done), total_steps, order.examples_of)


def make_order(config: Config, table: TokenTable, counts: Sequence[int]) -> Order:
    """Which examples make which step."""
    per_step = config.batch.examples or TokenLimit(config.batch.tokens or 1, table.lengths.sum(axis=1))
    sources = portions(config.data.sources, table, counts)
    return Order(len(table), per_step, config.seed, config.data.shuffle, sources)


def make_stream(config: Config, task: Task) -> Stream:
    """The training examples of a streaming run. `task` is used in a thread of its own, so nothing else may use it."""
    data = config.data
    divided = data.validation is None and data.test is None
    return Stream(
        [source.path for source in data.sources], make_mixture(config), fields_of(config),
        data.splits if divided else None, task.encode, data.shuffle_buffer if data.shuffle else None, config.seed,
    )  # fmt: skip


def make_stream_course(config: Config, world: World, task: Task, stream: Stream, done: int) -> Course:
    """The steps over a stream, whose length nobody knows; `done`: steps that are not asked for any more."""
    batch, total_steps = config.batch, config.duration.steps
    batching = BATCHINGS[config.data.batching]()
    layout = Layout(batching, task.collate, world.rank, world.size, make_budget(batch))
    steps = StreamSteps(stream, batch.examples, batch.tokens, layout)
    return Course(prefetched(config, world, steps, total_steps, done), total_steps, lambda epoch: None)


def prefetched(config: Config, world: World, steps: StepSource, total_steps: int | None, done: int) -> StepSource:
    """The same steps, prepared `data.prefetch` ahead, but none after the last."""
    if not config.data.prefetch:
        return steps
    left = sys.maxsize if total_steps is None else total_steps - done
    return Prefetch(steps, config.data.prefetch, left, world.device)


def portions(sources: Sequence[SourceConfig], table: TokenTable, counts: Sequence[int]) -> list[Portion]:
    """How often an epoch visits the examples of each source; a share of tokens becomes a weight.

    Raises ConfigError where that is less than one example of a source.
    """
    found = []
    for index, (source, count, tokens) in enumerate(zip(sources, counts, tokens_of(table, counts), strict=True)):
        weight = source.weight or 1.0
        if source.tokens is not None:
            weight = source.tokens * int(table.lengths.sum()) / tokens
        if weight * count < 1:
            key = "weight" if source.tokens is None else "tokens"
            raise ConfigError(
                f"data.train.{index}.{key}: {getattr(source, key):g} is less than one of the {count:,} examples of "
                f"{source.path} in an epoch; raise it, or leave the source out"
            )
        found.append(Portion(count, weight))
    return found


def tokens_of(table: TokenTable, counts: Sequence[int]) -> list[int]:
    """Source and target tokens of each source's examples."""
    first, found = 0, []
    for count in counts:
        found.append(int(table.lengths[first : first + count].sum()))
        first += count
    return found


def describe_sources(config: Config, table: TokenTable | None, counts: Sequence[int]) -> Iterator[str]:
    """A line for each of several sources: what part it has in an epoch; of a stream (no table) what is known of it."""
    sources = config.data.sources
    if table is None:
        mixture = make_mixture(config)
        unit = "tokens" if mixture is not None and mixture.of_tokens else "examples"
        for index, source in enumerate(sources):
            yield f"  stream of {source.path}" + (f": {mixture.shares[index]:.1%} of the {unit}" if mixture else "")
        return
    parts = portions(sources, table, counts)  # raises what is wrong with them
    if len(sources) < 2:
        return
    examples = [part.examples * part.weight for part in parts]
    tokens = [part.weight * count for part, count in zip(parts, tokens_of(table, counts), strict=True)]
    for source, part, visits, some in zip(sources, parts, examples, tokens, strict=True):
        yield (
            f"  {source.path}: {part.examples:,} examples × {part.weight:.4g} an epoch, "
            f"{visits / sum(examples):.1%} of the examples, {some / sum(tokens):.1%} of the tokens"
        )


def course_of(config: Config, world: World, prepared: Prepared, done: int) -> tuple[Course, Stream | None]:
    """The steps, of which so many are `done`, and the stream that they come from, if so."""
    if not config.data.streaming:
        table = prepared.tables["train"]
        return make_course(config, world, prepared.task, table, prepared.train_counts, done), None
    own_task = copy.deepcopy(prepared.task)  # a tokenizer's settings change while it is used: not in two threads
    stream = make_stream(config, own_task)
    return make_stream_course(config, world, own_task, stream, done), stream


def rate_for(config: Config, course: Course) -> Callable[[TrainingState], float]:
    """The learning rate of the step that begins at a state."""
    peak, schedule, warmup = config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup
    total, limit = course.total_steps, config.duration.seconds
    if total is not None:
        return lambda state: learning_rate(state.step, total, peak, schedule, warmup)
    assert limit is not None
    return lambda state: learning_rate_by_time(state.step, state.seconds, limit, peak, schedule, warmup)


def was_updated(rate_of: Callable[[TrainingState], float], state: TrainingState, course: Course) -> bool:
    """Whether there was a step with a learning rate above 0; by time the first one may have had none."""
    if course.total_steps is None:
        return state.step > 1
    return any(rate_of(TrainingState(step=step)) > 0 for step in range(state.step))
