"""What ops on rows [m, d] share: rows as they lie in memory, and the tiles that programs take of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from shardtune_kernels._launch import jit, power_of_two

ELEMENTS_OF_A_WARP = 512
"""16 of a thread: two loads of 16 bytes from each operand in 16 bits."""


class Tile(NamedTuple):
    """Of a program."""

    rows: int
    block: int
    """Columns at a time."""
    warps: int
    whole: bool
    """A row is one block, so it is read once."""


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] as [m, d], a view where the rows are apart from each other by one stride, else a copy."""
    return unit_stride(flattened(x))


def flattened(x: Tensor) -> Tensor:
    """x [..., d] as [m, d], of any strides."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy: columns one after the other; any strides else."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def tile_of(width: int, widest: int) -> Tile:
    """Short rows several at once, up to `widest` columns one, wider rows in blocks of 8192."""
    if width > widest:
        return Tile(1, min(widest, 8192), min(widest, 8192) // ELEMENTS_OF_A_WARP, False)
    block = power_of_two(width)
    rows = max(1, 4 * ELEMENTS_OF_A_WARP // block)
    return Tile(rows, block, rows * block // ELEMENTS_OF_A_WARP, True)


def summing_programs(rows: int, width: int) -> int:
    """How many programs sum gradients of weights over rows, each into a row of its own: as many warps in all (4096,
    31 of each of 132 processors) whatever the width, and the same on every GPU, so that sums are, too."""
    return min(rows, 1024 if width <= 2048 else 512 if width <= 4096 else 256)


@jit
def read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside):
    """x in float32, or x + residual, rounded as it is stored."""
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    return x
