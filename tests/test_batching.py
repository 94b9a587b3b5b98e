"""Which examples make which step, and how they are dealt to ranks: properties over random sizes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardtune.data.batching.grouped import Grouped
from shardtune.data.batching.padded import Padded, deal
from shardtune.data.order import Order
from shardtune.data.steps import Steps
from shardtune.data.tables import open_table, write_table
from shardtune.protocols import Batch, Budget, Encoded, Tokens
from shardtune.task.tokens import pad


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def epoch_of(order: Order, epoch: int, cursor: int = 0) -> list[NDArray[np.int64]]:
    """The steps of an epoch from `cursor` on."""
    found = []
    while cursor < order.examples:
        found.append(order.take(epoch, cursor))
        cursor += len(found[-1])
    return found


# -------------------------------------------------------------------------------------------------- order


def test_an_epoch_visits_each_example_once(rng: random.Random) -> None:
    for _ in range(200):
        examples, per_step = rng.randint(1, 70), rng.randint(1, 80)
        order = Order(examples, per_step, rng.randrange(2**63), shuffle=rng.random() < 0.7)
        epoch = rng.randint(0, 5)
        steps = epoch_of(order, epoch)
        assert sorted(np.concatenate(steps).tolist()) == list(range(examples))
        assert len(steps) == order.steps_per_epoch
        assert {len(step) for step in steps[:-1]} <= {per_step}
        assert len(steps[-1]) == (examples - 1) % per_step + 1, "the last step takes what is left"


def test_going_on_from_any_cursor_gives_the_same_steps(rng: random.Random) -> None:
    for _ in range(60):
        examples, per_step, seed = rng.randint(1, 50), rng.randint(1, 20), rng.randrange(2**63)
        order = Order(examples, per_step, seed, shuffle=True)
        whole = [epoch_of(order, epoch) for epoch in range(3)]
        epoch = rng.randrange(3)
        done = rng.randrange(len(whole[epoch]) + 1)
        cursor = sum(len(step) for step in whole[epoch][:done])
        fresh = Order(examples, per_step, seed, shuffle=True)
        going_on = epoch_of(fresh, epoch, cursor)
        assert [s.tolist() for s in going_on] == [s.tolist() for s in whole[epoch][done:]]
        if epoch < 2:
            assert [s.tolist() for s in epoch_of(fresh, epoch + 1)] == [s.tolist() for s in whole[epoch + 1]]


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {
        tuple(np.concatenate(epoch_of(Order(40, 7, seed, shuffle=True), epoch)).tolist())
        for seed in (0, 1, 2, 2**63 - 1)
        for epoch in range(4)
    }
    assert len(orders) == 16
    # The order does not depend on how it is cut into steps.
    assert np.array_equal(
        np.concatenate(epoch_of(Order(40, 7, 3, shuffle=True), 1)),
        np.concatenate(epoch_of(Order(40, 11, 3, shuffle=True), 1)),
    )


def test_file_order() -> None:
    order = Order(10, 4, seed=3, shuffle=False)
    for epoch in (0, 1):
        assert [step.tolist() for step in epoch_of(order, epoch)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_of_a_seed_is_fixed() -> None:
    """A run that is resumed with a later version goes on with the same examples."""
    assert Order(8, 8, seed=0, shuffle=True).take(0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert Order(8, 8, seed=5, shuffle=True).take(2, 0).tolist() == [0, 4, 5, 7, 3, 1, 2, 6]


# ------------------------------------------------------------------------------------------------- layouts


def lengths_of(count: int, rng: random.Random) -> NDArray[np.int64]:
    return np.array([(rng.randint(1, 60), rng.randint(1, 30)) for _ in range(count)], np.int64).reshape(count, 2)


@pytest.mark.parametrize("batching", [Padded(), Grouped()], ids=["padded", "grouped"])
def test_layouts(batching: Any, rng: random.Random) -> None:
    for _ in range(300):
        count, ranks, micro = rng.randint(1, 60), rng.randint(1, 9), rng.randint(1, 10)
        layout = batching.layout(lengths_of(count, rng), ranks, Budget(micro, None))
        assert len(layout) == ranks
        rounds = {len(micro_batches) for micro_batches in layout}
        assert rounds == {max(1, -(-count // (ranks * micro)))}, "every rank as many, and no more than needed"
        sizes = [len(positions) for micro_batches in layout for positions in micro_batches]
        assert max(sizes) <= micro
        assert max(sizes) - min(sizes) <= 1, "near equal, so no rank waits long for another"
        everything = np.concatenate([positions for micro_batches in layout for positions in micro_batches])
        assert sorted(everything.tolist()) == list(range(count))


def test_padded_keeps_the_order(rng: random.Random) -> None:
    for _ in range(50):
        count, ranks, micro = rng.randint(1, 60), rng.randint(1, 5), rng.randint(1, 10)
        layout = Padded().layout(lengths_of(count, rng), ranks, Budget(micro, None))
        turns = [layout[rank][turn] for turn in range(len(layout[0])) for rank in range(ranks)]
        assert np.concatenate(turns).tolist() == list(range(count))


def test_grouped_is_longest_first(rng: random.Random) -> None:
    lengths = lengths_of(50, rng)
    layout = Grouped().layout(lengths, 3, Budget(4, None))
    turns = [layout[rank][turn] for turn in range(len(layout[0])) for rank in range(3)]
    sources = lengths[np.concatenate(turns), 0]
    assert (np.diff(sources) <= 0).all()


def padding(lengths: NDArray[np.int64], layout: list[list[NDArray[np.int64]]]) -> int:
    slots = sum(
        len(positions) * int(lengths[positions].max(0).sum()) for rank in layout for positions in rank if len(positions)
    )
    return slots - int(lengths.sum())


def test_grouped_pads_less(rng: random.Random) -> None:
    better = 0
    for _ in range(50):
        count, ranks, micro = rng.randint(32, 128), rng.randint(1, 4), rng.randint(4, 10)
        source = np.array([int(rng.lognormvariate(4, 0.8)) + 1 for _ in range(count)])
        target = np.maximum(1, source // 4)  # a long text has a long summary
        lengths = np.stack([source, target], 1)
        grouped = padding(lengths, Grouped().layout(lengths, ranks, Budget(micro, None)))
        padded = padding(lengths, Padded().layout(lengths, ranks, Budget(micro, None)))
        better += grouped < padded / 2
    print(f"less than half the padding in {better} of 50 steps")
    assert better >= 45


def test_dealing_nothing() -> None:
    assert [[len(positions) for positions in rank] for rank in deal(np.arange(0), 3, 4)] == [[0], [0], [0]]


# --------------------------------------------------------------------------------------------------- steps


def collate(examples: list[Tokens], packed: bool = False) -> Batch:
    """Examples whose source says which they are."""
    ids = pad([e.source for e in examples], 0)
    return Batch({"input_ids": ids}, torch.zeros(len(examples)), len(examples), len(examples), ids.numel())


@pytest.mark.parametrize("batching", [Padded(), Grouped()], ids=["padded", "grouped"])
def test_a_step_is_a_set_of_examples(batching: Any, rng: random.Random, tmp_path: Path) -> None:
    """Whatever the ranks and the micro-batches, and wherever one comes in."""
    count = 37
    write_table(tmp_path / "t", (Encoded([n + 1] * rng.randint(1, 9), [1], False, False) for n in range(count)))
    table = open_table(tmp_path / "t")
    assert table is not None

    def sets(ranks: int, micro: int, per_step: int) -> list[list[int]]:
        found = []
        for epoch in range(2):
            cursor = 0
            while cursor < count:
                seen: Counter[int] = Counter()
                rounds = set()
                for rank in range(ranks):
                    order = Order(count, per_step, 11, shuffle=True)
                    step = Steps(table, order, batching, collate, rank, ranks, Budget(micro, None)).at(epoch, cursor)  # pyright: ignore
                    rounds.add(len(step.micro_batches))
                    for batch in step.micro_batches:
                        firsts = batch.inputs["input_ids"][:, 0].tolist()
                        assert len(firsts) <= micro
                        if batch.targets:
                            assert batch.targets == len(firsts)
                            seen.update(first - 1 for first in firsts)
                        else:
                            assert len(firsts) == 1, "a blank one is as small as can be"
                assert len(rounds) == 1
                assert set(seen.values()) == {1}
                assert sorted(seen) == sorted(step.examples.tolist())
                found.append(sorted(seen))
                cursor += len(seen)
        return found

    for per_step in (1, 8, 12, 50):
        wanted = sets(1, 50, per_step)
        for ranks, micro in ((1, 1), (2, 3), (3, 4), (5, 1), (16, 8)):
            assert sets(ranks, micro, per_step) == wanted
