"""Four-bit weights: the values bit for bit, and products with them."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import resources
import torch
from comparing import DEVICE, DTYPES, agree, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import calibration, four_bit, reference
from shardtune_kernels._launch import INTERPRETED
from shardtune_kernels.weights import FourBitWeight, LoraWeights

WIDE = 4096
"""What stands behind a result, and must stay as it is."""


def random_weight(
    shape: tuple[int, int], dtype: torch.dtype, kind: Any = "nf4", block: int = 64, nested_block: int | None = 64,
    shift: int = 0,
) -> FourBitWeight:  # fmt: skip
    """Random bytes, which begin `shift` bytes behind where words may; no nested scales without `nested_block`."""
    n, k = shape
    size, blocks = (n * k + 1) // 2, -(-n * k // block)
    packed = torch.randint(256, (size + shift,), dtype=torch.uint8).to(DEVICE)[shift:]
    if nested_block is None:
        return FourBitWeight(packed, (torch.rand(blocks) + 0.1).to(DEVICE), shape, dtype, kind, block)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8).to(DEVICE)
    outer = (torch.rand(-(-blocks // nested_block)) + 0.1).to(DEVICE)
    offset = torch.tensor(0.7311, device=DEVICE)
    return FourBitWeight(packed, absmax, shape, dtype, kind, block, outer, offset, nested_block)


def some_weight(
    rng: random.Random, shape: tuple[int, int], dtype: torch.dtype, blocks: tuple[int, ...], aligned: bool = False
) -> FourBitWeight:
    kind, block, nested = rng.choice(["nf4", "fp4"]), rng.choice(blocks), rng.choice([None, 16, 64, 256])
    return random_weight(shape, dtype, kind, block, nested, rng.choice([0, 4] if aligned else [0, 1, 2, 3]))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor, and the memory behind it, full of sevens."""
    count = shape[0] * shape[1]
    whole = torch.full((count + WIDE,), 7.0, dtype=dtype, device=DEVICE)
    return whole[:count].view(shape), whole[count:]


def check_values(kernels: Any, seed: int) -> None:
    rng = seed_everything(seed)
    # Whole programs and a part of one; the same where words may not lie; half a byte at the end.
    odd = rng.randint(1, 9) * 2 + 1, rng.randint(1, 40) * 2 + 1
    for aligned, shape in ((True, (66, 128)), (False, (40, 104)), (False, odd)):
        dtype = rng.choice(DTYPES)
        weight = some_weight(rng, shape, dtype, (32, 64, 128, 4096), aligned)
        out, behind = guarded(shape, dtype)
        kernels.nf4_dequantize(weight, out=out)
        said = f"seed {seed}: {shape} {dtype} {weight.kind} {weight.block} {weight.nested_block}"
        assert torch.equal(out, reference.dequantized(weight)), said
        assert bool((behind == 7).all()), f"{said}: wrote behind the end"


def check_products(kernels: Any, seed: int, dtypes: Any = (torch.bfloat16,)) -> None:
    rng = seed_everything(seed)
    given_four_bit = importlib.import_module("shardtune_kernels.four_bit")  # of the package that is given, if broken
    # Sums that are split (over k, over n), and columns that do not fit blocks.
    for m, n, k in ((rng.randint(1, 40), rng.randint(65, 100), 576), (rng.randint(65, 80), 577, 64), (3, 20, 50)):
        for dtype in dtypes if k == 50 else [d for d in dtypes if d.itemsize == 2]:
            weight = some_weight(rng, (n, k), rng.choice(DTYPES[1:]), (64,) if k == 576 else (32, 64))
            x, bias = torch.randn(m, k, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
            given = {"x": x, "bias": bias if m < 65 else None}
            said = f"seed {seed}: {(m, n, k)} {weight.dtype} {weight.kind} {weight.block}"
            agree(
                lambda x, bias, w=weight: kernels.four_bit_linear(x, w, bias),
                lambda x, bias, w=weight: reference.lora_linear(x, LoraWeights(w, bias)), given, dtype, said,
            )  # fmt: skip
        forward = k == 576
        product = given_four_bit.four_bit_product if forward else given_four_bit.four_bit_transposed_product
        out, behind = guarded((m, n if forward else k), torch.bfloat16)
        product(torch.randn(m, k if forward else n, device=DEVICE).bfloat16(), weight, out=out)
        assert bool((behind == 7).all()), f"{said}: wrote behind the end"


@pytest.mark.parametrize("seed", range(6))
def test_values(seed: int) -> None:
    check_values(shardtune_kernels, seed)


@pytest.mark.parametrize("seed", range(2))
def test_products_and_gradients(seed: int) -> None:
    check_products(shardtune_kernels, seed, DTYPES)


@only_interpreted
@pytest.mark.parametrize("way", ["fused", "dequantized", "dequantized in parts"])
@pytest.mark.parametrize("nested_block", [None, 16])
def test_every_way(way: str, nested_block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(5)
    taken: list[list[str]] = []
    monkeypatch.setattr(four_bit.kernels, "PART_BYTES", 1 << 13)
    monkeypatch.setattr(four_bit.kernels, "ROWS_OF_TILES", 8)
    monkeypatch.setattr(
        calibration, "choose",
        lambda op, size, dtype, device, ways: taken.append(list(ways)) or (way if way in ways else "dequantized"),
    )  # fmt: skip
    for n, k, bias in ((70, 128, None), (57, 128, torch.randn(57).double()), (70, 33, None)):
        weight = random_weight((n, k), torch.bfloat16, nested_block=nested_block)
        agree(
            lambda x, bias, w=weight: four_bit.four_bit_linear(x, w, bias),
            lambda x, bias, w=weight: reference.lora_linear(x, LoraWeights(w, bias)),
            {"x": torch.randn(5, k).double(), "bias": bias}, torch.bfloat16, (way, n, k),
        )  # fmt: skip
    assert taken[0] == ["fused", "dequantized", "dequantized in parts"]
    assert taken[1] == ["fused", "dequantized"]


def test_parts_begin_where_blocks_do() -> None:
    for shape, nested_block, wanted in (
        ((14336, 4096), 256, 4), ((14336, 4096), None, 4), ((4096, 4096), 256, 1), ((128256, 4096), 256, 32),
        ((14336, 4095), 256, 1), ((0, 4096), 256, 0), ((4096, 0), 256, 1),
    ):  # fmt: skip
        n, k = shape
        empty = torch.empty(0)
        outer = empty if nested_block else None
        stored = four_bit.kernels.Stored(empty, empty, outer, None, n, k, torch.bfloat16, "nf4", 64, nested_block or 1)
        parts = stored.parts(2)
        assert len(parts) == wanted, shape
        assert all(first * k % (64 * (nested_block or 1)) == 0 for first, _ in parts)
        assert [first for first, _ in parts[1:]] == [last for _, last in parts[:-1]]
        assert not parts or (parts[0][0], parts[-1][1]) == (0, n)


def _broken(kernels: Any) -> None:
    for seed in (1, 2):
        check_values(kernels, seed)
    check_products(kernels, 1)


KERNELS = "_four_bit_kernels"
MUTANTS = [
    Mutant("dequantize: nibbles swapped", KERNELS, "((tl.arange(0, 8) ^ 1) * 4)", "(tl.arange(0, 8) * 4)"),
    Mutant("dequantize: sign", KERNELS, "* scales[:, None]).to(VALUE)\n\n\n@jit\ndef deq",
           "* -scales[:, None]).to(VALUE)\n\n\n@jit\ndef deq"),
    Mutant("dequantize: scales of other words", KERNELS, "(word + 2 * LANES)", "(word + 1 * LANES)"),
    Mutant("dequantize: words again", KERNELS, "packed_words + 3 * LANES", "packed_words + 2 * LANES"),
    Mutant("dequantize: no mask at the end", KERNELS, "LANES, values, mask=inside", "LANES, values"),
    Mutant("dequantize: nibbles of the end", KERNELS, "(((value & 1) ^ 1) * 4)", "((value & 1) * 4)"),
    Mutant("scales: offset's sign", KERNELS, "+ tl.load(offset)", "- tl.load(offset)"),
    Mutant("scales: outer ones", KERNELS, "index // NESTED_BLOCK", "index * 0"),
    Mutant("product: scales of the row's first block", KERNELS, " + column // (BLOCK // 2)", ""),
    Mutant("product: columns of x", KERNELS, "columns_of_x + column * 2", "columns_of_x + column"),
    Mutant("product: mask of rows", KERNELS, "[None, :] & (rows < n)[:, None]", "[None, :]"),
    Mutant("product: mask of tokens", KERNELS, "(tokens < m)[None, :] & (rows < n)", "(rows < n)"),
    Mutant("products: nibbles swapped", KERNELS, "tl.join(byte >> 4, byte & 15)", "tl.join(byte & 15, byte >> 4)"),
    Mutant("products: sign", KERNELS, "(found * scales[:, None])", "(found * -scales[:, None])"),
    Mutant("transposed: mask of rows", KERNELS, "mask=rows[:, None] < n", "mask=rows[:, None] >= 0"),
    Mutant("transposed: scales of the first block", KERNELS, " + first_byte // (BLOCK // 2)", ""),
    Mutant("transposed: columns", KERNELS, "first_byte * 2 + tl.arange", "first_byte + tl.arange"),
    Mutant("transposed: mask of tokens", KERNELS, ", mask=(tokens < m)[None, :])", ")"),
    Mutant("sum: the first part alone", KERNELS, "parts + split * count + index", "parts + index"),
    Mutant("sum: sign", KERNELS, "total += tl.load(parts", "total -= tl.load(parts"),
    Mutant("sum: column of the bias", KERNELS, "bias + index % n", "bias + index % (n - 1)"),
    Mutant("sum: no mask", KERNELS, "out.dtype.element_ty), mask=inside", "out.dtype.element_ty)"),
]  # fmt: skip


@only_interpreted
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_broken_kernels_are_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, _broken, tmp_path)


@only_interpreted
def test_a_copy_that_is_not_broken_is_not_noticed(tmp_path: Path) -> None:
    assert not is_noticed(Mutant("nothing", "four_bit", "CHUNK = 1 << 18", "CHUNK = 1 << 18"), _broken, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_bitsandbytes(seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = seed_everything(seed)
    for _ in range(12):
        n, k, dtype = rng.randint(1, 40), rng.randint(1, 80), rng.choice(DTYPES)
        kind, block, nested = rng.choice(["nf4", "fp4"]), rng.choice([32, 64, 128, 512]), rng.random() < 0.6
        given = torch.randn(n, k).to(dtype)
        packed, state = functional.quantize_4bit(
            given, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=torch.uint8
        )
        weight = FourBitWeight.from_bitsandbytes(packed.to(DEVICE), state)
        # On a CPU bitsandbytes takes the wrong scales where rows are not whole blocks: as one row they always are.
        state.shape = torch.Size((1, n * k + n * k % 2))
        wanted = functional.dequantize_4bit(packed, state).flatten()[: n * k].view(n, k)
        got = shardtune_kernels.nf4_dequantize(weight)
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(DEVICE)), f"seed {seed}: {(n, k)} {dtype} {kind} {block} nested {nested}"
        back = FourBitWeight.from_bitsandbytes(packed.to(DEVICE), weight.to_bitsandbytes())
        assert torch.equal(shardtune_kernels.nf4_dequantize(back), got)
        returned = weight.to_bitsandbytes()
        returned.shape = state.shape
        assert torch.equal(functional.dequantize_4bit(packed, returned).flatten()[: n * k].view(n, k), wanted)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_no_multiplication_is_fused_with_the_addition_after_it() -> None:
    """Else scales would be rounded once where bitsandbytes rounds twice."""
    build = next(build for build in four_bit.BUILDS if build.name == "nf4_dequantize")
    assert build.options["enable_fp_fusion"] is False
    for capability in (80, 90):
        assembly = resources.compiled(build, capability).asm["ptx"]
        assert "mul.f32" in assembly or "mul.rn.f32" in assembly
        assert "fma" not in assembly
        assert "ftz" not in assembly


def test_values_in_another_dtype_and_layout() -> None:
    seed_everything(0)
    weight = random_weight((13, 10), torch.bfloat16)
    wanted = reference.dequantized(weight)
    out = torch.zeros(10, 13, device=DEVICE).T
    assert shardtune_kernels.nf4_dequantize(weight, out=out) is out
    assert torch.equal(out, wanted.float())
    stored = FourBitWeight(
        torch.cat((weight.packed, weight.packed[:1])).view(torch.bfloat16)[:32], weight.absmax, (8, 16), torch.float16,
        "nf4", 64, weight.nested_absmax, weight.offset, 64,
    )  # fmt: skip
    stored = FourBitWeight(**{**vars(stored), "absmax": stored.absmax[:2]})
    assert torch.equal(shardtune_kernels.nf4_dequantize(stored), reference.dequantized(stored))


@pytest.mark.parametrize("shape", [(0, 4, 64), (4, 0, 64), (4, 64, 0), (0, 0, 0), (1, 1, 1), (1, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    seed_everything(sum(shape))
    m, n, k = shape
    weight = random_weight((n, k), dtype)
    assert torch.equal(shardtune_kernels.nf4_dequantize(weight), reference.dequantized(weight))
    x = torch.randn(m, k, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(n, device=DEVICE, dtype=dtype, requires_grad=True)
    y = shardtune_kernels.four_bit_linear(x, weight, bias)
    torch.testing.assert_close(y, reference.lora_linear(x, LoraWeights(weight, bias)), rtol=2e-2, atol=2e-2)
    dy = torch.randn_like(y)
    own = torch.autograd.grad(y, (x, bias), dy)
    wanted = torch.autograd.grad(reference.lora_linear(x, LoraWeights(weight, bias)), (x, bias), dy)
    torch.testing.assert_close(own, wanted, rtol=2e-2, atol=2e-2)


def test_rows_of_any_shape_and_layout() -> None:
    seed_everything(1)
    weight = random_weight((20, 64), torch.bfloat16)
    for x in (torch.randn(2, 5, 64), torch.randn(64), torch.randn(64, 7).T, torch.randn(5, 1, 64).expand(5, 3, 64)):
        agree(
            lambda x: shardtune_kernels.four_bit_linear(x, weight),
            lambda x: reference.lora_linear(x, LoraWeights(weight)), {"x": x.double()}, torch.bfloat16, x.shape,
        )  # fmt: skip


def test_bytes_may_be_gone_between_forward_and_backward() -> None:
    seed_everything(2)
    weight = random_weight((24, 64), torch.bfloat16)
    kept, storage = weight.packed.clone(), weight.packed.untyped_storage()
    x = torch.randn(3, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = shardtune_kernels.four_bit_linear(x, weight)
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    weight.packed.copy_(kept)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, reference.dequantized(weight).sum(0).expand(3, 64), rtol=2e-2, atol=2e-2)


def test_only_what_needs_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(3)
    weight = random_weight((24, 64), torch.bfloat16)
    x, bias = torch.randn(3, 64, device=DEVICE).bfloat16(), torch.randn(24, device=DEVICE, requires_grad=True)
    monkeypatch.setattr(four_bit, "four_bit_transposed_product", None)
    y = shardtune_kernels.four_bit_linear(x, weight, bias)
    assert not hasattr(y.grad_fn, "saved_tensors") or not y.grad_fn.saved_tensors
    y.sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3.0))
    assert shardtune_kernels.four_bit_linear(x, weight).grad_fn is None


def test_what_does_not_fit_is_said() -> None:
    weight = random_weight((24, 64), torch.bfloat16)
    x = torch.zeros(3, 64, device=DEVICE)

    def but(**changes: Any) -> FourBitWeight:
        return FourBitWeight(**{**vars(weight), **changes})

    for wrong, said in (
        (but(shape=(24, 66)), "that many contiguous bytes"), (but(kind="int4"), "of kind 'int4'"),
        (but(block=96), "blocks of 96"), (but(absmax=weight.absmax[1:]), "with 23 scales, not 24"),
        (but(nested_absmax=None), "scales in torch.uint8"), (but(offset=None), "nested scales"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            shardtune_kernels.nf4_dequantize(wrong)
    with pytest.raises(ValueError, match="out is"):
        shardtune_kernels.nf4_dequantize(weight, out=x)
    with pytest.raises(ValueError, match="do not fit"):
        shardtune_kernels.four_bit_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="do not fit"):
        shardtune_kernels.four_bit_linear(x, weight, x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype) -> None:
    seed_everything(4)
    weight = random_weight((24, 128), torch.bfloat16)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return shardtune_kernels.four_bit_linear(x * 2, weight, bias) + shardtune_kernels.nf4_dequantize(weight).sum()

    tensors = {"x": torch.randn(2, 5, 128), "bias": torch.randn(24)}
    same_when_compiled(layer, {name: tensor.to(dtype) for name, tensor in tensors.items()})
