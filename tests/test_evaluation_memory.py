"""Evaluation holds no more for many examples than for few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardtune.data.tables import TokenTable
from shardtune.evaluation import Evaluator, Split
from shardtune.examples import Text, Tokens
from shardtune.metrics import Scorer
from shardtune.protocols import Generation
from shardtune.task.seq2seq import Seq2Seq
from shardtune.world import World

FEW, MANY = 100, 5000
SIZE = 20_000
"""Characters of a text: all of them together are twice what may be held."""


def text_of(number: int) -> str:
    return f"{number:07} " * (SIZE // 8)


class Texts:
    """Made when they are asked for."""

    def __getitem__(self, number: int) -> Text:
        return Text("", f"source {number}", text_of(number).strip())

    def __len__(self) -> int:
        return MANY


class Echo(Seq2Seq):
    """Writes long texts without computing anything."""

    def __init__(self) -> None:
        super().__init__(None, 1, 1, 0)  # pyright: ignore[reportArgumentType]

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Any:
        return Rows(len(examples))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.ones(batch.count)

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        return [text_of(example.number) for example in examples]


class Rows:
    def __init__(self, count: int) -> None:
        self.count = count

    def to(self, device: torch.device) -> Rows:
        return self


class Alone:
    in_step = False
    evaluates = ""

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        yield nn.Identity()


def resident() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def test_memory_stays_flat(tmp_path: Path) -> None:
    tokens, offsets = np.zeros(MANY, np.int32), np.arange(MANY + 1)
    table = TokenTable([tokens, tokens], [offsets, offsets], 0, 0)
    scorer = Scorer(["exact_match"])
    strategy: Any = Alone()
    texts: Any = Texts()
    world = World(0, 1, 0, torch.device("cpu"))
    evaluator = Evaluator(Echo(), strategy, world, scorer, Generation(8), 8, tmp_path, lambda: None)
    highest = 0

    def advance(examples: int) -> None:
        nonlocal highest
        highest = max(highest, resident())

    evaluator.run("few", Split("test", table, FEW, texts), advance)
    before = highest
    judged = evaluator.run("many", Split("test", table, MANY, texts), advance)
    assert judged is not None
    assert max(highest, resident()) - before < 50e6
    assert judged.scores == {"loss": 1.0, "exact_match": 1.0}
    with (tmp_path / "predictions" / "many-test.jsonl").open(encoding="utf-8") as lines:
        assert all(f'"source {number}"' in line for number, line in zip(range(MANY), lines, strict=True))
    assert np.load(tmp_path / "statistics" / "many-test.npy").shape[0] == MANY
