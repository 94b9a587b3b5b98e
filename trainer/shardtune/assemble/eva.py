"""What EVA has to know before adapters are made: which directions the inputs of the base's layers have."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from shardtune.assemble.parts import DTYPES, choose_strategy, make_strategy
from shardtune.assemble.steps import make_order
from shardtune.config import Config
from shardtune.data.order import Order
from shardtune.data.tables import TokenTable
from shardtune.examples import Tokens
from shardtune.model.skeleton import Skeleton
from shardtune.protocols import Task
from shardtune.tuning.eva import Directions, Eva
from shardtune.world import World


def observe_inputs(
    tuning: Eva,
    config: Config,
    world: World,
    build: Callable[[], Skeleton],
    task: Task,
    table: TokenTable,
    counts: Sequence[int],
) -> None:
    """Runs the base over the first training examples, one at a time, so that any layout computes the same.

    The base comes from `build`, is filled by the run's own strategy, and is gone afterwards. The first rank collects
    and decides; the others compute with it where the strategy needs them.
    """
    examples = [table[index] for index in _first(make_order(config, table, counts), tuning.examples)]
    found = _directions(tuning, config, world, build(), task, examples)
    gc.collect()  # the base's modules and the hooks on them refer to each other
    sizes: dict[str, list[int]] = world.first_does("ranks", lambda: _sizes(tuning.ranks(found), found))
    components = {}
    for name, (rank, width) in sizes.items():
        chosen = found[name].components[:rank].contiguous() if world.is_first else torch.empty(rank, width)
        components[name] = world.send(chosen, 0)
    tuning.begin_with(components)


def _directions(
    tuning: Eva, config: Config, world: World, skeleton: Skeleton, task: Task, examples: Sequence[Tokens]
) -> dict[str, Directions]:
    """On the first rank; empty elsewhere."""
    model, dtype = skeleton.model.requires_grad_(False), DTYPES[config.model.dtype]
    kind = world.first_does("strategy", lambda: choose_strategy(config.strategy, model, world, dtype))
    # There is no optimizer that would need a disk.
    strategy = make_strategy(kind, model, world, dtype, "none" if config.strategy.offload == "none" else "cpu")
    strategy.prepare(model, skeleton.weights(model, config.seed, dtype), None)
    inputs = tuning.watch(model)
    if world.is_first or strategy.in_step:
        with strategy.evaluating() as whole:
            for example in examples:
                with inputs.example() if world.is_first else nullcontext():
                    task.loss_sum(whole, task.collate([example]).to(world.device))
    found = inputs.found() if world.is_first else {}
    strategy.drop()
    return found


def _first(order: Order, count: int) -> list[int]:
    """The first `count` examples that the run will train on, or those of its first epoch if they are fewer."""
    found: list[int] = []
    while len(found) < min(count, order.examples):
        found += order.take(0, len(found)).tolist()
    return found[:count]


def _sizes(ranks: Mapping[str, int], found: Mapping[str, Directions]) -> dict[str, list[int]]:
    return {name: [rank, found[name].components.shape[1]] for name, rank in ranks.items()}
