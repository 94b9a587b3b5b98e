"""Frozen linear layers in four bits: dequantization, and products that dequantize on the way.

Which way a product takes is measured, see `calibration.py`: the fused kernel, or dequantization and torch's product,
at once or in parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardtune_kernels import _four_bit_kernels as kernels
from shardtune_kernels import calibration
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import on_triton, writes
from shardtune_kernels._rows import rows_of, unit_stride
from shardtune_kernels.weights import FourBitWeight

CHUNK = 1 << 18
"""Values that a CPU dequantizes at once: their float32 copies stay in its cache."""


def nf4_dequantize(weight: FourBitWeight, out: Tensor | None = None) -> Tensor:
    """W [n, k] in `weight.dtype` on the device of its bytes, written to `out` if given; the kind may be fp4, too.

    W.flatten()[i] = code[nibble i] · scale[i // block] (Dettmers et al. 2023, arXiv:2305.14314, section 3), bit for bit
    what bitsandbytes gives: the scale is rounded to float32 after each operation, the value once to float32 and once
    more to the dtype. `out` [n, k] may have another floating dtype; a value is then rounded a third time. Any n and k;
    blocks run over the flattened matrix. Nothing is kept between calls: give the same `out` to use memory again.

    ValueError: `weight` does not hold n · k values and their scales, is of another kind or block than bitsandbytes
    makes, or `out` is not [n, k] or on another device.
    """
    check(weight)
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)
    elif tuple(out.shape) != tuple(weight.shape) or out.device != weight.packed.device:
        raise ValueError(f"out is {tuple(out.shape)} on {out.device}, not {weight.shape} on {weight.packed.device}")
    target = out.detach()
    if not target.is_contiguous():
        target = torch.empty_like(target, memory_format=torch.contiguous_format)
    _dequantize(*_tensors(weight), target, *_numbers(weight))
    if not out.is_contiguous():
        out.detach().copy_(target)
    return out


def four_bit_linear(x: Tensor, weight: FourBitWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., k] -> x Wᵀ + bias [..., n] in the dtype of x, with gradients for x (dy W) and bias (Σ dy).

    W is frozen (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): the values are those of `nf4_dequantize`, in the dtype
    of x. x is fp32, fp16 or bf16. Neither x nor W's values are saved for backward, which looks at `weight.packed`
    again: its bytes may be freed and gathered in between.

    ValueError: as `nf4_dequantize`, or x has not k columns, bias not n numbers.
    """
    check(weight)
    return _FourBitLinear.apply(x, weight, bias)


def four_bit_product(
    x_mk: Tensor, weight: FourBitWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias [m, n] in the dtype of x, without autograd: what ops are made of; `out` must be contiguous."""
    n, k = weight.shape
    if x_mk.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        said = "no bias" if bias is None else f"a bias {list(bias.shape)}"
        raise ValueError(f"x {list(x_mk.shape)} and {said} do not fit a weight [{n}, {k}]")
    return _multiplied(x_mk, weight, bias, out, transposed=False)


def four_bit_transposed_product(dy_mn: Tensor, weight: FourBitWeight, out: Tensor | None = None) -> Tensor:
    """dy W [m, k] in the dtype of dy, without autograd: the gradient of x; `out` must be contiguous."""
    if dy_mn.shape[-1] != weight.shape[0]:
        raise ValueError(f"dy {list(dy_mn.shape)} does not fit {list(weight.shape)}")
    return _multiplied(dy_mn, weight, None, out, transposed=True)


def check(weight: FourBitWeight) -> None:
    """ValueError unless kernels can read it."""
    n, k = weight.shape
    blocks = -(-n * k // weight.block)
    problem = None
    if weight.kind not in ("nf4", "fp4"):
        problem = f"of kind {weight.kind!r}, not nf4 or fp4"
    elif weight.block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        problem = f"in blocks of {weight.block}, not of a power of two from 32 to 4096"
    elif weight.packed.numel() * weight.packed.itemsize != (n * k + 1) // 2 or not weight.packed.is_contiguous():
        problem = "not stored as that many contiguous bytes"
    elif weight.absmax.numel() != blocks:
        problem = f"with {weight.absmax.numel()} scales, not {blocks}"
    elif weight.absmax.dtype != (torch.float32 if weight.nested_absmax is None else torch.uint8):
        problem = f"with scales in {weight.absmax.dtype}"
    elif weight.nested_absmax is not None and (
        weight.offset is None or weight.nested_absmax.numel() != -(-blocks // weight.nested_block)
    ):
        problem = "with nested scales that do not fit"
    if problem is not None:
        raise ValueError(f"a four-bit weight [{n}, {k}] is {problem}")


class _FourBitLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FourBitWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        y_mn = four_bit_product(rows_of(x), weight, bias)
        return y_mn.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (dy,) = gradients
        dx = dbias = None
        dy_mn = rows_of(dy)
        if ctx.needs_input_grad[0]:
            dx = four_bit_transposed_product(dy_mn, ctx.weight).view(*dy.shape[:-1], ctx.weight.shape[1])
        if ctx.needs_input_grad[2]:
            dbias = dy_mn.sum(0).to(ctx.bias_dtype)
        return dx, None, dbias


def _tensors(weight: FourBitWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    outer = None if weight.nested_absmax is None else weight.nested_absmax.detach().contiguous()
    return weight.bytes, weight.absmax.detach().contiguous().view(-1), outer, weight.offset


def _numbers(weight: FourBitWeight) -> tuple[int, int, torch.dtype, str, int, int]:
    return *weight.shape, weight.dtype, weight.kind, weight.block, weight.nested_block


def _multiplied(x: Tensor, weight: FourBitWeight, bias: Tensor | None, out: Tensor | None, transposed: bool) -> Tensor:
    shape = len(x), weight.shape[1 if transposed else 0]
    out = x.new_empty(shape) if out is None else out
    if x.ndim != 2 or out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"a product of {list(x.shape)} goes to a contiguous {list(shape)}, not {list(out.shape)}")
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}")
    bias = None if bias is None else bias.detach().contiguous()
    _multiply(unit_stride(x.detach()), bias, *_tensors(weight), out.detach(), *_numbers(weight), transposed)
    return out


@writes("out")
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    block: int,
    nested_block: int,
) -> None:
    if on_triton(packed):
        kernels.Stored(packed, absmax, nested_absmax, offset, n, k, dtype, kind, block, nested_block).dequantize(out)
        return
    if nested_absmax is not None and offset is not None:
        outer = nested_absmax.repeat_interleave(nested_block)[: len(absmax)]
        absmax = kernels.nested_table(packed.device)[absmax.int()] * outer + offset
    code, flat = kernels.table(kind, packed.device), out.view(-1)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
    for first in range(0, n * k, CHUNK):
        count = min(CHUNK, n * k - first)
        bytes_ = packed[first // 2 : (first + count + 1) // 2].int()
        scales = absmax[first // block : -(-(first + count) // block)]
        values = torch.empty(len(scales) * block, dtype=torch.float32, device=packed.device)
        torch.index_select(pairs, 0, bytes_, out=values[: 2 * len(bytes_)].view(-1, 2))
        values.view(-1, block).mul_(scales[:, None])
        flat[first : first + count] = values[:count].to(dtype)


@writes("out")
def _multiply(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    n: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    block: int,
    nested_block: int,
    transposed: bool,
) -> None:
    """out = x Wᵀ + bias or, `transposed`, x W: one operation to torch.compile, so that the way is chosen when it runs
    and not when it is traced."""
    if out.numel() == 0:
        return

    def dequantized() -> None:
        values = torch.empty((n, k), dtype=x.dtype, device=x.device)
        _dequantize(packed, absmax, nested_absmax, offset, values, n, k, dtype, kind, block, nested_block)
        if transposed:
            torch.mm(x, values, out=out)
        else:
            kernels.multiply(x, values, bias, out)

    if not on_triton(x):
        dequantized()
        return
    stored = kernels.Stored(packed, absmax, nested_absmax, offset, n, k, dtype, kind, block, nested_block)
    ways: dict[str, calibration.Way] = {}
    if stored.fits(x):
        ways["fused"] = lambda: stored.transposed_product(x, out) if transposed else stored.product(x, bias, out)
    ways["dequantized"] = dequantized
    if not transposed and len(stored.parts(x.dtype.itemsize)) > 1:
        ways["dequantized in parts"] = lambda: stored.product_in_parts(x, bias, out)
    op = f"four_bit_{'transposed_' if transposed else ''}product of blocks of {block}"
    ways[calibration.choose(op, (len(x), n, k), x.dtype, x.device, ways)]()


_OF_WEIGHT = {"packed": "*u8", "absmax": "*u8", "nested_absmax": "*fp32", "offset": "*fp32", "codes": "*fp32",
              "nested_codes": "*fp32"}  # fmt: skip
_CONSTANTS = {"BLOCK": 64, "NESTED": True, "NESTED_BLOCK": 256, "VALUE": "{dtype}"}
_WIDE = {**_CONSTANTS, "X": "{dtype}", "DOT": "{dtype}", "BYTES": 32}
_UNFUSED = {"enable_fp_fusion": False}


def _product_build(tokens: int, n: int) -> Build:
    tile, warps = kernels.tile_of_product(tokens, n)
    sizes = dict.fromkeys(("m", "n", "x_stride", "row_bytes", "row_blocks", "part"), "i32")
    return Build(
        f"four_bit_linear product of {tokens}, {tile['ROWS']} rows", kernels.product_kernel,
        {"x": "*{dtype}", **_OF_WEIGHT, "out": "*fp32", **sizes},
        {**_WIDE, **tile, "bias": None, "HAS_BIAS": False}, warps, 3,
        ("n", "x_stride", "row_bytes", "row_blocks", "part"), _UNFUSED,
    )  # fmt: skip


BUILDS = [
    Build(
        "nf4_dequantize", kernels.dequantize_kernel,
        {**_OF_WEIGHT, "out": "*{dtype}", "count": "i32", "whole": "i32"},
        {**_CONSTANTS, "LANES": kernels.LANES}, kernels.LANES // 32, 3, ("count", "whole"), _UNFUSED,
    ),
    *(_product_build(tokens, n) for tokens, n in ((16, 4096), (16, 14336), (64, 14336), (128, 4096))),
    *(Build(
        f"four_bit_linear transposed product of {tokens}", kernels.transposed_product_kernel,
        {"dy": "*{dtype}", **_OF_WEIGHT, "out": "*fp32",
         **dict.fromkeys(("m", "n", "k", "dy_stride", "row_bytes", "row_blocks", "part"), "i32")},
        {**_WIDE, "ROWS": kernels.STEP, "TOKENS": tokens}, 4, 3,
        ("n", "k", "dy_stride", "row_bytes", "row_blocks", "part"), _UNFUSED,
    ) for tokens in (16, 64)),
    Build(
        "four_bit_linear sum of parts", kernels.sum_kernel,
        {"parts": "*fp32", "bias": "*{dtype}", "out": "*{dtype}", "count": "i32", "n": "i32"},
        {"SPLITS": 8, "HAS_BIAS": True, "SIZE": 1024}, aligned=("count", "n"), options=_UNFUSED,
    ),
]  # fmt: skip
