"""The steps that a run goes through: which examples, in which order, how they reach the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from shardtune.assemble.parts import BATCHINGS, make_budget
from shardtune.config import Config, SourceConfig
from shardtune.data.order import Order, Portion, TokenLimit
from shardtune.data.prefetch import Prefetch
from shardtune.data.steps import Steps, StepSource
from shardtune.data.tables import TokenTable
from shardtune.errors import ConfigError
from shardtune.protocols import Task
from shardtune.world import World


class Course(NamedTuple):
    """What a run goes through."""

    steps: StepSource
    total_steps: int
    examples_of: Callable[[int], int | None]
    """How many examples an epoch visits, by its number; None where that is not known before."""


def make_course(config: Config, world: World, task: Task, table: TokenTable, counts: Sequence[int]) -> Course:
    """The steps over a table of examples, of which so many are from each source."""
    batch = config.batch
    per_step = batch.examples or TokenLimit(batch.tokens or 1, table.lengths.sum(axis=1))
    order = Order(len(table), per_step, config.seed, config.data.shuffle, portions(config.data.sources, table, counts))
    total_steps = config.duration.steps
    if total_steps is None:
        total_steps = order.total_steps(config.duration.epochs or 1)
    batching = BATCHINGS[config.data.batching]()
    steps = Steps(table, order, batching, task.collate, world.rank, world.size, make_budget(batch))
    return Course(prefetched(config, world, steps, total_steps), total_steps, order.examples_of)


def prefetched(config: Config, world: World, steps: StepSource, total_steps: int) -> StepSource:
    """The same steps, prepared `data.prefetch` ahead."""
    return Prefetch(steps, config.data.prefetch, total_steps, world.device) if config.data.prefetch else steps


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


def describe_sources(config: Config, table: TokenTable, counts: Sequence[int]) -> Iterator[str]:
    """A line for each of several sources: what part it has in an epoch."""
    sources = config.data.sources
    if len(sources) < 2:
        return
    parts = portions(sources, table, counts)
    examples = [part.examples * part.weight for part in parts]
    tokens = [part.weight * count for part, count in zip(parts, tokens_of(table, counts), strict=True)]
    for source, part, visits, some in zip(sources, parts, examples, tokens, strict=True):
        yield (
            f"  {source.path}: {part.examples:,} examples × {part.weight:.4g} an epoch, "
            f"{visits / sum(examples):.1%} of the examples, {some / sum(tokens):.1%} of the tokens"
        )
