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


def check(kernels: Any, seed: int, dtypes: list[torch.dtype] = DTYPES) -> None:
    """Random shapes, with and without parameters and a residual, rows held whole and read in blocks."""
    rng = seed_everything(seed)
    module = importlib.import_module(f"{kernels.__name__}.layer_norm")
    everything = len(dtypes) == 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "summing_programs", lambda rows, width: 1)  # so that one has several tiles
        for dtype, blocks, residual in product(dtypes, (False, True), (False, True)):
            for name, widest in (("WIDEST", 16384), ("WIDEST_BACKWARD", 8192)):
                patched.setattr(module, name, 32 if blocks else widest)
            shape = (2, 2, rng.randint(33, 96)) if blocks else (rng.randint(3, 5), 9, rng.randint(33, 140))
            tensors: dict[str, torch.Tensor | None] = {
                "x": torch.randn(shape, dtype=torch.float64) * rng.choice([0.5, 3.0]) + rng.choice([-1.0, 0.0, 2.0]),
                "weight": torch.randn(shape[-1], dtype=torch.float64) if everything or rng.random() < 0.7 else None,
                "bias": torch.randn(shape[-1], dtype=torch.float64) if everything or rng.random() < 0.7 else None,
            }
            if residual:
                tensors["residual"] = torch.randn(shape, dtype=torch.float64)
            dtypes_of = {"weight": rng.choice([dtype, torch.float32])}
            dtypes_of["bias"] = dtypes_of["weight"]
            eps = rng.choice([1e-6, 1e-2])
            op, truth = partial(kernels.layer_norm, eps=eps), partial(reference.layer_norm, eps=eps)
            agree(op, truth, tensors, dtype, (seed, shape, blocks), dtypes_of)


@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


def test_any_seed() -> None:
    check(shardtune_kernels, random.SystemRandom().randrange(1 << 30))


@pytest.mark.parametrize(("x", "weight"), list(product(DTYPES, DTYPES)))
def test_the_result_has_the_dtype_of_x(x: torch.dtype, weight: torch.dtype) -> None:
    tensors = [torch.randn(2, 8, dtype=x), torch.randn(8, dtype=weight), torch.randn(8, dtype=weight)]
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    got, wanted = shardtune_kernels.layer_norm(*tensors, 1e-6), reference.layer_norm(*tensors, 1e-6)
    assert got.dtype == x
    torch.testing.assert_close(got, wanted)


def test_the_mean_may_be_far_from_zero() -> None:
    x = torch.randn(5, 100, device=DEVICE) + 1000.0
    got, wanted = shardtune_kernels.layer_norm(x, None, None, 1e-6), reference.layer_norm(x.double(), None, None, 1e-6)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-3)


def test_only_what_came_with_x_flows_where_y_is_not_used() -> None:
    x, residual = (torch.randn(3, 20, device=DEVICE, requires_grad=True) for _ in range(2))
    _, total = shardtune_kernels.layer_norm(x, None, None, 1e-6, residual)
    total.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(residual.grad, torch.ones_like(x))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (1, 3), (1, 300), (7,), (70, 3)])
def test_edges(shape: tuple[int, ...]) -> None:
    tensors = {name: torch.randn(shape[-1], dtype=torch.float64) for name in ("weight", "bias")}
    tensors["x"] = torch.randn(shape, dtype=torch.float64)
    op, truth = partial(shardtune_kernels.layer_norm, eps=0.5), partial(reference.layer_norm, eps=0.5)
    agree(op, truth, tensors, torch.float32, shape)


def test_rows_without_columns() -> None:
    assert shardtune_kernels.layer_norm(torch.zeros(3, 0), None, None, 1e-6).shape == (3, 0)


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(6, 3, 50, dtype=torch.float64)
    op, truth = partial(shardtune_kernels.layer_norm, eps=1e-3), partial(reference.layer_norm, eps=1e-3)
    for x in (wide[..., 7:41], wide[..., :34].transpose(0, 1), wide[:, :, ::2]):
        tensors = {name: torch.randn(2 * x.shape[-1], dtype=torch.float64)[::2] for name in ("weight", "bias")}
        agree(op, truth, {"x": x, **tensors}, torch.float32, x.stride())


@pytest.mark.parametrize("needed", list(product((False, True), repeat=3)))
def test_only_what_is_needed_gets_a_gradient(needed: tuple[bool, ...]) -> None:
    given = [
        torch.randn(*shape, device=DEVICE).requires_grad_(own)
        for shape, own in zip(((4, 40), (40,), (40,)), needed, strict=True)
    ]
    y = shardtune_kernels.layer_norm(*given, 1e-6)
    assert y.requires_grad == any(needed)
    if y.requires_grad:
        y.backward(torch.randn_like(y))
    assert tuple(tensor.grad is not None for tensor in given) == needed


def test_what_does_not_fit_is_an_error() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="weight must be as wide as x"):
        shardtune_kernels.layer_norm(x, torch.zeros(5), None, 1e-6)
    with pytest.raises(ValueError, match="bias must be as wide as x"):
        shardtune_kernels.layer_norm(x, torch.zeros(4), torch.zeros(1), 1e-6)
    with pytest.raises(ValueError, match="must have the shape of x"):
        shardtune_kernels.layer_norm(x, None, None, 1e-6, residual=torch.zeros(4))


def test_compiled() -> None:
    tensors = {"x": torch.randn(3, 20), "weight": torch.randn(20), "bias": torch.randn(20)}
    tensors["residual"] = torch.randn(3, 20)
    same_when_compiled(partial(shardtune_kernels.layer_norm, eps=1e-6), tensors)


MUTANTS = [
    Mutant("forward: always the same row", "layer_norm", "tl.program_id(0).to(tl.int64) * ROWS +", "1 +"),
    Mutant("forward: - eps", "layer_norm", "tl.sum(centred * centred, axis=1, keep_dims=True) / width + eps",
           "tl.sum(centred * centred, axis=1, keep_dims=True) / width - eps"),
    Mutant("forward: columns beyond the end are centred", "layer_norm",
           "centred = tl.where(inside, x - mean, 0.0)\n        rstd", "centred = x - mean\n        rstd"),
    Mutant("forward: residual of the row before", "_rows", "residual_ptr + row * residual_stride",
           "residual_ptr + (row - 1) * residual_stride"),
    Mutant("forward: - bias", "layer_norm", "normed = normed + tl.load(bias", "normed = normed - tl.load(bias"),
    Mutant("forward: weight of the next column", "layer_norm", "tl.load(weight_ptr + column,",
           "tl.load(weight_ptr + 1 + column,"),
    Mutant("forward, in blocks: mean of the last block", "layer_norm", "sums += x", "sums = x"),
    Mutant("forward, in blocks: squares without a mask", "layer_norm",
           "centred = tl.where(inside, x - mean, 0.0)\n            squares", "centred = x - mean\n            squares"),
    Mutant("forward, in blocks: + mean", "layer_norm", "_scaled((x - mean)", "_scaled((x + mean)"),
    Mutant("backward: + normed", "layer_norm", "rstd * (g - normed", "rstd * (g + normed"),
    Mutant("backward: - what comes to the sum", "layer_norm", "dx += tl.load(", "dx -= tl.load("),
    Mutant("backward: one tile too few", "layer_norm", "tl.cdiv(rows, ROWS), tl.n", "tl.cdiv(rows, ROWS) - 1, tl.n"),
    Mutant("backward: rstd of the next row", "layer_norm", "tl.load(rstd_ptr + row,", "tl.load(rstd_ptr + 1 + row,"),
    Mutant("backward: weight's gradient of the last tile only", "layer_norm", "dweight += dy", "dweight = dy"),
    Mutant("backward: bias' gradient of the last tile only", "layer_norm", "dbias += dy", "dbias = dy"),
    Mutant("backward: first column is not written", "layer_norm",
           "tl.store(dx_ptr + row * width + column, dx, mask=inside)",
           "tl.store(dx_ptr + row * width + column, dx, mask=inside & (column > 0))"),
    Mutant("backward: sums of the next column", "layer_norm", "tl.store(sums_ptr + program.to(tl.int64) * width +",
           "tl.store(sums_ptr + 1 + program.to(tl.int64) * width +"),
    Mutant("backward, in blocks: no sum", "layer_norm", "tl.load(own, mask=column < width) + tl.sum", "tl.sum"),
    Mutant("backward, in blocks: last block only", "layer_norm", "ones += g", "ones = g"),
]  # fmt: skip


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_broken_kernel_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, lambda kernels: check(kernels, 0, [torch.float32]), tmp_path)
