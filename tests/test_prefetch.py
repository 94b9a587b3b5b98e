"""Steps prepared ahead are those that would have come, and what goes wrong goes wrong at its step."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from shardtune.data.prefetch import Prefetch
from shardtune.data.steps import Step
from shardtune.errors import DataError

CPU = torch.device("cpu")


class Source:
    """Epochs of ten examples in steps of three, which say where they begin."""

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.closed = False
        self._bad = bad

    def at(self, epoch: int, cursor: int) -> Step:
        self.asked.append((epoch, cursor))
        self.threads.add(threading.get_ident())
        if (epoch, cursor) == self._bad:
            raise DataError("a bad row")
        stop = min(cursor + 3, 10)
        return Step(np.arange(cursor, stop) + 10 * epoch, [], stop == 10)

    def close(self) -> None:
        self.closed = True


def walk(steps: Prefetch | Source, count: int, epoch: int = 0, cursor: int = 0) -> list[list[int]]:
    found = []
    for _ in range(count):
        step = steps.at(epoch, cursor)
        found.append(step.examples.tolist())
        epoch, cursor = (epoch + 1, 0) if step.ends_epoch else (epoch, cursor + len(step.examples))
    return found


def settle(source: Source) -> None:
    """Waits until nothing more is asked for."""
    before = -1
    while before != len(source.asked):
        before = len(source.asked)
        time.sleep(0.05)


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_the_steps_are_the_same_and_none_is_prepared_beyond_the_last(ahead: int) -> None:
    for total in (1, 4, 5, 11):
        source = Source()
        steps = Prefetch(source, ahead, total, CPU)
        assert walk(steps, total) == walk(Source(), total)
        settle(source)
        assert len(source.asked) == total
        assert threading.get_ident() not in source.threads
        steps.close()
        assert source.closed


def test_so_many_are_prepared_ahead() -> None:
    source = Source()
    steps = Prefetch(source, 3, 100, CPU)
    steps.at(0, 0)
    settle(source)
    assert source.asked == [(0, 0), (0, 3), (0, 6), (0, 9)]
    steps.close()


def test_another_position_begins_anew() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    steps = Prefetch(Source(), 2, 1000, CPU)
    for _ in range(30):
        epoch, cursor, count = rng.randrange(4), rng.choice([0, 3, 6, 9]), rng.randint(1, 9)
        assert walk(steps, count, epoch, cursor) == walk(Source(), count, epoch, cursor)
    steps.close()


def test_an_error_is_raised_at_its_step() -> None:
    source = Source(bad=(1, 3))
    steps = Prefetch(source, 5, 100, CPU)
    assert walk(steps, 5) == walk(Source(), 5)
    for _ in range(2):
        with pytest.raises(DataError, match="a bad row"):
            steps.at(1, 3)
    assert walk(steps, 3, 1, 6) == walk(Source(), 3, 1, 6)
    steps.close()


def test_closing_ends_the_thread() -> None:
    for asked in (0, 1, 4):
        before = threading.active_count()
        steps = Prefetch(Source(), 2, 100, CPU)
        walk(steps, asked)
        steps.close()
        assert threading.active_count() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_for_a_gpu_are_pinned() -> None:
    from shardtune.examples import Batch

    class Batches(Source):
        def at(self, epoch: int, cursor: int) -> Step:
            batch = Batch({"input_ids": torch.ones(2, 3)}, torch.ones(2, 3), 6, 6, 6)
            return super().at(epoch, cursor)._replace(micro_batches=[batch])

    steps = Prefetch(Batches(), 2, 10, torch.device("cuda", 0))
    batch = steps.at(0, 0).micro_batches[0]
    assert batch.labels.is_pinned()
    assert batch.inputs["input_ids"].is_pinned()
    steps.close()
