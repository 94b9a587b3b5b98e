"""Activation checkpointing: the same numbers, dropout included, from less memory.

Runs on two ranks happen before the first test that needs them, in one process group. SHARDTUNE_TEST_SEED repeats a
failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from layouts import Done, Run, launch
from shardtune.assemble.many import train_many
from shardtune.strategy.replicated import Replicated

pytestmark = pytest.mark.timeout(600)

STEPS = 3
MODELS = ("t5", "bart", "llama", "bert", "gpt2")
TUNINGS = {"full": {"method": "full"}, "lora": {"method": "lora", "rank": 2, "alpha": 4, "dropout": 0.2}}
ALL = bool(os.environ.get("SHARDTUNE_TEST_ALL"))
"""The suite runs a sample: each model under one strategy for each tuning, each strategy with both."""


def a_run(model: str, tuning: str, kind: str, recompute: str, **options: Any) -> Run:
    shared = {
        "model__dropout": 0.1, "tuning": TUNINGS[tuning], "optimizer__lr": 1e-2, "optimizer__warmup": 0,
        "duration__steps": STEPS, "model__recompute": recompute, "optimizer__eps": 1e-4,
    }  # fmt: skip
    return Run(f"{model}-{tuning}-{recompute}", model, kind, 2, 2, {**shared, **options})


KINDS = ("ddp", "fsdp2", "zero2", "zero3")
CHOSEN = [
    (model, tuning, kind)
    for index, model in enumerate(MODELS)
    for shift, tuning in enumerate(TUNINGS)
    for place, kind in enumerate(KINDS)
    if ALL or (index + 2 * shift) % len(KINDS) == place
]
PAIRS = [(a_run(*chosen, "none"), a_run(*chosen, "full")) for chosen in CHOSEN]
WITHOUT_DROPOUT = PAIRS[0][1]._replace(group="without", options={**PAIRS[0][1].options, "model__dropout": 0.0})
RUNS = [WITHOUT_DROPOUT, *(run for pair in PAIRS for run in pair)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    made = Done(tmp_path_factory.mktemp("recompute"), seed, RUNS)
    launch(made, RUNS, 2)
    return made


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[1].group}-{pair[1].strategy}")
def test_recomputed_runs_are_the_same_with_dropout(done: Done, pair: tuple[Run, Run]) -> None:
    (wanted, _), (got, _) = (done.metrics(run) for run in pair)
    assert [step["step"] for step in got] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        far = max(abs(a[key] / b[key] - 1) for a, b in zip(got, wanted, strict=True))
        assert far <= 1e-6, f"{key} differs by {far}; seed {done.seed}"
    finals = [done.final(run) for run in pair]
    for name, tensor in finals[0].items():
        far = float((finals[1][name] - tensor).norm() / tensor.norm().clamp(min=1e-30))  # one of BART's is zero
        assert far <= 1e-5, f"{name} differs by {far}; seed {done.seed}"


def test_dropout_is_on(done: Done) -> None:
    """Or equal masks would be no news. A mean loss may hardly move, so every figure of every step is asked."""
    (with_it, _), (without, _) = done.metrics(PAIRS[0][1]), done.metrics(WITHOUT_DROPOUT)
    far = [abs(a[key] / b[key] - 1) for a, b in zip(with_it, without, strict=True) for key in ("loss", "grad_norm")]
    assert max(far) > 1e-3, f"{far}; seed {done.seed}"


# ------------------------------------------------------------------------------------------- memory


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Adds up what the forward passes of a run in this process keep for their backward passes."""
    kept, forward = [0], Replicated.forward

    def note(tensor: Tensor) -> Tensor:
        kept[0] += tensor.nbytes if not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    @contextmanager
    def counted(self: Replicated, last: bool) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), forward(self, last):
            yield

    Replicated.forward = counted
    try:
        yield kept
    finally:
        Replicated.forward = forward


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("model", MODELS)
def test_less_is_kept_for_the_backward_pass(
    model: str, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    kept = {}
    for recompute in ("none", "full"):
        config = tiny.tiny_config(
            tmp_path, model, name=recompute, model__recompute=recompute, model__dropout=0.1, duration__steps=1,
            tuning=TUNINGS[tuning], strategy__kind="single",
        )  # fmt: skip
        with saved_bytes() as total:
            train_many([str(config)])
        kept[recompute] = total[0]
    assert kept["full"] < 0.5 * kept["none"], kept
