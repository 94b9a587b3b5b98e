"""Triton kernels of four-bit weights, and what starts them.

Counted for an H100 (132 multiprocessors of 128 lanes): to dequantize at its bandwidth, a multiprocessor must turn
about 4 bytes a cycle into 8 values, so that about 33 instructions of a lane may go into a byte. Code numbers are looked
up, 16 of them in 64 bytes, which lie in one line of the cache: one access serves all lanes. A table of 256 pairs halves
the look-ups but spreads each over 16 lines, or over six turns of the banks of shared memory, and a tree of 15 selects
for each value takes all of the 33 instructions. As built for 9.0 the kernel takes 18 instructions a byte.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels._launch import dot_type, jit, power_of_two

LANES = 128
"""Words of four bytes that a program of `dequantize_kernel` reads at once, one a thread; it does so four times."""
VALUES = LANES * 4 * 8
"""Values of such a program."""
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FUSED_TOKENS = 512
"""Beyond so many rows of x a kernel that dequantizes on the way would do it over and over: 20 µs on an H100, counted as
above, for every 128 tokens of [14336, 4096], and those 128 cost the tensor cores as much."""
PART_BYTES, ROWS_OF_TILES = 32 << 20, 128
"""Of dequantized rows that stay in a cache (40 MB on an A100, 50 on an H100), in whole tiles of a matrix product: of
[14336, 4096] in bfloat16 four parts of 28 such tiles each."""
STEP = 64
"""Rows of W that `transposed_product_kernel` reads at once."""


@cache
def table(kind: str, device: torch.device) -> Tensor:
    """float32 [16] on the device: what four bits stand for."""
    return torch.tensor(reference.CODES[kind], device=device)


@cache
def nested_table(device: torch.device) -> Tensor:
    """float32 [256] on the device: what the byte of a nested scale stands for."""
    return reference.nested_code().to(device)


@jit
def _scales(index, absmax, nested_absmax, offset, nested_codes, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    """Scales of the blocks `index`. Each operation rounds by itself: kernels are built without fused multiply-adds."""
    if NESTED:
        code = tl.load(nested_codes + tl.load(absmax + index).to(tl.int32))
        return code * tl.load(nested_absmax + index // NESTED_BLOCK) + tl.load(offset)
    else:
        return tl.load(absmax + index)


@jit
def _of_words(words, scales, codes, VALUE: tl.constexpr):
    """[LANES, 8] values of four bytes each, the lowest byte first and its high nibble before the low one."""
    nibbles = (words[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15
    return (tl.load(codes + nibbles) * scales[:, None]).to(VALUE)


@jit
def dequantize_kernel(
    packed, absmax, nested_absmax, offset, codes, nested_codes, out, count, whole,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, VALUE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program i writes `out` from value 32 · LANES · i on; the first `whole` programs have all of their values, and
    words that lie where words may."""
    pid = tl.program_id(0)
    lane = tl.arange(0, LANES)
    word = pid * (4 * LANES) + lane
    local = lane[:, None] * 8 + tl.arange(0, 8)[None, :]
    to = out + pid.to(tl.int64) * (32 * LANES) + local
    words_in_block: tl.constexpr = BLOCK // 8
    if pid < whole:
        # All loads stand before the first store, which the compiler would not move them across.
        packed_words = packed.to(tl.pointer_type(tl.uint32)) + word
        words0 = tl.load(packed_words)
        words1 = tl.load(packed_words + LANES)
        words2 = tl.load(packed_words + 2 * LANES)
        words3 = tl.load(packed_words + 3 * LANES)
        block = word.to(tl.uint32) // words_in_block
        scales0 = _scales(block, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        block = (word + LANES).to(tl.uint32) // words_in_block
        scales1 = _scales(block, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        block = (word + 2 * LANES).to(tl.uint32) // words_in_block
        scales2 = _scales(block, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        block = (word + 3 * LANES).to(tl.uint32) // words_in_block
        scales3 = _scales(block, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        tl.store(to, _of_words(words0, scales0, codes, VALUE))
        tl.store(to + 8 * LANES, _of_words(words1, scales1, codes, VALUE))
        tl.store(to + 16 * LANES, _of_words(words2, scales2, codes, VALUE))
        tl.store(to + 24 * LANES, _of_words(words3, scales3, codes, VALUE))
    else:
        for turn in range(4):
            value = (word + turn * LANES).to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
            inside = value < count
            byte = tl.load(packed + value // 2, mask=inside, other=0).to(tl.int32)
            nibbles = (byte >> (((value & 1) ^ 1) * 4).to(tl.int32)) & 15
            index = tl.minimum(value, count - 1) // BLOCK
            scales = _scales(index, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
            values = (tl.load(codes + nibbles) * scales).to(VALUE)
            tl.store(to + turn * 8 * LANES, values, mask=inside)


@jit
def _of_bytes(byte, scales, codes, ROWS: tl.constexpr, BYTES: tl.constexpr, VALUE: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, 2 · BYTES] weights of a tile of bytes, looked up in shared memory, where no two banks collide: 64 bytes
    lie in 16 of them."""
    nibbles = tl.join(byte >> 4, byte & 15).reshape(ROWS * 2 * BYTES)
    found = tl.gather(codes, nibbles, 0).reshape(ROWS, 2 * BYTES)
    return (found * scales[:, None]).to(VALUE).to(DOT)


@jit
def product_kernel(
    x, packed, absmax, nested_absmax, offset, codes, nested_codes, bias, out,
    m, n, x_stride, row_bytes, row_blocks, part,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, VALUE: tl.constexpr,
    X: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = x Wᵀ over `part` columns of bytes: a tile of Wᵀ's rows and of tokens, transposed, so that the
    dequantized side of the product has the 64 or more rows that tensor cores want, and tokens as few as 16."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    # Beyond the edge the last row is read again, and never written: no masks in the loop.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    bytes_of_row = packed + row[:, None] * row_bytes + tl.arange(0, BYTES)[None, :]
    columns_of_x = x + token[None, :] * x_stride + tl.arange(0, 2 * BYTES)[:, None]
    sixteen = tl.load(codes + tl.arange(0, 16))
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for column in tl.range(split * part, tl.minimum(split * part + part, row_bytes), BYTES):
        byte = tl.load(bytes_of_row + column).to(tl.int32)
        index = row * row_blocks + column // (BLOCK // 2)
        scales = _scales(index, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        weights = _of_bytes(byte, scales, sixteen, ROWS, BYTES, VALUE, X)
        of_x = tl.load(columns_of_x + column * 2)
        total = tl.dot(weights.to(DOT), of_x.to(DOT), total, input_precision="ieee", out_dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    to = out + (split.to(tl.int64) * m + tokens)[None, :] * n + rows[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=(tokens < m)[None, :] & (rows < n)[:, None])


@jit
def transposed_product_kernel(
    dy, packed, absmax, nested_absmax, offset, codes, nested_codes, out,
    m, n, k, dy_stride, row_bytes, row_blocks, part,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, VALUE: tl.constexpr,
    X: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[split, m, k] = dy W over `part` rows of W; tiles are of columns of W and of tokens."""
    first_byte = tl.program_id(0) * BYTES
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    local = tl.arange(0, ROWS)
    sixteen = tl.load(codes + tl.arange(0, 16))
    total = tl.zeros((2 * BYTES, TOKENS), dtype=tl.float32)
    for first in tl.range(split * part, tl.minimum(split * part + part, n), ROWS):
        rows = first + local
        row = tl.minimum(rows, n - 1).to(tl.int64)
        byte = tl.load(packed + row[:, None] * row_bytes + (first_byte + tl.arange(0, BYTES))[None, :]).to(tl.int32)
        index = row * row_blocks + first_byte // (BLOCK // 2)
        scales = _scales(index, absmax, nested_absmax, offset, nested_codes, NESTED, NESTED_BLOCK)
        weights = _of_bytes(byte, scales, sixteen, ROWS, BYTES, VALUE, X)
        of_dy = tl.load(dy + token[None, :] * dy_stride + rows[:, None], mask=rows[:, None] < n, other=0.0)
        total = tl.dot(tl.trans(weights.to(DOT)), of_dy.to(DOT), total, input_precision="ieee", out_dtype=tl.float32)
    columns = first_byte * 2 + tl.arange(0, 2 * BYTES)
    to = out + (split.to(tl.int64) * m + tokens)[None, :] * k + columns[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=(tokens < m)[None, :])


@jit
def sum_kernel(parts, bias, out, count, n, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr):
    """out[i] = Σ over splits of parts[split, i], plus the bias of its column, in the order of the splits."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + index, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + index % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _start(kernel: Any, grid: tuple[int, ...], *given: Any, warps: int = 4, **constants: Any) -> None:
    """Without fused multiply-adds, which would leave out a rounding."""
    kernel[grid](*given, **constants, num_warps=warps, enable_fp_fusion=False)


def multiply(x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x · valuesᵀ + bias, by torch."""
    if bias is None:
        torch.mm(x, values.T, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, values.T, out=out)


class Stored:
    """A four-bit matrix [n, k] as kernels take it."""

    def __init__(
        self, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, n: int, k: int,
        dtype: torch.dtype, kind: str, block: int, nested_block: int,
    ) -> None:  # fmt: skip
        self.packed, self.n, self.k, self.dtype, self.kind, self.block = packed, n, k, dtype, kind, block
        self.tensors = (
            packed, absmax, nested_absmax, offset, table(kind, packed.device), nested_table(packed.device),
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "BLOCK": block, "NESTED": nested_absmax is not None, "NESTED_BLOCK": nested_block, "VALUE": DTYPES[dtype],
        }  # fmt: skip

    def dequantize(self, out: Tensor) -> None:
        """Writes W to `out`, contiguous and of any floating dtype, rounded to W's own before."""
        count = self.n * self.k
        if count == 0:
            return
        whole = count // VALUES if self.packed.data_ptr() % 4 == 0 else 0
        _start(
            dequantize_kernel, (_ceil(count, VALUES),),
            *self.tensors, out, count, whole, **self.constants, LANES=LANES, warps=LANES // 32,
        )  # fmt: skip

    def parts(self, itemsize: int) -> list[tuple[int, int]]:
        """Equal ranges of rows whose dequantized values fit into a cache of the device together with a product's other
        operands, and which begin where blocks (nested ones, too) do; one range where that cannot be."""
        count = _ceil(self.n * self.k * itemsize, PART_BYTES)
        nested = self.constants["NESTED_BLOCK"] if self.constants["NESTED"] else 1
        unit = math.lcm(math.lcm(self.block * nested, self.k) // self.k, ROWS_OF_TILES) if self.k else self.n
        rows = _ceil(_ceil(self.n, max(count, 1)), unit) * unit
        return [(first, min(first + rows, self.n)) for first in range(0, self.n, max(rows, 1))]

    def of_rows(self, first: int, last: int) -> Stored:
        """A range of rows, one of `parts`."""
        values, nested = (first * self.k, last * self.k), self.constants["NESTED_BLOCK"]
        blocks = values[0] // self.block, _ceil(values[1], self.block)
        packed, absmax, nested_absmax, offset, *_ = self.tensors
        if nested_absmax is not None:
            nested_absmax = nested_absmax[blocks[0] // nested : _ceil(blocks[1], nested)]
        return Stored(
            packed[values[0] // 2 : (values[1] + 1) // 2], absmax[slice(*blocks)], nested_absmax, offset, last - first,
            self.k, self.dtype, self.kind, self.block, nested,
        )  # fmt: skip

    def product_in_parts(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [m, n] = x Wᵀ + bias, where the same memory holds some rows of W after the other: they are read from the
        cache, and most of them never need to be written to memory."""
        parts = self.parts(x.dtype.itemsize)
        scratch = x.new_empty((parts[0][1], self.k))
        for first, last in parts:
            values = scratch[: last - first]
            self.of_rows(first, last).dequantize(values)
            multiply(x, values, None if bias is None else bias[first:last], out[:, first:last])

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels that dequantize on the way can multiply x [m, ...] and W: blocks must not go over the
        ends of rows. 32-bit products are torch's, as tensor cores do not take them."""
        filled = self.n > 0 and self.k > 0 and self.k % self.block == 0
        return filled and x.dtype.itemsize == 2 and 0 < len(x) <= FUSED_TOKENS

    def product(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [m, n] = x Wᵀ + bias, x [m, k] with adjacent columns."""
        m, n, bytes_ = len(x), self.n, min(self.block // 2, 32)
        tile, warps = tile_of_product(m, n)
        tokens, rows = tile["TOKENS"], tile["ROWS"]
        grid = _ceil(n, rows), _ceil(m, tokens)
        splits = _splits(grid[0] * grid[1], self.k // 2 // bytes_, warps)
        parts = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
        part = _ceil(self.k // 2 // bytes_, splits) * bytes_
        _start(
            product_kernel, (*grid, splits),
            x, *self.tensors, bias if splits == 1 else None, parts, m, n, x.stride(0), self.k // 2,
            self.k // self.block, part, **self.constants, HAS_BIAS=bias is not None and splits == 1, X=DTYPES[x.dtype],
            DOT=dot_type(x.dtype), **tile, BYTES=bytes_, warps=warps,
        )  # fmt: skip
        if splits > 1:
            _add_up(parts, bias, out)

    def transposed_product(self, dy: Tensor, out: Tensor) -> None:
        """out [m, k] = dy W, dy [m, n] with adjacent columns."""
        m, n, k, bytes_ = len(dy), self.n, self.k, min(self.block // 2, 32)
        tokens, warps = power_of_two(m, 16, 64), 4
        grid = k // (2 * bytes_), _ceil(m, tokens)
        splits = _splits(grid[0] * grid[1], _ceil(n, STEP), warps)
        parts = out if splits == 1 else out.new_empty((splits, m, k), dtype=torch.float32)
        _start(
            transposed_product_kernel, (*grid, splits),
            dy, *self.tensors, parts, m, n, k, dy.stride(0), k // 2, k // self.block,
            _ceil(_ceil(n, STEP), splits) * STEP, **self.constants, X=DTYPES[dy.dtype],
            DOT=dot_type(dy.dtype), ROWS=STEP, TOKENS=tokens, BYTES=bytes_, warps=warps,
        )  # fmt: skip
        if splits > 1:
            _add_up(parts, None, out)


def tile_of_product(m: int, n: int) -> tuple[dict[str, int], int]:
    """Tokens and rows of W of a tile of `product_kernel`, and its warps: sums of 64 registers a thread at most, so that
    several programs share a multiprocessor and one looks up while another multiplies."""
    tokens = power_of_two(m, 16, 128)
    return {"TOKENS": tokens, "ROWS": 128 if tokens == 128 or n >= 8192 else 64}, 8 if tokens == 128 else 4


def _splits(tiles: int, steps: int, warps: int) -> int:
    """Among how many programs to divide the sum of one tile, so that about 16 warps run on each of 128
    multiprocessors; each takes four steps at least. Depends on sizes only: results are the same on every device."""
    splits = 1
    while splits < 16 and tiles * splits * 2 * warps <= 2048 and steps >= splits * 2 * 4:
        splits *= 2
    return splits


def _add_up(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    _start(
        sum_kernel, (_ceil(out.numel(), 1024),),
        parts, bias, out, out.numel(), out.shape[1], SPLITS=len(parts), HAS_BIAS=bias is not None, SIZE=1024,
    )  # fmt: skip
