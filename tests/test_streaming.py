"""Streams: which examples make a step, from any position, on any number of ranks; and what is held of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardtune
from launching import command, run
from shardtune.config_file import load_config
from shardtune.data.batching.grouped import Grouped
from shardtune.data.batching.padded import Padded
from shardtune.data.splits import read_splits, split_of
from shardtune.data.steps import Layout
from shardtune.data.stream import Mixture, Stream, read_judged
from shardtune.data.stream_steps import StreamSteps
from shardtune.errors import ConfigError, DataError
from shardtune.examples import Batch, Budget, Encoded, Text, Tokens
from shardtune.model.tokenizer import train_tokenizer
from shardtune.row_fields import Fields
from shardtune.task.tokens import pad
from tiny import rows, tiny_config, write_rows

FIELDS = Fields("text", None, "summary")


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def numbered(path: Path, count: int, first: int = 0) -> str:
    """A file whose rows say which they are; every seventh is followed by an empty one."""
    made = []
    for number in range(first, first + count):
        made.append({"text": f"{number} " + "x " * (number % 5), "summary": str(number)})
        made += [{"text": " ", "summary": "empty"}] * (number % 7 == 6)
    return str(write_rows(path, made))


def encode(texts: Sequence[Text]) -> list[Encoded]:
    """The number, and as many tokens as the text has words."""
    return [Encoded([int(t.target), *[0] * (len(t.source.split()) - 1)], [1], False, False) for t in texts]


def collate(examples: Sequence[Tokens], packed: bool = False) -> Batch:
    ids = pad([e.source for e in examples], 0)
    return Batch({"input_ids": ids}, torch.zeros(len(examples)), len(examples), len(examples), ids.numel())


def make_steps(
    sources: Sequence[str], per_step: int | None = 5, tokens: int | None = None, block: int | None = 8, seed: int = 3,
    mixture: Mixture | None = None, rank: int = 0, ranks: int = 1, batching: Any = None, shares: Any = None,
) -> StreamSteps:  # fmt: skip
    layout = Layout(batching or Padded(), collate, rank, ranks, Budget(2, None))
    return StreamSteps(Stream(sources, mixture, FIELDS, shares, encode, block, seed), per_step, tokens, layout)


def walk(steps: StreamSteps, epoch: int = 0, cursor: int = 0, count: int = 10**9) -> list[list[int]]:
    """The numbers of the examples of the steps from a position on, to the end of the epoch."""
    found = []
    while len(found) < count:
        step = steps.at(epoch, cursor)
        ids = [batch.inputs["input_ids"][:, 0].tolist() for batch in step.micro_batches if batch.targets]
        found.append([number for some in ids for number in some])
        cursor += len(step.examples)
        if step.ends_epoch:
            break
    return found


def test_an_epoch_visits_each_example_once_in_permuted_blocks(tmp_path: Path, rng: random.Random) -> None:
    for _ in range(20):
        count, per_step, block = rng.randint(1, 60), rng.randint(1, 20), rng.choice([None, rng.randint(1, 30)])
        half = rng.randint(1, count)
        sources = [numbered(tmp_path / "a.jsonl", half)]
        if half < count:
            sources.append(numbered(tmp_path / "b.jsonl", count - half, half))
        steps = make_steps(sources, per_step, block=block, seed=rng.randrange(2**63))
        epochs = [walk(steps, epoch) for epoch in range(2)]
        for epoch in epochs:
            order = [number for step in epoch for number in step]
            assert [len(step) for step in epoch[:-1]] == [per_step] * (len(epoch) - 1)
            size = block or 1
            for start in range(0, count, size):
                assert sorted(order[start : start + size]) == list(range(start, min(start + size, count)))
        if block is None:
            assert epochs[0] == epochs[1]
        elif block > 10 and count > 20:
            assert epochs[0] != epochs[1]


def test_a_step_takes_examples_until_one_more_would_exceed_the_tokens(tmp_path: Path, rng: random.Random) -> None:
    source = numbered(tmp_path / "a.jsonl", 50)
    limit = rng.randint(3, 40)

    def size(number: int) -> int:
        return number % 5 + 2

    found = walk(make_steps([source], None, limit))
    assert sorted(number for step in found for number in step) == list(range(50))
    for step, following in zip(found, [*found[1:], None], strict=True):
        assert sum(map(size, step)) <= limit or len(step) == 1
        assert following is None or sum(map(size, step)) + size(following[0]) > limit
    assert [n for step in found for n in step] == [n for step in walk(make_steps([source], 7)) for n in step]


def test_a_step_is_a_set_of_examples(tmp_path: Path, rng: random.Random) -> None:
    """Whatever the ranks, and wherever one comes in."""
    sources = [numbered(tmp_path / "a.jsonl", 30), numbered(tmp_path / "b.jsonl", 11, 30)]
    for options in (
        {}, {"block": None}, {"per_step": None, "tokens": 17}, {"mixture": Mixture([0.7, 0.3], of_tokens=False)},
        {"mixture": Mixture([0.2, 0.8], of_tokens=True), "per_step": None, "tokens": 30},
        {"mixture": Mixture([0.5, 0.5], of_tokens=True), "block": None},
    ):  # fmt: skip
        whole = walk(make_steps(sources, **options), count=20)
        for ranks in (2, 3):
            for batching in (Padded(), Grouped()):
                parts = [
                    walk(make_steps(sources, rank=rank, ranks=ranks, batching=batching, **options), count=20)
                    for rank in range(ranks)
                ]
                together = [sorted(chain.from_iterable(some)) for some in zip(*parts, strict=True)]
                assert together == [sorted(step) for step in whole]
        for _ in range(5):
            done = rng.randrange(len(whole))
            cursor = sum(map(len, whole[:done]))
            assert walk(make_steps(sources, **options), 0, cursor, len(whole) - done) == whole[done:]


def test_skipping_does_not_tokenize(tmp_path: Path) -> None:
    seen: list[str] = []

    def noting(texts: Sequence[Text]) -> list[Encoded]:
        seen.extend(text.target for text in texts)
        return encode(texts)

    stream = Stream([numbered(tmp_path / "a.jsonl", 2000)], None, FIELDS, None, noting, 100, 0)
    first = next(stream.examples(0, 1050))
    assert first.number // 100 == 10
    assert min(map(int, seen)) == 1000


def test_sources_are_mixed_by_weight_and_by_tokens(tmp_path: Path) -> None:
    sources = [numbered(tmp_path / "a.jsonl", 30), numbered(tmp_path / "b.jsonl", 10, 1000)]
    for share in (0.5, 0.9):
        for of_tokens in (False, True):
            stream = Stream(sources, Mixture([share, 1 - share], of_tokens), FIELDS, None, encode, 16, 0)
            taken: Counter[bool] = Counter()
            visits: Counter[int] = Counter()
            for example in islice(stream.examples(0, 0), 800):
                number = int(example.tokens.source[0])
                visits[number] += 1
                taken[number < 1000] += len(example.tokens.source) + 1 if of_tokens else 1
            assert taken[True] / taken.total() == pytest.approx(share, abs=0.03)
            for first, count in ((0, 30), (1000, 10)):
                of_source = [visits[n] for n in range(first, first + count)]
                assert max(of_source) - min(of_source) <= 2, "a source that ends begins again"


def test_the_order_of_a_seed_is_fixed(tmp_path: Path) -> None:
    """A run that is resumed with a later version goes on with the same examples."""
    steps = make_steps([numbered(tmp_path / "a.jsonl", 10)], block=4, seed=5)
    assert [n for step in walk(steps) for n in step] == [3, 0, 2, 1, 6, 4, 7, 5, 8, 9]
    assert [n for step in walk(steps, 1) for n in step] == [1, 0, 2, 3, 4, 7, 6, 5, 8, 9]


def test_a_bad_row_fails_at_the_step_that_needs_it(tmp_path: Path) -> None:
    made = [{"text": f"{n}", "summary": f"{n}"} for n in range(40)]
    path = write_rows(tmp_path / "a.jsonl", made)
    path.write_text(path.read_text().replace('{"text": "23", "summary": "23"}', '{"text": "23"}'))
    for block, per_step, good in ((None, 5, 4), (None, 23, 1), (8, 4, 4), (8, 5, 3), (40, 5, 0), (None, 1, 23)):
        steps = make_steps([str(path)], per_step, block=block)
        cursor = 0
        for _ in range(good):
            cursor += len(steps.at(0, cursor).examples)
        for _ in range(2):
            with pytest.raises(DataError, match=r"a\.jsonl:24 field `summary`: absent"):
                steps.at(0, cursor)


def test_streams_without_examples_end(tmp_path: Path) -> None:
    empty = str(write_rows(tmp_path / "a.jsonl", [{"text": " ", "summary": "x"}] * 3))
    good = numbered(tmp_path / "b.jsonl", 3)
    for sources, mixture in (([empty], None), ([good, empty], Mixture([0.5, 0.5], of_tokens=False))):
        with pytest.raises(DataError, match="holds no training example"):
            walk(make_steps(sources, mixture=mixture), count=5)
        with pytest.raises(DataError, match="holds no training example"):
            read_judged(sources, good, None, [1, 0, 0], FIELDS, 5, mixture is not None)


def test_what_is_judged_are_the_first_of_each_split(tmp_path: Path) -> None:
    shares = [0.6, 0.2, 0.2]
    sources = [numbered(tmp_path / "a.jsonl", 200), numbered(tmp_path / "b.jsonl", 200, 200)]
    splits = read_splits(sources, None, None, shares, FIELDS)
    for limit in (5, 1000):
        judged = read_judged(sources, None, None, shares, FIELDS, limit, mixed=False)
        assert (judged.validation, judged.test) == (splits.validation[:limit], splits.test[:limit])
        assert judged.train == []
    mixed = read_judged(sources, None, None, shares, FIELDS, 10, mixed=True)
    assert sum("a.jsonl" in text.place for text in mixed.validation) == 5
    given = read_judged(sources[:1], sources[1], None, shares, FIELDS, 7, mixed=False)
    assert [text.target for text in given.validation] == [str(n) for n in range(200, 207)]
    assert given.test == []
    trained = [number for step in walk(make_steps(sources, shares=shares)) for number in step]
    assert sorted(trained) == [int(text.target) for text in splits.train]
    assert all(split_of(text, shares) == "train" for text in splits.train)


def test_streams_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [{"text": f"{n} word", "summary": str(n)} for n in range(30)]
    write_rows(tmp_path / "a.jsonl", made[:10])
    (tmp_path / "b.csv").write_text("text,summary\n" + "".join(f"{r['text']},{r['summary']}\n" for r in made[10:20]))
    pq.write_table(pa.Table.from_pylist(made[20:]), tmp_path / "c.parquet")
    assert [n for step in walk(make_steps([str(tmp_path / "*.*")], block=None)) for n in step] == list(range(30))

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (path, config, split, streaming) == ("owner/name", None, "train", True)
        return datasets.IterableDataset.from_generator(lambda: iter(made))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [n for step in walk(make_steps(["owner/name"], block=None)) for n in step] == list(range(30))
    (tmp_path / "d.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match=r"d\.json: a \.json file can only be read whole; to stream it, make"):
        walk(make_steps([str(tmp_path / "*.*")], block=None))


def test_conflicts(tmp_path: Path) -> None:
    for options, problem in (
        ({"duration": {"epochs": 1}}, "duration.steps: a stream's length is not known"),
        ({"model__tokenizer": "train:400"}, "model.tokenizer: train:N reads all texts"),
        ({"data__train": "docs:python"}, "data.train: docs:python is small"),
        ({"data__train": ["a.jsonl", "b.JSON"]}, "data.train.1: a .json file can only be read whole"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(tiny_config(tmp_path, **{"model__tokenizer": "x", "data__streaming": True, **options}), [])
        assert problem in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"data\.streaming: a classifier's labels must all be known"):
        load_config(tiny_config(tmp_path, "bert", model__tokenizer="x", data__streaming=True), [])


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer((row["text"] for row in rows(60)), 400, "seq2seq", folder)
    return str(folder)


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_on_two_ranks(tmp_path: Path, tokenizer: str) -> None:
    options = {"model__tokenizer": tokenizer, "data__streaming": True, "data__shuffle_buffer": 16,
               "data__validation": None, "duration": {"steps": 9}, "evaluation__baseline": True}  # fmt: skip
    found = []
    for ranks, launcher in ((1, "python"), (2, "torchrun")):
        config = tiny_config(tmp_path, name=f"on-{ranks}", **options)
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"text": " ", "summary": "x"}\n')
        done = run(command(launcher, ranks, "--config", config), tmp_path / "cache")
        assert done.code == 0, done.said
        assert "1 empty source" in done.err, done.said
        found.append(metrics(tmp_path, f"on-{ranks}"))
    one, two = found
    assert len(one) == len(two) == 9 + 6, "steps; both splits before and after, and by their first sentences"
    for line, other in zip(one, two, strict=True):
        assert line.get("of") == other.get("of")
        if line.get("of") != "lead":
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line.get("tokens") == other.get("tokens")
    epochs = [line["epoch"] for line in one if "epoch" in line]
    assert epochs[:3] == [0, 0, 0], "a part of the first pass cannot be told"
    assert epochs == sorted(epochs)
    assert 1 < epochs[-1] < 3
    assert any(epoch % 1 for epoch in epochs)


@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), ("torchrun", 2)])
def test_a_bad_row_ends_the_run_with_its_place(launcher: str, ranks: int, tmp_path: Path, tokenizer: str) -> None:
    options = {"model__tokenizer": tokenizer, "data__streaming": True, "data__shuffle": False}
    config = tiny_config(tmp_path, **options, duration={"steps": 5})
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[40] = '{"text": "no summary"}'
    path.write_text("\n".join(lines) + "\n")
    done = run(command(launcher, ranks, "--config", config), tmp_path / "cache")
    assert done.code == (1 if launcher == "torchrun" else DataError.exit_code), done.said
    assert done.err.count(f"{path}:41 field `summary`: absent") == 1, done.said
    assert f"step 3 is saved in {tmp_path / 'runs' / 'tiny' / 'checkpoints' / 'step-00000003'}" in done.err
    assert [line["step"] for line in metrics(tmp_path, "tiny")] == [1, 2, 3]
    assert done.left == []


HOLD = """
import resource, sys
from itertools import chain, islice
from shardtune.row_fields import Fields
from shardtune.data.stream import Stream
from shardtune.examples import Encoded
def encode(texts):
    return [Encoded(list(range(200)), [1, 2], False, False) for _ in texts]
stream = Stream([sys.argv[1]], None, Fields("text", None, "summary"), None, encode, 1000, 0)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in stream.examples(0, 0))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) // 1024)
"""


def test_little_is_held_of_a_large_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 600, "summary": "s"}) + "\n"
    with (tmp_path / "large.jsonl").open("w") as file:
        for _ in range(20):
            file.write(line * 1000)
    assert (tmp_path / "large.jsonl").stat().st_size > 60e6
    environment = {**os.environ, "PYTHONPATH": str(Path(shardtune.__file__).parents[1])}
    words = [sys.executable, "-c", HOLD, str(tmp_path / "large.jsonl")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 20_000
    print(f"{grown} MiB held")
    assert grown < 20, "two blocks of a thousand examples, not twenty thousand"


def test_the_numbers_of_a_step_are_places_in_the_stream(tmp_path: Path) -> None:
    step = make_steps([numbered(tmp_path / "a.jsonl", 20)], 20, block=8).at(0, 0)
    numbers = [n for batch in step.micro_batches for n in batch.inputs["input_ids"][:, 0].tolist()]
    assert np.array_equal(step.examples, numbers)
