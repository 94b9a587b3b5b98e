"""Attention with T5's relative positions, beside the reference, as plain torch and as kernels."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, distance, seed_everything
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import biased_attention as module
from shardtune_kernels import reference
from shardtune_kernels._launch import INTERPRETED

KINDS = ("encoder", "decoder", "cross", "documents")


def cut(choose: random.Random, length: int, pieces: int) -> Tensor:
    """int32 [pieces + 1]: where documents begin and end, some empty."""
    inner = sorted(choose.randint(0, length) for _ in range(pieces - 1))
    return torch.tensor([0, *inner, length], dtype=torch.int32)


def check(
    kernels: Any, seed: int, kind: str, dtype: torch.dtype, dropout: float = 0.0, frozen: tuple[str, ...] = ()
) -> None:
    """One shape at random, values and gradients."""
    attention = kernels.biased_attention
    choose = seed_everything(seed)
    b, h, d = choose.randint(1, 2), choose.randint(1, 2), choose.choice([5, 16])
    s, t = choose.randint(18, 56), choose.randint(18, 56)
    options: dict[str, Any] = {
        "bidirectional": kind in ("encoder", "documents"), "causal": kind == "decoder",
        "max_distance": choose.choice([11, 20]), "scale": choose.choice([1.0, 0.3]),
    }  # fmt: skip
    longest = None
    if kind == "documents":
        b = 1
        options["causal"] = choose.random() < 0.5
        offsets = cut(choose, s, 3), cut(choose, t, 3)
        options["offsets"] = tuple(o.to(DEVICE) for o in offsets)
        if choose.random() < 0.5:
            longest = tuple(int(o.diff().max()) for o in offsets)
    elif choose.random() < 0.7:
        shown = torch.rand(b, t) < 0.7
        shown[0, :3] = False
        options["shown"] = shown.to(DEVICE)
    buckets = choose.choice([8, 12])
    tensors: dict[str, Tensor | None] = {
        "q": torch.randn(b, s, h, d).double().transpose(1, 2) / math.sqrt(options["scale"] * d**0.5),
        "k": torch.randn(b, t, h, d).double().transpose(1, 2) / math.sqrt(options["scale"] * d**0.5),
        "v": torch.randn(b, h, t, d).double(),
        "table": None if kind == "cross" else torch.randn(buckets, h).double(),
    }
    number = choose.randint(0, 1 << 40)
    truth = dict(options)
    if dropout:
        mask = kernels.biased_attention.__globals__["attention_dropout_mask"]
        truth |= {"kept": mask(number, dropout, b, h, s, t, DEVICE), "rate": dropout}
    said = f"seed {seed}, {kind}, q {(b, h, s, d)}, t {t}, dropout {dropout}, {options}"
    agree(
        lambda q, k, v, table: attention(q, k, v, table, longest=longest, dropout=dropout, seed=number, **options),
        lambda q, k, v, table: reference.biased_attention(q, k, v, table, **truth),
        tensors, dtype, said, trained=dict.fromkeys(frozen, False),
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, dtype: torch.dtype, dropout: float) -> None:
    for seed in random.sample(range(10_000), 1 if INTERPRETED else 4):
        check(shardtune_kernels, seed, kind, dtype, dropout)
