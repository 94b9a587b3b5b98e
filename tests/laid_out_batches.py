"""Batches of every task, laid out on the host and on the device: exactly the same. Run as a script, with
TRITON_INTERPRET=1, it compares what the kernels make."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from chats import make_tokenizer
from shardtune.assemble.device_padding import device_padding, lay_out_on_device
from shardtune.documents import Documents
from shardtune.examples import Batch, Tokens
from shardtune.protocols import Task
from shardtune.task.causal import Causal
from shardtune.task.chat import Chat
from shardtune.task.chat_template import set_template
from shardtune.task.classification import Classification
from shardtune.task.multitask import Multitask
from shardtune.task.seq2seq import Seq2Seq

CPU = torch.device("cpu")
TASKS: dict[str, Callable[[Any, Any], Task]] = {
    "seq2seq": lambda tokenizer, lay_out: Seq2Seq(tokenizer, 40, 40, 5, lay_out),
    "causal": lambda tokenizer, lay_out: Causal(tokenizer, 40, 40, False, lay_out=lay_out),
    "text": lambda tokenizer, lay_out: Causal(tokenizer, 40, 40, True, lay_out=lay_out),
    "chat": lambda tokenizer, lay_out: Chat(tokenizer, 40, lay_out=lay_out),
    "classification": lambda tokenizer, lay_out: Classification(tokenizer, 40, ["a", "b"], lay_out=lay_out),
    "multitask": lambda tokenizer, lay_out: Multitask(Seq2Seq(tokenizer, 40, 40, 5, lay_out)),
}
CASES = [(name, packed) for name in TASKS for packed in (False, True) if not (packed and name == "classification")]


def tasks(name: str) -> tuple[Task, Task]:
    """The same, padding on the host and on the device."""
    tokenizer = make_tokenizer()
    if name == "chat":
        set_template(tokenizer, "chatml")
    return TASKS[name](tokenizer, None), TASKS[name](tokenizer, lay_out_on_device)


def examples(name: str, seed: int) -> list[Tokens]:
    """Ragged ones, as `encode` makes them for the task."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> Any:
        return rng.integers(0, 200, rng.integers(least, most)).astype(np.int32)

    made = []
    for _ in range(rng.integers(1, 9)):
        source, target = ids(1, 2 if name == "text" else 30), ids(1, 14)
        if name == "chat":
            target[1:-1] = np.where(rng.random(len(target[1:-1])) < 0.5, ~target[1:-1], target[1:-1])
        made.append(Tokens(source, target[:1] % 2 if name == "classification" else target, int(rng.integers(0, 3))))
    return made


def check(name: str, packed: bool, seed: int, device: torch.device = CPU, pinned: bool = False) -> None:
    """Fails unless both tasks make the same, also of a blank batch."""
    (host, laid_out), some = tasks(name), examples(name, seed)
    said = f"{name}, packed {packed}, seed {seed}"
    for wanted, got in (
        (host.collate(some, packed), laid_out.collate(some, packed)),
        (host.collate(some, packed).blank(), laid_out.collate(some, packed).blank()),
    ):
        assert got.ragged is not None
        assert wanted.ragged is None
        assert "input_ids" not in got.inputs
        got = (got.pin() if pinned else got).to(device)
        assert got.ragged is None
        same(got, wanted, said)
        same(got.to(CPU), wanted, said)


def same(got: Batch, wanted: Batch, said: str) -> None:
    """Every tensor and number."""
    assert got.inputs.keys() == wanted.inputs.keys(), said
    pairs = [(got.inputs[name], value, name) for name, value in wanted.inputs.items()]
    for value, other, name in [*pairs, (got.labels, wanted.labels, "labels")]:
        assert value.dtype == other.dtype == torch.int64, (name, said)
        assert torch.equal(value.cpu(), other), (name, said)
    assert (got.tokens, got.targets, got.slots) == (wanted.tokens, wanted.targets, wanted.slots), said
    assert_same_documents(got.documents, wanted.documents)


def assert_same_documents(got: Documents | None, wanted: Documents | None) -> None:
    """Where each example lies."""
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None:
        assert torch.equal(got.source.offsets.cpu(), wanted.source.offsets)
        assert torch.equal(got.source_spread.query_index.cpu(), wanted.source_spread.query_index)


def main(seeds: Sequence[int]) -> int:
    """All cases on kernels."""
    from shardtune_kernels._launch import INTERPRETED

    assert INTERPRETED
    assert device_padding(CPU) is lay_out_on_device
    for name, packed in CASES:
        for seed in seeds:
            check(name, packed, seed)
    print("the same", *seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main([*map(int, sys.argv[1:])] or [random.SystemRandom().randrange(2**31)]))
