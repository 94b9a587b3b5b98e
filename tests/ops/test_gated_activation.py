from __future__ import annotations

import importlib
import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, distance, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted

import shardtune_kernels
from shardtune_kernels import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def check(
    kernels: Any, seed: int, dtypes: list[torch.dtype] = DTYPES, activations: tuple[str, ...] = ACTIVATIONS
) -> None:
    """Random shapes, contiguous and halves of one tensor; and the gradients that are written in place."""
    rng = seed_everything(seed)
    module = importlib.import_module(f"{kernels.__name__}.gated_activation")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "BLOCK", 64)
        for dtype, activation, halves in product(dtypes, activations, (False, True)):
            shape = rng.randint(2, 3), rng.randint(2, 5), rng.randint(30, 140)
            both = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64) * 2
            gate, up = both[..., : shape[-1]], both[..., shape[-1] :]
            tensors = {"gate": gate if halves else gate.contiguous(), "up": up if halves else up.contiguous()}
            op = partial(kernels.gated_activation, activation=activation)
            truth = partial(reference.gated_activation, activation=activation)
            agree(op, truth, tensors, dtype, (seed, shape, activation, halves))
        in_place(module, activations)


def in_place(module: Any, activations: tuple[str, ...]) -> None:
    for activation in activations:
        gate, up, dh = (torch.randn(3, 50, dtype=torch.float32, device=DEVICE) for _ in range(3))
        own = [gate.double().requires_grad_(), up.double().requires_grad_()]
        h = reference.gated_activation(own[0], own[1], activation)
        wanted = [h.detach(), *torch.autograd.grad(h, own, dh.double())]
        module.overwrite_with_gradients(dh, gate, up, activation)
        assert max(distance(got, exact) for got, exact in zip((dh, gate, up), wanted, strict=True)) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


def test_any_seed() -> None:
    check(shardtune_kernels, random.SystemRandom().randrange(1 << 30))


@pytest.mark.parametrize(("gate", "up"), list(product(DTYPES, DTYPES)))
def test_the_result_has_the_dtype_that_torch_promotes_to(gate: torch.dtype, up: torch.dtype) -> None:
    tensors = [torch.randn(2, 8, dtype=dtype).to(DEVICE).requires_grad_() for dtype in (gate, up)]
    got, wanted = (package.gated_activation(*tensors) for package in (shardtune_kernels, reference))
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2049,), (3, 1, 2)])
def test_edges(shape: tuple[int, ...]) -> None:
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name in ("gate", "up")}
    agree(shardtune_kernels.gated_activation, reference.gated_activation, tensors, torch.float32, shape)


def test_columns_that_lie_apart() -> None:
    tensors = {"gate": torch.randn(5, 7, dtype=torch.float64).T, "up": torch.randn(7, 10, dtype=torch.float64)[:, ::2]}
    agree(shardtune_kernels.gated_activation, reference.gated_activation, tensors, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy, in the interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: str) -> None:
    gate = torch.tensor([-80.0, -20.0, 20.0, 80.0], device=DEVICE, requires_grad=True)
    h = shardtune_kernels.gated_activation(gate, torch.ones_like(gate), activation)
    h.sum().backward()
    torch.testing.assert_close(h.detach().cpu(), torch.tensor([0.0, 0.0, 20.0, 80.0]), rtol=1e-6, atol=1e-6)
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad.cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_is_needed_gets_a_gradient(needed: tuple[bool, bool]) -> None:
    gate, up = (torch.randn(4, 40, device=DEVICE, requires_grad=own) for own in needed)
    shardtune_kernels.gated_activation(gate, up).sum().backward()
    assert (gate.grad is not None, up.grad is not None) == needed


def test_what_does_not_fit_is_an_error() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="activation must be one of"):
        shardtune_kernels.gated_activation(x, x, "tanh")
    with pytest.raises(ValueError, match="must have one shape"):
        shardtune_kernels.gated_activation(x, x[:1])


def test_compiled() -> None:
    same_when_compiled(shardtune_kernels.gated_activation, {"gate": torch.randn(3, 20), "up": torch.randn(3, 20)})


MUTANTS = [
    Mutant(what, "gated_activation", old, new)
    for what, old, new in (
        ("forward: - up", "row * width + column, act * up", "row * width + column, -act * up"),
        (
            "forward: rows of up",
            "up_ptr + row * up_stride + column, mask=inside).to(tl.float32)\n    act, _",
            "up_ptr + row * width + column, mask=inside).to(tl.float32)\n    act, _",
        ),
        (
            "forward: first column is not written",
            "row * width + column, act * up, mask=inside",
            "row * width + column, act * up, mask=inside & (column > 0)",
        ),
        ("forward: silu of -x", "share = tl.sigmoid(x)", "share = tl.sigmoid(-x)"),
        ("forward: gelu of the other tail", "0.5 * (1.0 + tl.erf", "0.5 * (1.0 - tl.erf"),
        ("forward: tanh without its cube", "x * (1.0 + 0.044715 * square)", "x"),
        ("forward: relu of -x", "tl.maximum(x, 0.0", "tl.maximum(-x, 0.0"),
        ("backward: silu's slope", "share * (1.0 + x * (1.0 - share))", "share * (1.0 - x * (1.0 - share))"),
        ("backward: gelu's slope", "share + x * 0.39", "share - x * 0.39"),
        ("backward: tanh's slope", "share + x * share", "share - x * share"),
        ("backward: relu's slope", "tl.where(x > 0.0, 1.0, 0.0)", "tl.where(x > 0.0, 0.0, 1.0)"),
        ("backward: dgate of the next column", "tl.store(dgate_ptr + out", "tl.store(dgate_ptr + 1 + out"),
        ("backward: dup with the slope", "dh * act, mask", "dh * slope, mask"),
        ("backward: first column is not written", "dh * act, mask=inside", "dh * act, mask=inside & (column > 0)"),
        ("backward: h in place", "tl.store(h_ptr + out, act * up", "tl.store(h_ptr + out, act + up"),
        ("backward: rows of dh", "dh_ptr + row * dh_stride", "dh_ptr + row * gate_stride"),
    )
]


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_broken_kernel_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, lambda kernels: check(kernels, 0, [torch.float32]), tmp_path)
