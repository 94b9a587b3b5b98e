from __future__ import annotations

import importlib
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted

import shardtune_kernels
from shardtune_kernels import reference

KINDS = ("llama", "t5", "gemma")


def check(kernels: Any, seed: int, dtypes: list[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS) -> None:
    """Random shapes, with and without a residual, rows held whole and read in blocks."""
    rng = seed_everything(seed)
    module = importlib.import_module(f"{kernels.__name__}.rms_norm")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "summing_programs", lambda rows, width: 1)  # so that one has several tiles
        for (dtype, kind), blocks in product(product(dtypes, kinds), (False, True)):
            for name, widest in (("WIDEST", 16384), ("WIDEST_BACKWARD", 8192)):
                patched.setattr(module, name, 32 if blocks else widest)
            shape = (2, 2, rng.randint(33, 96)) if blocks else (rng.randint(3, 5), 9, rng.randint(33, 140))
            residual = rng.random() < 0.5 or len(dtypes) == 1
            tensors = {
                "x": torch.randn(shape, dtype=torch.float64) * rng.choice([0.1, 1.0, 10.0]),
                "weight": torch.randn(shape[-1], dtype=torch.float64),
            }
            if residual:
                tensors["residual"] = torch.randn(shape, dtype=torch.float64)
            kinds_of = {"weight": rng.choice([dtype, torch.float32])}
            given = {"eps": rng.choice([1e-6, 1e-2]), "kind": kind}
            agree(
                partial(kernels.rms_norm, **given), partial(reference.rms_norm, **given), tensors, dtype,
                (seed, shape, kind, blocks), kinds_of,
            )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


def test_any_seed() -> None:
    check(shardtune_kernels, random.SystemRandom().randrange(1 << 30))


@pytest.mark.parametrize(("x", "weight", "kind"), list(product(DTYPES, DTYPES, KINDS)))
def test_the_result_has_the_dtype_of_the_reference(x: torch.dtype, weight: torch.dtype, kind: str) -> None:
    tensors = torch.randn(2, 8, dtype=x, device=DEVICE), torch.randn(8, dtype=weight, device=DEVICE)
    got, wanted = shardtune_kernels.rms_norm(*tensors, 1e-6, kind), reference.rms_norm(*tensors, 1e-6, kind)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_rounds_where_the_reference_does(kind: str) -> None:
    x = torch.randn(9, 500, device=DEVICE).bfloat16()
    weight = torch.randn(500, device=DEVICE).bfloat16()
    got, wanted = shardtune_kernels.rms_norm(x, weight, 1e-6, kind), reference.rms_norm(x, weight, 1e-6, kind)
    assert (got != wanted).sum() <= 5  # a sum in another order may turn one that is nearly in the middle


def test_a_residual_of_another_dtype() -> None:
    x = torch.randn(3, 20, device=DEVICE).bfloat16().requires_grad_()
    residual = torch.randn(3, 20, device=DEVICE).requires_grad_()
    weight = torch.randn(20, device=DEVICE)
    y, total = shardtune_kernels.rms_norm(x, weight, 1e-6, "llama", residual)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(total, x.detach() + residual.detach())
    (y.sum() + total.sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    torch.testing.assert_close(x.grad, residual.grad.bfloat16())


def test_only_what_came_with_x_flows_where_y_is_not_used() -> None:
    x, residual = (torch.randn(3, 20, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, device=DEVICE, requires_grad=True)
    _, total = shardtune_kernels.rms_norm(x, weight, 1e-6, "llama", residual)
    total.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(residual.grad, torch.ones_like(x))
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0), (1, 1), (1, 300), (7,), (70, 3)])
def test_edges(shape: tuple[int, ...]) -> None:
    tensors = {"x": torch.randn(shape, dtype=torch.float64), "weight": torch.randn(shape[-1], dtype=torch.float64)}
    given = {"eps": 0.5, "kind": "llama"}
    agree(
        partial(shardtune_kernels.rms_norm, **given),
        partial(reference.rms_norm, **given),
        tensors,
        torch.float32,
        shape,
    )


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(6, 3, 50, dtype=torch.float64)
    for x in (wide[..., 7:41], wide[..., :34].transpose(0, 1), wide.transpose(1, 2)[:, :, :1].expand(6, 50, 34)):
        weight = torch.randn(2 * x.shape[-1], dtype=torch.float64)[::2]
        given = {"eps": 1e-3, "kind": "gemma"}
        agree(
            partial(shardtune_kernels.rms_norm, **given), partial(reference.rms_norm, **given),
            {"x": x, "weight": weight}, torch.float32, x.stride(), trained={"x": x.stride(-1) == 1},
        )  # fmt: skip


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_gets_a_gradient(of_x: bool, of_weight: bool) -> None:
    x = torch.randn(4, 40, device=DEVICE, requires_grad=of_x)
    weight = torch.randn(40, device=DEVICE, requires_grad=of_weight)
    y = shardtune_kernels.rms_norm(x, weight, 1e-6)
    assert y.requires_grad == (of_x or of_weight)
    if y.requires_grad:
        y.backward(torch.randn_like(y))
    assert [x.grad is not None, weight.grad is not None] == [of_x, of_weight]


def test_what_does_not_fit_is_an_error() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(4)
    with pytest.raises(ValueError, match="kind must be one of"):
        shardtune_kernels.rms_norm(x, weight, 1e-6, "other")
    with pytest.raises(ValueError, match="weight must be as wide as x"):
        shardtune_kernels.rms_norm(x, torch.zeros(5), 1e-6)
    with pytest.raises(ValueError, match="must have the shape of x"):
        shardtune_kernels.rms_norm(x, weight, 1e-6, residual=torch.zeros(4))


def test_compiled() -> None:
    tensors = {"x": torch.randn(3, 20), "weight": torch.randn(20), "residual": torch.randn(3, 20)}
    same_when_compiled(partial(shardtune_kernels.rms_norm, eps=1e-6), tensors)


MUTANTS = [
    Mutant("forward: + x² for the next row", "rms_norm", "tl.program_id(0).to(tl.int64) * ROWS +", "1 +"),
    Mutant("forward: - eps", "rms_norm", "tl.sum(x * x, axis=1, keep_dims=True) / width + eps",
           "tl.sum(x * x, axis=1, keep_dims=True) / width - eps"),
    Mutant("forward: reads over the end of a row", "_rows",
           "mask=inside, other=0.0).to(tl.float32)\n    if residual_ptr",
           "mask=row >= 0, other=0.0).to(tl.float32)\n    if residual_ptr"),
    Mutant("forward: residual of the row before", "_rows", "residual_ptr + row * residual_stride",
           "residual_ptr + (row - 1) * residual_stride"),
    Mutant("forward: gemma subtracts", "rms_norm", "return 1.0 + weight", "return 1.0 - weight"),
    Mutant("forward: weight of the next column", "rms_norm", "tl.load(weight_ptr + column,",
           "tl.load(weight_ptr + 1 + column,"),
    Mutant("forward, in blocks: last block only", "rms_norm", "squares += x * x", "squares = x * x"),
    Mutant("forward, in blocks: - eps", "rms_norm", "tl.sum(squares, axis=1, keep_dims=True) / width + eps",
           "tl.sum(squares, axis=1, keep_dims=True) / width - eps"),
    Mutant("backward: + normed", "rms_norm", "rstd * (g - normed * mean)", "rstd * (g + normed * mean)"),
    Mutant("backward: what comes to the sum is lost", "rms_norm",
           "dx += tl.load(dtotal_ptr", "dx -= tl.load(dtotal_ptr"),
    Mutant("backward: one tile too few", "rms_norm", "tl.cdiv(rows, ROWS), tl.num", "tl.cdiv(rows, ROWS) - 1, tl.num"),
    Mutant("backward: rstd of the next row", "rms_norm", "tl.load(rstd_ptr + row,", "tl.load(rstd_ptr + 1 + row,"),
    Mutant("backward: weight's gradient of the last tile only", "rms_norm", "dweight += dy", "dweight = dy"),
    Mutant("backward: sums of the next column", "rms_norm", "width + column\n        tl.store(own, tl.sum(dweight",
           "width + column + 1\n        tl.store(own, tl.sum(dweight"),
    Mutant("backward: first column is not written", "rms_norm",
           "tl.store(dx_ptr + row * width + column, dx, mask=inside)\n            if",
           "tl.store(dx_ptr + row * width + column, dx, mask=inside & (column > 0))\n            if"),
    Mutant("backward, in blocks: no sum", "rms_norm", "tl.load(own, mask=column < width) + more", "more"),
    Mutant("backward, in blocks: last block only", "rms_norm", "products += dy", "products = dy"),
]  # fmt: skip


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_broken_kernel_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    kinds = ("gemma",) if "gemma" in mutant.what else ("llama",)
    assert is_noticed(mutant, lambda kernels: check(kernels, 0, [torch.float32], kinds), tmp_path)
