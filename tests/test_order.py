"""Steps of so many tokens, and sources in given proportions: properties over random sizes."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from epochs import epoch_of
from shardtune.data.order import Order, Portion, TokenLimit


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def random_sources(rng: random.Random) -> list[Portion]:
    sources = []
    for _ in range(rng.randint(1, 4)):
        examples = rng.randint(1, 30)
        sources.append(Portion(examples, rng.choice([1.0, 2.0, 0.5, rng.uniform(0.1, 3.0)])))
        if sources[-1].weight * examples < 1:
            sources[-1] = Portion(examples, 1.0)
    return sources


def random_order(rng: random.Random, shuffle: bool = True) -> tuple[list[Portion], Order]:
    """An order, and another one like it each time it is drawn with the same state of `rng`."""
    sources = random_sources(rng)
    count = sum(source.examples for source in sources)
    lengths = np.array([rng.randint(1, 50) for _ in range(count)])
    per_step = rng.choice([rng.randint(1, 20), TokenLimit(rng.randint(1, 300), lengths)])
    return sources, Order(count, per_step, rng.randrange(2**63), shuffle, sources)


def test_a_step_takes_examples_until_one_more_would_exceed_the_tokens(rng: random.Random) -> None:
    for _ in range(100):
        count, limit = rng.randint(1, 60), rng.randint(1, 200)
        lengths = np.array([rng.randint(1, 60) for _ in range(count)])
        order = Order(count, TokenLimit(limit, lengths), rng.randrange(2**63), shuffle=rng.random() < 0.7)
        epoch = rng.randint(0, 3)
        steps = epoch_of(order, epoch)
        assert sorted(np.concatenate(steps).tolist()) == list(range(count))
        assert len(steps) == order.steps_of(epoch)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            assert lengths[step].sum() <= limit or len(step) == 1
            if following is not None:
                assert lengths[step].sum() + lengths[following[0]] > limit


def test_the_order_does_not_depend_on_how_it_is_cut(rng: random.Random) -> None:
    count, seed = rng.randint(1, 60), rng.randrange(2**63)
    lengths = np.array([rng.randint(1, 60) for _ in range(count)])
    by_examples = Order(count, 7, seed, shuffle=True)
    by_tokens = Order(count, TokenLimit(90, lengths), seed, shuffle=True)
    for epoch in range(3):
        assert np.array_equal(np.concatenate(epoch_of(by_examples, epoch)), np.concatenate(epoch_of(by_tokens, epoch)))


def test_total_steps(rng: random.Random) -> None:
    for _ in range(50):
        _, order = random_order(rng)
        steps = [order.steps_of(epoch) for epoch in range(4)]
        assert order.total_steps(3) == sum(steps[:3])
        part = rng.uniform(0.01, 0.99)
        assert order.total_steps(2 + part) == sum(steps[:2]) + math.ceil(round(part * steps[2], 6))
    assert Order(100, 10, 0, shuffle=True).total_steps(1.1) == 11, "not 12, which rounding up 11.000000000000002 gives"


def test_weights_of_one_are_no_mixture(rng: random.Random) -> None:
    for _ in range(30):
        sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 5))]
        seed, shuffle = rng.randrange(2**63), rng.random() < 0.7
        plain = Order(sum(sizes), 7, seed, shuffle)
        mixed = Order(sum(sizes), 7, seed, shuffle, [Portion(size, 1.0) for size in sizes])
        for epoch in range(3):
            assert [s.tolist() for s in epoch_of(plain, epoch)] == [s.tolist() for s in epoch_of(mixed, epoch)]


def test_sources_are_visited_by_weight_and_their_examples_equally_often(rng: random.Random) -> None:
    for _ in range(60):
        sources, order = random_order(rng, shuffle=rng.random() < 0.7)
        epochs = rng.randint(1, 8)
        visits: Counter[int] = Counter()
        for epoch in range(epochs):
            found = Counter(np.concatenate(epoch_of(order, epoch)).tolist())
            visits += found
            first = 0
            for source in sources:
                numbers = range(first, first + source.examples)
                in_epoch = sum(found[n] for n in numbers)
                assert abs(in_epoch - source.weight * source.examples) <= 1, "each epoch has the source's part"
                so_far = [visits[n] for n in numbers]
                assert max(so_far) - min(so_far) <= 1, "an example comes again after all others of its source"
                first += source.examples
    half = Order(10, 4, 0, True, [Portion(10, 0.5)])
    assert sorted(np.concatenate([*epoch_of(half, 0), *epoch_of(half, 1)]).tolist()) == list(range(10))


def test_without_shuffling_sources_come_one_after_the_other() -> None:
    order = Order(7, 100, 0, False, [Portion(3, 2.0), Portion(4, 0.5)])
    assert order.take(0, 0).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert order.take(1, 0).tolist() == [0, 1, 2, 0, 1, 2, 5, 6]
    assert order.take(2, 0).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_going_on_from_any_cursor_gives_the_same_steps(rng: random.Random) -> None:
    for _ in range(40):
        state = rng.getstate()
        _, order = random_order(rng)
        whole = [epoch_of(order, epoch) for epoch in range(4)]
        rng.setstate(state)
        _, fresh = random_order(rng)
        for epoch in rng.sample(range(4), 4):
            done = rng.randrange(len(whole[epoch]) + 1)
            cursor = sum(len(step) for step in whole[epoch][:done])
            assert [s.tolist() for s in epoch_of(fresh, epoch, cursor)] == [s.tolist() for s in whole[epoch][done:]]


def test_mixed_orders_differ_by_seed_and_epoch() -> None:
    sources = [Portion(20, 2.0), Portion(30, 0.5)]
    orders = {
        tuple(np.concatenate(epoch_of(Order(50, 7, seed, True, sources), epoch)).tolist())
        for seed in (0, 1, 2**32, 2**63 - 1)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_the_mixed_order_of_a_seed_is_fixed() -> None:
    """A run that is resumed with a later version goes on with the same examples."""
    sources = [Portion(3, 1.5), Portion(4, 0.5)]
    order = Order(7, 100, 3, True, sources)
    assert [order.take(epoch, 0).tolist() for epoch in (0, 1)] == [[5, 6, 1, 0, 2, 2, 0], [1, 1, 0, 3, 4, 2]]
