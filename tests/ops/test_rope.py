from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import reference

FROZEN = {"cos": False, "sin": False}


def drawn(rng: random.Random, partly: bool, transposed: bool) -> dict[str, Tensor]:
    """Random shapes; as much of each head rotated as `partly` says."""
    batch, length, width = rng.randint(1, 2), rng.randint(5, 8), 2 * rng.randint(5, 20)
    turned = 2 * rng.randint(2, width // 2 - 1) if partly else width
    heads = rng.randint(2, 5), rng.randint(2, 3)
    tensors = {}
    for name, count in zip("qk", heads, strict=True):
        shape = (batch, length, count, width) if transposed else (batch, count, length, width)
        own = torch.randn(shape, dtype=torch.float64)
        tensors[name] = own.transpose(1, 2) if transposed else own
    tables = rng.choice([1, batch]), length, turned
    return {**tensors, "cos": torch.randn(tables, dtype=torch.float64), "sin": torch.randn(tables, dtype=torch.float64)}


def check(kernels: Any, seed: int, dtypes: list[torch.dtype] = DTYPES) -> None:
    """Whole heads and parts of them, as transposed views and as they are; few heads a program."""
    rng = seed_everything(seed)
    module = importlib.import_module(f"{kernels.__name__}.rope")
    with pytest.MonkeyPatch.context() as patched:
        for dtype in dtypes:
            for partly, transposed in ((False, True), (True, True), (True, False)):
                patched.setattr(module, "PAIRS", 32)
                tensors = drawn(rng, partly, transposed)
                table = {"cos": rng.choice([dtype, torch.float32])}
                table["sin"] = table["cos"]
                said = seed, {name: tensor.shape for name, tensor in tensors.items()}
                agree(kernels.rope, reference.rope, tensors, dtype, said, table, FROZEN)


@pytest.mark.parametrize("seed", range(2))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


def test_any_seed() -> None:
    check(shardtune_kernels, random.SystemRandom().randrange(1 << 30))


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_results_have_the_dtype_that_torch_promotes_to(dtype: torch.dtype, table: torch.dtype) -> None:
    given = drawn(random.Random(0), True, True)
    given = {name: own.to(DEVICE, table if name in FROZEN else dtype) for name, own in given.items()}
    given["k"] = given["k"].float()
    for got, wanted in zip(shardtune_kernels.rope(**given), reference.rope(**given), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@only_interpreted
def test_results_lie_in_memory_as_what_came() -> None:
    given = {name: own.float() for name, own in drawn(random.Random(1), False, True).items()}
    q, k = shardtune_kernels.rope(**given)
    assert (q.stride(), k.stride()) == (given["q"].stride(), given["k"].stride())


@pytest.mark.parametrize("heads", [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize(("batch", "length"), [(2, 3), (0, 3), (2, 0), (1, 1)])
def test_edges(batch: int, length: int, heads: tuple[int, int]) -> None:
    tensors = {n: torch.randn(batch, h, length, 6, dtype=torch.float64) for n, h in zip("qk", heads, strict=True)}
    tables = {name: torch.randn(1, length, 6, dtype=torch.float64) for name in FROZEN}
    agree(shardtune_kernels.rope, reference.rope, tensors | tables, torch.float32, trained=FROZEN)


def test_slices_of_one_projection() -> None:
    fused = torch.randn(2, 5, 7 * 12, dtype=torch.float64).view(2, 5, 7, 12).transpose(1, 2)
    tables = {name: torch.randn(2, 12, 5, dtype=torch.float64).transpose(1, 2) for name in FROZEN}
    tensors = {"q": fused[:, :4], "k": fused[:, 4:6], **tables}
    agree(shardtune_kernels.rope, reference.rope, tensors, torch.float32, trained=FROZEN)
    tensors = {"q": fused[..., :6], "k": fused[..., ::2], **{name: table[..., :6] for name, table in tables.items()}}
    agree(shardtune_kernels.rope, reference.rope, tensors, torch.float32, trained=FROZEN)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_is_needed_gets_a_gradient(needed: tuple[bool, bool]) -> None:
    given = {name: own.float().to(DEVICE) for name, own in drawn(random.Random(2), False, True).items()}
    q, k = (given[name].requires_grad_(own) for name, own in zip("qk", needed, strict=True))
    turned = shardtune_kernels.rope(**given)
    turned[needed.index(True)].sum().backward()
    assert (q.grad is not None, k.grad is not None) == needed


def test_what_does_not_fit_is_an_error() -> None:
    q, table = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="q and k must be"):
        shardtune_kernels.rope(q, torch.zeros(1, 2, 5, 4), table, table)
    with pytest.raises(ValueError, match="must both be"):
        shardtune_kernels.rope(q, q, table, table[..., :2])
    with pytest.raises(ValueError, match="must both be"):
        shardtune_kernels.rope(q, q, table.expand(2, 3, 4), table.expand(2, 3, 4))
    with pytest.raises(ValueError, match="must be even"):
        shardtune_kernels.rope(q, q, table[..., :3], table[..., :3])
    with pytest.raises(ValueError, match="no more than"):
        shardtune_kernels.rope(q, q, torch.zeros(1, 3, 6), torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match="get no gradients"):
        shardtune_kernels.rope(q, q, table.requires_grad_(), table)


def test_compiled() -> None:
    tensors = {name: own.float() for name, own in drawn(random.Random(3), True, False).items()}
    same_when_compiled(shardtune_kernels.rope, tensors, ("cos", "sin"))


OF_BACKWARD = "sin, other_sin = -other_sin, -sin"
MUTANTS = [
    Mutant(what, "rope", old, new)
    for what, old, new in (
        ("turned the other way", "first * cos - second * sin", "first * cos + second * sin"),
        ("forward's rotation in backward", OF_BACKWARD, "sin, other_sin = sin, other_sin"),
        ("halves of sin in backward", OF_BACKWARD, "sin, other_sin = -sin, -other_sin"),
        ("pairs side by side", "tl.load(x_ptr + half + pair", "tl.load(x_ptr + 1 + pair"),
        ("first half of cos twice", "tl.load(cos_ptr + half", "tl.load(cos_ptr"),
        ("writes over the end of a half", "first * other_sin, mask=inside", "first * other_sin, mask=head < heads"),
        ("the rest is shifted", "tl.load(x_ptr + column, mask=stays)", "tl.load(x_ptr + column - 1, mask=stays)"),
        ("heads of k after those of q", "(block - q_blocks) * HEADS", "block * HEADS"),
        ("tokens of the first row", "tl.program_id(0) // length", "0 * tl.program_id(0)"),
        ("table of the first row", "batch * sin_batch", "0 * sin_batch"),
    )
]


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_broken_kernel_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, lambda kernels: check(kernels, 0, [torch.float32]), tmp_path)
