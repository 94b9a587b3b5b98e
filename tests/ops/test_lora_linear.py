"""LoRA linear layers, alone and several that read one input: values, gradients, dropout, broken kernels."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, distance, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import shardtune_kernels
from shardtune_kernels import FourBitWeight, LoraWeights, lora_linear, lora_qkv, reference
from shardtune_kernels.dropout import dropout_mask

RATES = [0.0, 0.25, 0.5]  # multiples of 2⁻¹⁶


def layer_tensors(n: int, k: int, rank: int | None, bias: bool, name: str = "") -> dict[str, Tensor | None]:
    """float64 weights of one layer; without an adapter if `rank` is None."""
    drawn = partial(torch.randn, dtype=torch.float64)
    return {
        f"w{name}": drawn(n, k) / k**0.5,
        f"bias{name}": drawn(n) if bias else None,
        f"a{name}": None if rank is None else drawn(rank, k) / k**0.5,
        f"b{name}": None if rank is None else drawn(n, rank) / rank**0.5,
    }


def random_layer(n: int, k: int, rank: int) -> LoraWeights:
    """Of float32, all of it trained."""
    shapes = (n, k), (n,), (rank, k), (n, rank)
    weight, bias, a, b = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    return LoraWeights(weight, bias, a, b, 0.5)


def check(
    kernels: Any, seed: int, dtype: torch.dtype, layers: int, lead: tuple[int, ...], k: int, rank: int, rate: float,
    trained: dict[str, bool] | None = None, dtypes: dict[str, torch.dtype] | None = None, adapted: bool = False,
) -> None:  # fmt: skip
    """`lora_qkv` of random layers, of which the ranks and outputs differ, beside the reference with the same masks."""
    choose = seed_everything(seed)
    tensors: dict[str, Tensor | None] = {"x": torch.randn(*lead, k, dtype=torch.float64)}
    scales, seeds = [], []
    outputs = [33, 40, 300] if dtype.itemsize < 4 else [1, 33, 40, 300]
    for name in range(layers):
        own = rank if name == 0 or adapted else choose.choice([rank, max(1, rank - 1), None])
        tensors |= layer_tensors(
            choose.choice(outputs),
            k,
            own,
            choose.random() < 0.5,
            str(name),
        )
        scales.append(choose.choice([1.0, 0.5, 2.0]))
        seeds.append(choose.randrange(1 << 31))
    drawn = importlib.import_module(f"{kernels.__name__}.dropout").dropout_mask
    masks = [drawn(one, rate, tensors["x"].shape, DEVICE) if rate else None for one in seeds]  # pyright: ignore

    def weights(given: dict[str, Any]) -> list[Any]:
        return [
            kernels.LoraWeights(given[f"w{i}"], given[f"bias{i}"], given[f"a{i}"], given[f"b{i}"], scales[i])
            for i in range(layers)
        ]

    agree(
        lambda **given: kernels.lora_qkv(given["x"], weights(given), rate, seeds),
        lambda **given: tuple(
            reference.lora_linear(given["x"], w, mask, rate) for w, mask in zip(weights(given), masks, strict=True)
        ),
        tensors, dtype, (seed, layers, lead, k, rank, rate), dtypes, trained,
    )  # fmt: skip


def check_kernels(kernels: Any) -> None:
    """Small shapes that every kernel runs for, with more than one block in each direction."""
    check(kernels, 1, torch.float32, 1, (70,), 140, 5, 0.0)
    check(kernels, 2, torch.float32, 3, (70,), 140, 5, 0.25, adapted=True)
    mask = importlib.import_module(f"{kernels.__name__}.dropout").dropout_mask(0, 0.25, (20, 100), DEVICE)
    assert 0.7 < float(mask.float().mean()) < 0.8
    check_up(kernels, 3, torch.float32)


def check_up(kernels: Any, seed: int, dtype: torch.dtype) -> None:
    """One layer with enough outputs that both of its skinny products read dy together."""
    torch.manual_seed(seed)
    tensors = {"x": torch.randn(300, 20, dtype=torch.float64), **layer_tensors(530, 20, 3, False)}
    products = importlib.import_module(f"{kernels.__name__}._lora_kernels")
    assert products.up_gradients_pay(300, 530, 3, dtype.itemsize)

    def op(of: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: None) -> Tensor:
        return of.lora_linear(x, kernels.LoraWeights(w, bias, a, b, 0.5))

    agree(partial(op, kernels), partial(op, reference), tensors, dtype, seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, seed: int) -> None:
    choose = seed_everything(seed)
    leads, widths, ranks = [(37,), (2, 19), (70,)], [24, 64, 130, 200], [3, 4, 16, 20]
    if dtype.itemsize == 4:  # a few numbers in 16 bits may be right by chance, those of the reference
        leads, widths, ranks = [*leads, (1,)], [*widths, 1, 5], [*ranks, 1]
    lead, k, rank = choose.choice(leads), choose.choice(widths), choose.choice(ranks)
    check(shardtune_kernels, seed, dtype, choose.choice([1, 2, 3, 4]), lead, k, rank, choose.choice(RATES))


@pytest.mark.parametrize("rank", [40, 70])
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("layers", [1, 2])
def test_larger_ranks(layers: int, rank: int, rate: float) -> None:
    check(shardtune_kernels, rank, torch.float32, layers, (33,), 24, rank, rate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_up_in_one_kernel(dtype: torch.dtype) -> None:
    check_up(shardtune_kernels, 0, dtype)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_adapters_in_float32_and_a_layer_in_bfloat16(rate: float) -> None:
    wide = dict.fromkeys(("a0", "b0", "a1", "b1", "bias0", "bias1"), torch.float32)
    check(shardtune_kernels, 4, torch.bfloat16, 2, (20,), 24, 4, rate, dtypes=wide)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [["x"], ["w0", "bias0"], ["a0"], ["b0"], ["w0", "a0", "b0", "x"], ["x", "w0", "b0"]])
def test_only_what_is_trained(frozen: list[str], rate: float) -> None:
    check(shardtune_kernels, 5, torch.float32, 1, (20,), 24, 4, rate, trained=dict.fromkeys(frozen, False))
    check(shardtune_kernels, 6, torch.float32, 2, (20,), 24, 4, rate, trained=dict.fromkeys(frozen, False))


def test_nothing_is_saved_for_frozen_layers() -> None:
    saved: list[Tensor] = []
    x, w = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.randn(5, 8, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, LoraWeights(w))
    assert [t.shape for t in saved] == [w.shape]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_empty(shape: tuple[int, ...], rate: float) -> None:
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    k = shape[-1]
    w = LoraWeights(
        torch.randn(5, k, device=DEVICE), None, torch.randn(3, k, device=DEVICE, requires_grad=True),
        torch.randn(5, 3, device=DEVICE, requires_grad=True),
    )  # fmt: skip
    y = lora_linear(x, w, rate)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5)
    assert not y.any()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for adapter in (w.a, w.b):
        assert adapter is not None
        assert adapter.grad is not None
        assert not adapter.grad.any()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_is_not_contiguous(rate: float) -> None:
    torch.manual_seed(0)
    tensors = layer_tensors(40, 24, 4, True)
    strided: dict[str, Tensor | None] = {n: None if t is None else _strided(t) for n, t in tensors.items()}
    strided["x"] = _strided(torch.randn(17, 24, dtype=torch.float64))
    mask = dropout_mask(3, rate, (17, 24), DEVICE)

    def op(function: Any, x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, LoraWeights(w, bias, a, b, 2.0))

    agree(
        partial(op, lambda x, w: lora_linear(x, w, rate, 3)),
        partial(op, lambda x, w: reference.lora_linear(x, w, mask if rate else None, rate)),
        strided, torch.float32, rate,
    )  # fmt: skip


def _strided(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack((tensor, tensor), -1)[..., 0]


def test_an_expanded_gradient_and_unused_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    given = [
        {n: t if t is None else t.float().to(DEVICE) for n, t in layer_tensors(7, 8, 2, True).items()} for _ in "qkv"
    ]
    layers = [LoraWeights(*of.values(), 0.5) for of in given]  # pyright: ignore
    lora_qkv(x, layers)[1].sum().backward()
    mine, x.grad = x.grad, None
    reference.lora_linear(x, layers[1]).sum().backward()
    assert mine is not None
    assert x.grad is not None
    torch.testing.assert_close(mine, x.grad)


def four_bit_weight(n: int, k: int, dtype: torch.dtype) -> FourBitWeight:
    """Random bytes."""
    packed = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=DEVICE)
    return FourBitWeight(packed, torch.rand(n * k // 64, device=DEVICE) + 0.5, (n, k), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_four_bit_weights(dtype: torch.dtype, rank: int | None) -> None:
    torch.manual_seed(0)
    weight = four_bit_weight(32, 64, dtype)
    tensors = {"x": torch.randn(3, 7, 64, dtype=torch.float64), **layer_tensors(32, 64, rank, True)}
    del tensors["w"]

    def op(function: Any, x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return function(x, LoraWeights(weight, bias, a, b, 2.0))

    agree(partial(op, lora_linear), partial(op, reference.lora_linear), tensors, dtype, rank)


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("bits", [4, 32])
def test_weights_are_looked_at_again_in_backward(bits: int, rate: float) -> None:
    """Sharded training takes a weight's memory away after forward, and fills other memory before backward."""
    torch.manual_seed(0)
    x = torch.randn(6, 64, device=DEVICE, requires_grad=True)
    four_bits = four_bit_weight(32, 64, torch.float32)
    held = torch.nn.Parameter(four_bits.packed if bits == 4 else torch.randn(32, 64, device=DEVICE), False)
    weight = FourBitWeight(held, four_bits.absmax, (32, 64), torch.float32) if bits == 4 else held
    a, b = (torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((3, 64), (32, 3)))
    wanted = torch.autograd.grad(lora_linear(x, LoraWeights(weight, None, a, b), rate, 7).sum(), [x, a, b])
    for swap in (_resized, _swapped):
        y = lora_linear(x, LoraWeights(weight, None, a, b), rate, 7)
        swap([held, a, b])
        torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, a, b]), wanted)


def _resized(parameters: list[torch.nn.Parameter]) -> None:
    """As FSDP2 does: the storage of the very same parameter shrinks and grows."""
    for parameter in parameters:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
            kept, storage = parameter.clone(), parameter.untyped_storage()
            size = storage.size()
            storage.resize_(0)
            storage.resize_(size)
            parameter.copy_(kept)


def _swapped(parameters: list[torch.nn.Parameter]) -> None:
    """As DeepSpeed's ZeRO-3 does: `data` is another tensor."""
    for parameter in parameters:
        kept = parameter.data.clone()
        parameter.data.view(torch.uint8).fill_(255)
        parameter.data = kept


def test_seeds_come_from_the_stream_that_recomputation_sets_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    parts = [torch.randn(shape, device=DEVICE) for shape in ((7, 16), (2, 16), (7, 2))]
    layer = LoraWeights(parts[0], None, parts[1].requires_grad_(), parts[2].requires_grad_())
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        call = partial(lora_linear, w=layer, dropout=0.5)
        y = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
        assert isinstance(y, Tensor)
        gradients.append(torch.autograd.grad(y.sum(), [x, *layer[2:4]]))  # pyright: ignore
    torch.testing.assert_close(*gradients)
    torch.manual_seed(3)
    assert not torch.equal(lora_linear(x, layer, 0.5), lora_linear(x, layer, 0.5))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast(bias: bool) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(20, 24, device=DEVICE, requires_grad=True), random_layer(40, 24, 4)
    layer = layer if bias else layer._replace(bias=None)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = lora_linear(x, layer)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert distance(y.detach(), reference.lora_linear(x, layer).detach()) < 0.02


def test_differentiated_once_only() -> None:
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    layer = random_layer(7, 16, 2)
    for w in (layer, layer._replace(bias=None)):
        with pytest.raises(RuntimeError, match="once"):
            _twice(lora_linear(x, w), x)


def _twice(y: Tensor, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("bias", [None, 6])
def test_errors(bias: int | None) -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    of_bias = None if bias is None else torch.randn(bias)
    with pytest.raises(ValueError, match="does not fit a weight"):
        lora_linear(torch.randn(4, 7), LoraWeights(w, of_bias, a, b))
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, LoraWeights(w, of_bias, a, torch.randn(5, 2)))
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, LoraWeights(w, of_bias, torch.randn(3, 8), b))
    with pytest.raises(ValueError, match="a bias"):
        lora_linear(x, LoraWeights(w, torch.randn(5), a, b))
    with pytest.raises(ValueError, match="both a and b"):
        lora_linear(x, LoraWeights(w, of_bias, a))
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout"):
            lora_linear(x, LoraWeights(w, of_bias, a, b), rate)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_compiled(rate: float) -> None:
    torch.manual_seed(0)
    shapes = {"weight": (270, 20), "bias": (270,), "a": (2, 20), "b": (270, 2)}
    tensors = {f"{name}_{i}": torch.randn(shape) for i in range(2) for name, shape in shapes.items()}

    def call(x: Tensor, **of: Tensor) -> tuple[Tensor, ...]:
        return lora_qkv(x, [LoraWeights(*(of[f"{name}_{i}"] for name in shapes)) for i in range(2)], rate)

    same_when_compiled(call, tensors | {"x": torch.randn(34, 20)})


KERNELS, DROPOUT = "_lora_kernels", "dropout"
MUTANTS = [
    Mutant("mask: another threshold's side", DROPOUT, "[BM, BK]) >= dropped", "[BM, BK]) < dropped"),
    Mutant("down: a shifted column", KERNELS, "a = tl.load(pointers, mask=(columns[:, None] < k) & (ranks[None, :]",
           "a = tl.load(pointers + 1, mask=(columns[:, None] < k) & (ranks[None, :]"),
    Mutant("down: no dropout", KERNELS, "return tl.where(kept_tile(seed, rows, first_column, dropped, BM, BK), x,",
           "return tl.where(rows[:, None] >= 0, x,"),
    Mutant("down: not scaled", KERNELS, "tl.store(pointers, xa_0 * scale, mask=inside)",
           "tl.store(pointers, xa_0, mask=inside)"),
    Mutant("down: the seed of another layer", KERNELS,
           "xa_1 = _add_down(xa_1, x, a_ptr, seed_1,", "xa_1 = _add_down(xa_1, x, a_ptr, seed_0,"),
    Mutant("gradients of down: dx not masked", KERNELS, "dx += tl.where(kept, product, 0.0)", "dx += product"),
    Mutant("gradients of down: a flipped sign", KERNELS, "dx = dx * scale", "dx = -dx * scale"),
    Mutant("gradients of down: x not masked", KERNELS, "x = tl.where(kept, x, tl.zeros_like(x))", "x = x + 0.0"),
    Mutant("gradients of down: a shifted row", KERNELS,
           "tl.store(da_ptr + (row + ranks[:, None]) * k", "tl.store(da_ptr + (row + 1 + ranks[:, None]) * k"),
    Mutant("gradients of down: rows beyond the last", KERNELS,
           "inside = (rows[:, None] < m) & (ranks[None, :] < width)\n    dyb",
           "inside = (rows[:, None] < m - 1) & (ranks[None, :] < width)\n    dyb"),
    Mutant("gradients of up: a flipped sign", KERNELS, "ranks[None, :], product * scale,",
           "ranks[None, :], product * -scale,"),
    Mutant("gradients of up: a shifted chunk", KERNELS, "tl.store(db_ptr + (chunk * n + columns[:, None])",
           "tl.store(db_ptr + (chunk * n + (columns[:, None] + 1) % n)"),
    Mutant("gradients of up: a column fewer", KERNELS,
           "inside = (rows[:, None] < m) & (columns[None, :] < n)\n        dy = ",
           "inside = (rows[:, None] < m) & (columns[None, :] < n - 1)\n        dy = "),
    Mutant("sum: a part fewer", KERNELS, "for part in range(parts):", "for part in range(1, parts):"),
    Mutant("sum: a shifted index", KERNELS, "index // columns * out_stride + index % columns",
           "index // columns * out_stride + (index + 1) % columns"),
    Mutant("sum: a flipped sign", KERNELS, "total += tl.load(parts_ptr", "total -= tl.load(parts_ptr"),
]  # fmt: skip


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_broken_kernels_are_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, check_kernels, tmp_path)


@only_interpreted
def test_kernels_that_are_not_broken_pass() -> None:
    check_kernels(shardtune_kernels)
