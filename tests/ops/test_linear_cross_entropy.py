"""linear_cross_entropy beside functional.cross_entropy of all logits."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comparing
import pytest
import torch
from comparing import DEVICE, agree, distance, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import linear_cross_entropy, reference

HALVES = [torch.float16, torch.bfloat16]


def tensors_of(rows: int, width: int, classes: int, biased: bool, ignored: float, size: float = 1.0) -> dict[str, Any]:
    """Logits of about `size`; `ignored`: the share of targets."""
    targets = torch.randint(classes, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return {
        "hidden": torch.randn(rows, width, dtype=torch.float64) * size,
        "weight": torch.randn(classes, width, dtype=torch.float64) / width**0.5,
        "targets": targets,
        "bias": torch.randn(classes, dtype=torch.float64) if biased else None,
    }


def sides(kernels: Any, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The op and its reference; `chunk_bytes` is no option of the reference."""
    others = {name: value for name, value in options.items() if name != "chunk_bytes"}
    return (
        lambda **given: kernels.linear_cross_entropy(**given, **options),
        lambda **given: reference.linear_cross_entropy(**given, **others),
    )


def bytes_of(rows: int, width: int, classes: int, dtype: torch.dtype) -> int:
    """Of temporaries for chunks of `rows`."""
    return rows * (dtype.itemsize * (classes + 3 * width) + (4 * classes if not comparing.INTERPRETED else 0))


def agree_on_average(
    op: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    draws: list[dict[str, Any]],
    dtype: torch.dtype,
    said: object,
) -> None:  # fmt: skip
    """As `agree` in 16 bits, of the root mean square of the errors over several draws: that of one number is luck."""
    own: dict[str, float] = {}
    plain: dict[str, float] = {}
    for tensors in draws:
        rounded = {
            name: value.to(DEVICE, dtype) if value is not None and value.is_floating_point() else
            None if value is None else value.to(DEVICE)
            for name, value in tensors.items()
        }  # fmt: skip
        needed = [name for name, value in rounded.items() if value is not None and value.is_floating_point()]
        exact = comparing._run(truth, {n: v.double() if n in needed else v for n, v in rounded.items()}, needed, None)
        for found, function in ((own, op), (plain, truth)):
            for name, got in comparing._run(function, rounded, needed, None).items():
                found[name] = found.get(name, 0.0) + distance(got, exact[name]) ** 2 / len(draws)
    for name, error in own.items():
        limit = max(comparing.WORSE * plain[name] ** 0.5, comparing.FLOAT32_LIMIT)
        assert error**0.5 <= limit, f"{said}: {name} in {dtype} is off by {error**0.5:.3g}, allowed are {limit:.3g}"


def check(kernels: Any, seed: int) -> None:
    """Values and gradients over ragged shapes, options, chunks and dtypes."""
    drawn = seed_everything(seed)
    shapes = [(drawn.randint(1, 9), drawn.randint(1, 70), v) for v in (1, 2, 17, drawn.randint(100, 1000))]
    shapes += [(3, drawn.randint(1, 9), drawn.randint(8193, 20_000))]
    for number, (rows, width, classes) in enumerate(shapes):
        options = {
            "soft_cap": [None, drawn.uniform(2.0, 30.0)][(seed + number) % 2],
            "label_smoothing": [0.0, drawn.uniform(0.05, 0.5)][(seed + number // 2) % 2],
            "scale": drawn.choice([1.0, drawn.uniform(0.1, 2.0)]),
            "chunk_bytes": bytes_of(drawn.randint(1, rows), width, classes, torch.float32),
        }
        biased, ignored = drawn.random() < 0.5, drawn.choice([0.0, 0.4])
        tensors = tensors_of(rows, width, classes, biased, ignored)
        said = (seed, rows, width, classes, biased, ignored, options)
        agree(*sides(kernels, **options), tensors, torch.float32, said)
    for dtype in HALVES:
        rows, width, classes = drawn.randint(9, 20), drawn.randint(17, 50), drawn.randint(20, 300)
        options = {"chunk_bytes": bytes_of(drawn.randint(3, 8), width, classes, dtype)}
        draws = [tensors_of(rows, width, classes, number % 2 == 0, 0.2) for number in range(6)]
        agree_on_average(*sides(kernels, **options), draws, dtype, (seed, rows, width, classes, options))
    check_rescale(importlib.import_module(f"{kernels.__name__}._linear_cross_entropy_kernels").start_rescale)


def check_rescale(start_rescale: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """What lies behind the numbers stays what it was; in place, over two dtypes, and by 1."""
    if not (comparing.INTERPRETED or DEVICE.type == "cuda"):
        return
    for factor in (1.0, -0.375):
        for source, out in [(d, d) for d in comparing.DTYPES] + [(torch.bfloat16, torch.float16)]:
            x = torch.randn(5000, device=DEVICE).to(source)
            memory = x.clone()
            start_rescale(memory[:4999], memory.view(out)[:4999], torch.tensor(factor, device=DEVICE))
            torch.testing.assert_close(memory.view(out)[:4999], (x[:4999].float() * factor).to(out), rtol=0, atol=0)
            assert memory[4999] == x[4999]


@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


@pytest.mark.parametrize("size", [10.0, 30.0])
def test_large_logits(size: float) -> None:
    seed_everything(int(size))
    for options in ({}, {"soft_cap": 30.0}, {"label_smoothing": 0.1}):
        agree(*sides(shardtune_kernels, **options), tensors_of(7, 33, 1000, True, 0.0, size), torch.float32, options)


def test_many_classes() -> None:
    seed_everything(1)
    agree(*sides(shardtune_kernels), tensors_of(3, 5, 33_000, False, 0.0), torch.float32)


def test_many_chunks_in_16_bits_are_as_good_as_one() -> None:
    """40 partial sums of the weight's gradient, each rounded to 16 bits, would be several times worse than one."""
    for dtype, size in [(torch.float16, 1.0), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e3)]:
        seed_everything(2)
        draws = [tensors_of(40, 24, 10, False, 0.0) for _ in range(2)]
        draws = [draw | {"hidden": draw["hidden"].abs() * size, "weight": draw["weight"] / size} for draw in draws]
        agree_on_average(*sides(shardtune_kernels, chunk_bytes=1), draws, dtype, size)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", ""])
def test_only_needed_gradients_are_made(trained: str) -> None:
    seed_everything(3)
    tensors = tensors_of(6, 7, 20, True, 0.3)
    given = {n: v.to(DEVICE, torch.float32) if v.is_floating_point() else v.to(DEVICE) for n, v in tensors.items()}
    if trained:
        given[trained].requires_grad_()
    loss = linear_cross_entropy(**given, chunk_bytes=bytes_of(2, 7, 20, torch.float32))
    assert loss.requires_grad == bool(trained)
    wanted = reference.linear_cross_entropy(**given)
    torch.testing.assert_close(loss, wanted)
    if trained:
        (own,) = torch.autograd.grad(loss, given[trained])
        torch.testing.assert_close(own, torch.autograd.grad(wanted, given[trained])[0])
        assert all(value.grad is None for value in given.values())


def test_mixed_dtypes() -> None:
    """A float32 weight and 16-bit hidden states, and the other way round."""
    for hidden, weight in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16,) * 2]:
        seed_everything(4)
        tensors = tensors_of(60, 40, 50, False, 0.1)
        options = {"chunk_bytes": bytes_of(13, 40, 50, hidden)}
        dtypes = {"hidden": hidden, "weight": weight}
        agree(*sides(shardtune_kernels, **options), tensors, hidden, (hidden, weight), dtypes)
    tensors = tensors_of(9, 8, 30, True, 0.0)
    dtypes = {"weight": torch.bfloat16, "bias": torch.float16}
    made = {n: v if v.dtype == torch.int64 else v.to(DEVICE, dtypes.get(n, torch.float32)) for n, v in tensors.items()}
    made = {n: v.to(DEVICE) if v.dtype == torch.int64 else v.requires_grad_() for n, v in made.items()}
    linear_cross_entropy(**made).backward()
    wanted = {n: v.detach().float().requires_grad_() if v.is_floating_point() else v for n, v in made.items()}
    reference.linear_cross_entropy(**wanted).backward()
    for name in ("hidden", "weight", "bias"):
        assert made[name].grad.dtype == made[name].dtype
        torch.testing.assert_close(made[name].grad, wanted[name].grad.to(made[name].dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", comparing.DTYPES)
def test_no_width(dtype: torch.dtype) -> None:
    """The bias alone makes the logits."""
    agree(*sides(shardtune_kernels, chunk_bytes=1), tensors_of(5, 0, 4, False, 0.0), dtype)
    agree(*sides(shardtune_kernels, chunk_bytes=1), tensors_of(5, 0, 4, True, 0.0), torch.float32)


def test_autocast_changes_nothing() -> None:
    seed_everything(10)
    tensors = tensors_of(12, 5, 30, True, 0.3)
    given = {n: v.to(DEVICE, torch.float32) if v.is_floating_point() else v.to(DEVICE) for n, v in tensors.items()}
    found = []
    for enabled in (False, True):
        leaves = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(**leaves, chunk_bytes=bytes_of(3, 5, 30, torch.float32))
        loss.backward()
        found.append([loss, *(leaves[n].grad for n in ("hidden", "weight", "bias"))])
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)


def test_float64_stays_float64() -> None:
    seed_everything(5)
    tensors = tensors_of(5, 4, 7, True, 0.2)
    options = {"soft_cap": 3.0, "label_smoothing": 0.2, "scale": 0.7, "chunk_bytes": 1}
    found = []
    for op in sides(shardtune_kernels, **options):
        given = {
            n: v.to(DEVICE).requires_grad_() if v.is_floating_point() else v.to(DEVICE) for n, v in tensors.items()
        }
        loss = op(**given)
        (loss / 3).backward()
        found.append([loss, given["hidden"].grad, given["weight"].grad, given["bias"].grad])
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_and_strides() -> None:
    seed_everything(6)
    hidden = torch.randn(3, 8, 5, device=DEVICE).transpose(0, 1)[:, :, ::2]
    weight = torch.randn(3, 11, device=DEVICE).T
    bias = torch.randn(22, device=DEVICE)[::2]
    targets = torch.randint(11, (3, 8), device=DEVICE).T
    found = []
    for op in (linear_cross_entropy, reference.linear_cross_entropy):
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = op(leaves[0], leaves[1], targets.to(torch.int64), leaves[2])
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted)
    one = linear_cross_entropy(hidden[0, 0], weight, targets[0, 0].to(torch.int32))
    torch.testing.assert_close(one, reference.linear_cross_entropy(hidden[0, :1], weight, targets[0, :1]))


@pytest.mark.parametrize("dtype", comparing.DTYPES)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_learn_has_gradients_of_zeros(rows: int, dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(n, 6, dtype=dtype, device=DEVICE, requires_grad=True) for n in (rows, 9))
    bias = torch.randn(9, device=DEVICE, requires_grad=True)
    targets = torch.full((rows,), 7, device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, targets, bias, ignore_index=7, chunk_bytes=1)
    assert loss == 0
    assert loss.dtype == torch.float32
    loss.backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_what_is_ignored_is_not_looked_at() -> None:
    seed_everything(7)
    hidden, weight = torch.randn(4, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    hidden[2] = math.nan
    targets = torch.tensor([1, 2, -100, 3], device=DEVICE)
    for dtype in comparing.DTYPES:
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, targets, chunk_bytes=1)
        loss.backward()
        assert loss.isfinite()
        for tensor in leaves:
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()


def test_a_weight_used_twice_and_freed_after_the_forward_pass() -> None:
    """An embedding tied to the head; its storage is gone by the time of the backward pass, as when it is sharded."""
    seed_everything(8)
    ids, targets = torch.randint(12, (2, 5), device=DEVICE)
    own, wanted = (torch.randn(12, 4, device=DEVICE).requires_grad_() for _ in range(2))
    wanted.data.copy_(own.data)
    loss = linear_cross_entropy(torch.tanh(own[ids]), own, targets)
    size = own.untyped_storage().nbytes()
    own.untyped_storage().resize_(0)
    loss.backward()
    own.untyped_storage().resize_(size)
    reference.linear_cross_entropy(torch.tanh(wanted[ids]), wanted, targets).backward()
    torch.testing.assert_close(own.grad, wanted.grad)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    loss = 0.5 * linear_cross_entropy(hidden, torch.randn(5, 4, device=DEVICE), torch.arange(3, device=DEVICE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((hidden, torch.randn(5, 3), targets), {}),
        ((hidden, weight, targets[:2]), {}),
        ((hidden, weight, targets.float()), {}),
        ((hidden, weight[:0], targets), {}),
        ((hidden, weight, targets, torch.randn(4)), {}),
        ((hidden, weight, targets), {"soft_cap": 0.0}),
        ((hidden, weight, targets), {"label_smoothing": 1.5}),
        ((hidden, weight, targets + 3), {}),
        ((hidden, weight, targets - 1), {}),
    ]
    for given, options in wrong:
        with pytest.raises(ValueError):
            linear_cross_entropy(*(tensor.to(DEVICE) for tensor in given), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype) -> None:
    seed_everything(9)
    tensors = tensors_of(6, 5, 30, True, 0.3)
    op = partial(linear_cross_entropy, soft_cap=4.0, chunk_bytes=bytes_of(2, 5, 30, dtype))
    same_when_compiled(op, {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()})


KERNELS = "_linear_cross_entropy_kernels"
MUTANTS = [
    Mutant("the target is added", KERNELS, "gradient -= tl.where(columns == target, 1.0, 0.0)",
           "gradient += tl.where(columns == target, 1.0, 0.0)"),
    Mutant("columns beyond the last count", KERNELS, 'tl.where(inside, z, float("-inf")), turned', "z, turned"),
    Mutant("columns are shifted", KERNELS, "columns = start + tl.arange(0, BLOCK)",
           "columns = start + 1 + tl.arange(0, BLOCK)"),
    Mutant("a block is skipped on the way back", KERNELS, "(blocks - 1 - index) * BLOCK", "(blocks - index) * BLOCK"),
    Mutant("the sum is not rescaled", KERNELS, "total * tl.exp(highest - higher)", "total"),
    Mutant("the next row is overwritten", KERNELS, "gradient.to(row.dtype.element_ty), mask=columns < stride)",
           "gradient.to(row.dtype.element_ty))"),
    Mutant("another row's target", KERNELS, "target = tl.load(targets + number)", "target = tl.load(targets)"),
    Mutant("smoothing is not subtracted", KERNELS, "gradient -= smoothing / classes", "gradient += 0.0"),
    Mutant("smoothing of the loss has the other sign", KERNELS, "loss += smoothing *", "loss -= smoothing *"),
    Mutant("the bias is forgotten", KERNELS, "z += tl.load(bias", "z += 0.0 * tl.load(bias"),
    Mutant("a cap is not differentiated", KERNELS, "gradient *= 1.0 - turned * turned", "gradient *= 1.0"),
    Mutant("tanh has a wrong series", KERNELS, "x * (1.0 + square * (-1.0 / 3", "x * (1.0 + square * (1.0 / 3"),
    Mutant("divided, not multiplied", KERNELS, ".to(tl.float32) * by", ".to(tl.float32) / by"),
    Mutant("numbers beyond the last are written", KERNELS,
           "tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)",
           "tl.store(out + places, x.to(out.dtype.element_ty))"),
    Mutant("numbers are shifted", KERNELS, "tl.load(source + places,", "tl.load(source + places + 1,"),
    Mutant("another dtype by 1 is skipped", KERNELS, "if not SAME or by != 1.0:", "if by != 1.0:"),
    Mutant("a chunk replaces the sum", "_linear_cross_entropy_chunks",
           "beta, self._first = 0 if self._first else 1, False",
           "beta, self._first = 0, False"),
]  # fmt: skip


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_broken_kernels_are_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, lambda kernels: [check(kernels, seed) for seed in range(2)], tmp_path)
