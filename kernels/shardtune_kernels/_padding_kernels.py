"""The kernels of `padding`, and how they are started."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, power_of_two, writes

BLOCK = 256
"""Positions of a program of `pad` and `pack`: one size, so that a kernel is compiled once, whatever the width."""
TILE = 2048
"""Entries of a program of `unpad`."""
# Lengths vary from call to call, and so does how pointers into one buffer are aligned: that compiles nothing anew.
_jit = jit(
    do_not_specialize=["width", "total", "rows", "fill", "start", "ignore_index", "steps", "size"],
    do_not_specialize_on_alignment=["tokens", "offsets", "learned_from"],
)


@jit
def _fill(
    out, size, at, keep, inside, tokens, row, place, low, length, first, fill, start, ignore_index,
    SHIFTED: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """Writes what stands at positions `at` of each of the five, `size` entries long, where `keep`."""
    own = tl.load(tokens + low + place, mask=inside, other=0).to(tl.int64)
    if SHIFTED:
        target_place = place
        target = own
        own = tl.load(tokens + low + place - 1, mask=inside & (place > 0), other=0).to(tl.int64)
    else:
        target_place = place + 1
        target = tl.load(tokens + low + target_place, mask=inside & (target_place < length), other=-1).to(tl.int64)
    ids = tl.where(own < 0, ~own, own)
    if SHIFTED:
        ids = tl.where(place == 0, start, ids)
    learns = inside & (target >= 0)
    if LEARNED:
        learns = learns & (target_place >= first)
    size = tl.cast(size, tl.int64)
    tl.store(out + at, tl.where(inside, ids, fill), mask=keep)
    tl.store(out + size + at, tl.where(learns, target, ignore_index), mask=keep)
    tl.store(out + 2 * size + at, inside.to(tl.int64), mask=keep)
    tl.store(out + 3 * size + at, tl.where(inside, place, 0), mask=keep)
    tl.store(out + 4 * size + at, tl.where(inside, row, -1), mask=keep)


@_jit
def _pad_kernel(
    out, tokens, offsets, learned_from, width, size, fill, start, ignore_index,
    SHIFTED: tl.constexpr, LEFT: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(offsets + row).to(tl.int64)
    length = tl.load(offsets + row + 1).to(tl.int64) - low
    place = column
    if LEFT:
        place = column - tl.maximum(width - length, 0)
    first = tl.load(learned_from + row).to(tl.int64) if LEARNED else 0
    keep = column < width
    inside = keep & (place >= 0) & (place < length)
    _fill(
        out, size, row * width + column, keep, inside, tokens, row, place, low, length, first, fill, start,
        ignore_index, SHIFTED, LEARNED,
    )  # fmt: skip


@jit
def _row_of(position, offsets, rows, steps):
    """The row that each position is in, by bisection: how many rows end at or before it."""
    low = tl.zeros_like(position)
    high = low + rows
    for _ in range(steps):
        middle = (low + high) // 2
        ended = (middle < high) & (tl.load(offsets + 1 + middle, mask=middle < high, other=0) <= position)
        low = tl.where(ended, middle + 1, low)
        high = tl.where(ended, high, middle)
    return low


@_jit
def _pack_kernel(
    out, tokens, offsets, learned_from, total, rows, steps, start, ignore_index,
    SHIFTED: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = position < total
    row = _row_of(position, offsets, rows, steps)
    inside = keep & (row < rows)
    low = tl.load(offsets + row, mask=inside, other=0).to(tl.int64)
    length = tl.load(offsets + row + 1, mask=inside, other=0).to(tl.int64) - low
    first = tl.load(learned_from + row, mask=inside, other=0).to(tl.int64) if LEARNED else 0
    _fill(
        out, total, position, keep, inside, tokens, row, position - low, low, length, first, 0, start, ignore_index,
        SHIFTED, LEARNED,
    )  # fmt: skip


@_jit
def _gather_kernel(
    out, source, offsets, total, rows, width, inner, steps,
    LEFT: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = _row_of(position, offsets, rows, steps)
    found = (position < total) & (row < rows)
    low = tl.load(offsets + row, mask=found, other=0).to(tl.int64)
    place = position - low
    if LEFT:
        place = place + width - (tl.load(offsets + row + 1, mask=found, other=0).to(tl.int64) - low)
    found = found & (place >= 0) & (place < width)
    at = (row * width + place) * inner
    values = tl.load(source + at[:, None] + column[None, :], mask=found[:, None] & (column < inner)[None, :], other=0)
    keep = (position < total)[:, None] & (column < inner)[None, :]
    tl.store(out + position[:, None] * inner + column[None, :], values, mask=keep)


@_jit
def _scatter_kernel(
    out, source, offsets, total, width, inner,
    LEFT: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, POSITIONS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(offsets + row).to(tl.int64)
    length = tl.load(offsets + row + 1).to(tl.int64) - low
    place = at
    if LEFT:
        place = at - (width - length)
    found = (at < width) & (place >= 0) & (place < length) & (low + place < total)
    index = (low + place) * inner
    values = tl.load(
        source + index[:, None] + column[None, :], mask=found[:, None] & (column < inner)[None, :], other=0
    )
    keep = (at < width)[:, None] & (column < inner)[None, :]
    tl.store(out + (row * width + at)[:, None] * inner + column[None, :], values, mask=keep)


@writes("out")
def launch_pad(
    out: Tensor, tokens: Tensor, offsets: Tensor, learned_from: Tensor | None, fill: int, start: int,
    ignore_index: int, shifted: bool, left: bool,
) -> None:  # fmt: skip
    _, rows, width = out.shape
    if not rows * width:
        return
    _pad_kernel[(rows * triton.cdiv(width, BLOCK),)](
        out, tokens, offsets, learned_from, width, rows * width, fill, start, ignore_index,
        shifted, left, learned_from is not None, BLOCK,
    )  # fmt: skip


@writes("out")
def launch_pack(
    out: Tensor, tokens: Tensor, offsets: Tensor, learned_from: Tensor | None, start: int, ignore_index: int,
    shifted: bool,
) -> None:  # fmt: skip
    total, rows = len(tokens), len(offsets) - 1
    if not total:
        return
    _pack_kernel[(triton.cdiv(total, BLOCK),)](
        out, tokens, offsets, learned_from, total, rows, rows.bit_length(), start, ignore_index,
        shifted, learned_from is not None, BLOCK,
    )  # fmt: skip


@writes("out_nd")
def launch_gather(out_nd: Tensor, rows_bwd: Tensor, offsets: Tensor, left: bool) -> None:
    (total, inner), (rows, width, _) = out_nd.shape, rows_bwd.shape
    if not total * inner:
        return
    columns = power_of_two(inner, at_least=1, at_most=256)
    positions = TILE // columns
    _gather_kernel[(triton.cdiv(total, positions), triton.cdiv(inner, columns))](
        out_nd, rows_bwd, offsets, total, rows, width, inner, rows.bit_length(), left, positions, columns
    )


@writes("out_bwd")
def launch_scatter(out_bwd: Tensor, stream_nd: Tensor, offsets: Tensor, left: bool) -> None:
    rows, width, inner = out_bwd.shape
    if not rows * width * inner:
        return
    columns = power_of_two(inner, at_least=1, at_most=256)
    positions = TILE // columns
    _scatter_kernel[(rows * triton.cdiv(width, positions), triton.cdiv(inner, columns))](
        out_bwd, stream_nd, offsets, len(stream_nd), width, inner, left, positions, columns
    )


_STREAM = {"out": "*i64", "tokens": "*i32", "offsets": "*i32", "learned_from": "*i32"}
_TILE = {"LEFT": False, "POSITIONS": 8, "COLUMNS": 256}
BUILDS = [
    Build(
        "pad", _pad_kernel,
        {**_STREAM, **dict.fromkeys(["width", "size", "fill", "start", "ignore_index"], "i32")},
        {"SHIFTED": False, "LEFT": False, "LEARNED": True, "BLOCK": BLOCK},
    ),
    Build(
        "pack", _pack_kernel,
        {**_STREAM, **dict.fromkeys(["total", "rows", "steps", "start", "ignore_index"], "i32")},
        {"SHIFTED": False, "LEARNED": True, "BLOCK": BLOCK},
    ),
    Build(
        "unpad", _gather_kernel,
        {"out": "*i16", "source": "*i16", "offsets": "*i32",
         **dict.fromkeys(["total", "rows", "width", "inner", "steps"], "i32")},
        _TILE, aligned=("inner",),
    ),
    Build(
        "unpad backward", _scatter_kernel,
        {"out": "*i16", "source": "*i16", "offsets": "*i32", **dict.fromkeys(["total", "width", "inner"], "i32")},
        _TILE, aligned=("inner",),
    ),
]  # fmt: skip
