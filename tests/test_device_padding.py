"""Micro-batches that are padded or packed on the device that computes them: nothing else changes."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import laid_out_batches
import launching
import tiny
from shardtune.assemble.device_padding import device_padding

SEEDS = [random.SystemRandom().randrange(2**31) for _ in range(5)]
INTERPRETED = {"TRITON_INTERPRET": "1"}
COUNTING = """
import atexit, runpy, sys
from shardtune.assemble import device_padding
calls, plain = [], device_padding.lay_out_on_device
device_padding.lay_out_on_device = lambda stream: calls.append(stream) or plain(stream)
atexit.register(lambda: print("laid out", len(calls)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that says in the end how many streams it laid out on the device."""


@pytest.mark.parametrize("seed", SEEDS, ids=range(len(SEEDS)))
@pytest.mark.parametrize(("name", "packed"), laid_out_batches.CASES)
def test_the_same_batch(name: str, packed: bool, seed: int) -> None:
    laid_out_batches.check(name, packed, seed)


def test_the_same_batch_of_kernels(tmp_path: Path) -> None:
    script = Path(laid_out_batches.__file__)
    words = [sys.executable, str(script), *map(str, SEEDS[:3])]
    done = launching.run(words, tmp_path, variables=INTERPRETED)
    assert done.code == 0, done.said
    assert "the same" in done.out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("name", "packed"), laid_out_batches.CASES)
def test_the_same_batch_on_a_gpu(name: str, packed: bool, pinned: bool) -> None:
    for seed in SEEDS:
        laid_out_batches.check(name, packed, seed, torch.device("cuda", 0), pinned)


def test_only_where_a_kernel_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert device_padding(torch.device("cpu")) is None
    assert device_padding(torch.device("cuda", 0)) is laid_out_batches.lay_out_on_device
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device_padding(torch.device("cpu")) is laid_out_batches.lay_out_on_device


def test_one_copy_and_one_launch_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    _, task = laid_out_batches.tasks("seq2seq")
    batch = task.collate(laid_out_batches.examples("seq2seq", 1))
    assert batch.ragged is not None
    assert not batch.inputs
    assert not len(batch.labels)
    assert batch.ragged.flat.dtype == torch.int32
    calls: list[Any] = []
    import shardtune_kernels

    pad = shardtune_kernels.pad
    monkeypatch.setattr(shardtune_kernels, "pad", lambda *given, **named: calls.append(given) or pad(*given, **named))
    batch.to(torch.device("cpu"))
    assert len(calls) == 2
    held = batch.ragged.flat.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == held for given in calls for part in given[:2])


@pytest.mark.parametrize(
    ("model", "overrides"),
    [("t5", {}), ("llama", {"data__batching": "packed", "batch": {"examples": 12, "micro_tokens": 200}})],
    ids=["seq2seq-padded", "causal-packed"],
)
def test_the_same_run(model: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """With kernels, and with padding on the host: the same metrics, but for times."""
    found = []
    judged = {"examples": 2, "max_new_tokens": 2, "baseline": False}
    for name, fused in (("device", ["padding"]), ("host", "off")):
        path = tiny.tiny_config(
            tmp_path, model, name=name, kernels={"fused": fused}, duration__steps=2, evaluation=judged, **overrides
        )
        python, *words = launching.command("python", 1, "--config", path)
        done = launching.run([python, "-c", COUNTING, *words], tmp_path / "cache", variables=INTERPRETED)
        assert done.code == 0, done.said
        assert ("laid out 0" in done.out) == (name == "host"), done.said
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([tiny.lasting(json.loads(line)) for line in lines])
    assert len(found[0]) > 2
    assert "loss" in found[0][0]
    assert found[0] == found[1]
