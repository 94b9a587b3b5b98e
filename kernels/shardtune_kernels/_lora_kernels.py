"""Kernels for the low-rank part of linear layers, where they read the large matrices fewer times than torch would.

With dropout, the kernels that read x draw its masks as they go, for up to three layers at once. Sums over rows are
taken in two stages, in an order that never changes.

Names: x [m, k]; a [p·r, k], the A of p layers one below the other; xa and dyb [m, p·r] beside one another; dy [m, n];
b [n, r]. R is r padded to a power of two.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from shardtune_kernels._builds import Build
from shardtune_kernels._launch import dot_type, jit, power_of_two, shared_memory, writes
from shardtune_kernels.dropout import kept_tile

WIDEST = 64
"""Rank that a kernel which draws dropout holds of one layer; a larger one is several layers of one seed."""
ROWS, COLUMNS, UP_COLUMNS = 32, 128, 256
"""Of a tile of x, and columns of one of dy."""
LARGEST_RANK = 128
"""Bytes of a row of B, [256, r], for which its tile and those of dy fit 99 KB (8.6, 8.9, 12.0): rank 64 in 16 bits, 32
in float32, whose products are those of torch beyond that."""
PROGRAMS = 264
"""Two for each multiprocessor of the largest GPUs."""
SUM_BLOCK = 256
_SCALARS = ["first", "dropped", "seed_0", "seed_1", "seed_2"]


@jit
def _dropped(x, seed, rows, first_column, dropped, BM: tl.constexpr, BK: tl.constexpr):
    return tl.where(kept_tile(seed, rows, first_column, dropped, BM, BK), x, tl.zeros_like(x))


@jit
def _add_down(xa, x, a_ptr, seed, rows, start, layer_row, k, width, dropped,
              R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """xa [BM, R] + drop(x) Aᵀ of one layer, whose A begins at row `layer_row`."""
    columns, ranks = start + tl.arange(0, BK), tl.arange(0, R)
    pointers = a_ptr + (layer_row + ranks[None, :]).to(tl.int64) * k + columns[:, None]
    a = tl.load(pointers, mask=(columns[:, None] < k) & (ranks[None, :] < width), other=0.0)
    kept = _dropped(x, seed, rows, start, dropped, BM, BK)
    return tl.dot(kept.to(DOT), a.to(DOT), xa, input_precision="ieee", out_dtype=tl.float32)


@jit(do_not_specialize=_SCALARS)
def _down_kernel(x_ptr, a_ptr, xa_ptr, m, k, x_stride, total, first, width, dropped, scale, seed_0, seed_1, seed_2,
                 P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                 DOT: tl.constexpr):  # fmt: skip
    """Columns from `first` of xa: P layers' scale · drop(x) Aᵀ."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, R)
    xa_0 = tl.zeros([BM, R], tl.float32)
    xa_1 = tl.zeros([BM, R], tl.float32)
    xa_2 = tl.zeros([BM, R], tl.float32)
    for start in range(0, k, BK):
        columns = start + tl.arange(0, BK)
        inside = (rows[:, None] < m) & (columns[None, :] < k)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        xa_0 = _add_down(xa_0, x, a_ptr, seed_0, rows, start, first, k, width, dropped, R, BM, BK, DOT)
        if P > 1:
            xa_1 = _add_down(xa_1, x, a_ptr, seed_1, rows, start, first + width, k, width, dropped, R, BM, BK, DOT)
        if P > 2:
            xa_2 = _add_down(xa_2, x, a_ptr, seed_2, rows, start, first + 2 * width, k, width, dropped, R, BM, BK, DOT)
    pointers = xa_ptr + rows[:, None] * total + first + ranks[None, :]
    inside = (rows[:, None] < m) & (ranks[None, :] < width)
    tl.store(pointers, xa_0 * scale, mask=inside)
    if P > 1:
        tl.store(pointers + width, xa_1 * scale, mask=inside)
    if P > 2:
        tl.store(pointers + 2 * width, xa_2 * scale, mask=inside)


@jit
def _layer_gradients(dx, da, x, dyb_ptr, a_ptr, seed, rows, start, layer_row, m, k, total, width, dropped,
                     R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
                     DX: tl.constexpr, DA: tl.constexpr):  # fmt: skip
    """dx [BM, BK] + mask of dyb A, and dA [R, BK] + dybᵀ drop(x), of one layer."""
    columns, ranks = start + tl.arange(0, BK), tl.arange(0, R)
    inside = (rows[:, None] < m) & (ranks[None, :] < width)
    dyb = tl.load(dyb_ptr + rows[:, None] * total + layer_row + ranks[None, :], mask=inside, other=0.0)
    kept = kept_tile(seed, rows, start, dropped, BM, BK)
    if DX:
        pointers = a_ptr + (layer_row + ranks[:, None]).to(tl.int64) * k + columns[None, :]
        a = tl.load(pointers, mask=(ranks[:, None] < width) & (columns[None, :] < k), other=0.0)
        product = tl.dot(dyb.to(DOT), a.to(DOT), input_precision="ieee", out_dtype=tl.float32)
        dx += tl.where(kept, product, 0.0)
    if DA:
        x = tl.where(kept, x, tl.zeros_like(x))
        da = tl.dot(tl.trans(dyb).to(DOT), x.to(DOT), da, input_precision="ieee", out_dtype=tl.float32)
    return dx, da


@jit(do_not_specialize=_SCALARS)
def _down_gradients_kernel(x_ptr, a_ptr, dyb_ptr, dx_ptr, da_ptr, m, k, x_stride, total, first, width, dropped, scale,
                           seed_0, seed_1, seed_2, rows_each, P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
                           BK: tl.constexpr, DOT: tl.constexpr, DX: tl.constexpr, DA: tl.constexpr,
                           ADDS: tl.constexpr):  # fmt: skip
    """dx (or, ADDS, more of it) of P layers, and what a chunk of rows gives to their dA [chunks, total, k]."""
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BK
    columns, ranks = start + tl.arange(0, BK), tl.arange(0, R)
    da_0 = tl.zeros([R, BK], tl.float32)
    da_1 = tl.zeros([R, BK], tl.float32)
    da_2 = tl.zeros([R, BK], tl.float32)
    for row in range(0, rows_each, BM):
        rows = chunk * rows_each + row + tl.arange(0, BM)
        inside = (rows[:, None] < m) & (columns[None, :] < k)
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        dx = tl.zeros([BM, BK], tl.float32)
        dx, da_0 = _layer_gradients(dx, da_0, x, dyb_ptr, a_ptr, seed_0, rows, start, first,
                                    m, k, total, width, dropped, R, BM, BK, DOT, DX, DA)  # fmt: skip
        if P > 1:
            dx, da_1 = _layer_gradients(dx, da_1, x, dyb_ptr, a_ptr, seed_1, rows, start, first + width,
                                        m, k, total, width, dropped, R, BM, BK, DOT, DX, DA)  # fmt: skip
        if P > 2:
            dx, da_2 = _layer_gradients(dx, da_2, x, dyb_ptr, a_ptr, seed_2, rows, start, first + 2 * width,
                                        m, k, total, width, dropped, R, BM, BK, DOT, DX, DA)  # fmt: skip
        if DX:
            pointers = dx_ptr + rows[:, None] * k + columns[None, :]
            dx = dx * scale
            if ADDS:
                dx += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            tl.store(pointers, dx, mask=inside)
    if DA:
        row = chunk * total + first
        inside = (ranks[:, None] < width) & (columns[None, :] < k)
        tl.store(da_ptr + (row + ranks[:, None]) * k + columns[None, :], da_0 * scale, mask=inside)
        if P > 1:
            tl.store(da_ptr + (row + width + ranks[:, None]) * k + columns[None, :], da_1 * scale, mask=inside)
        if P > 2:
            tl.store(da_ptr + (row + 2 * width + ranks[:, None]) * k + columns[None, :], da_2 * scale, mask=inside)


@jit
def _up_gradients_kernel(dy_ptr, b_ptr, xa_ptr, dyb_ptr, db_ptr, m, n, r, dy_stride, xa_stride, scale, rows_each,
                         R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, DYB: tl.constexpr,
                         DB: tl.constexpr):  # fmt: skip
    """What blocks of columns give to scale · dy B [blocks, m, r], chunks of rows to scale · dyᵀ xa [chunks, n, r]."""
    chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns, ranks = block * BN + tl.arange(0, BN), tl.arange(0, R)
    of_b = (columns[:, None] < n) & (ranks[None, :] < r)
    db = tl.zeros([BN, R], tl.float32)
    if DYB:
        b = tl.load(b_ptr + columns[:, None] * r + ranks[None, :], mask=of_b, other=0.0)
    for row in range(0, rows_each, BM):
        rows = chunk * rows_each + row + tl.arange(0, BM)
        inside = (rows[:, None] < m) & (columns[None, :] < n)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0)
        of_rows = (rows[:, None] < m) & (ranks[None, :] < r)
        if DYB:
            product = tl.dot(dy.to(DOT), b.to(DOT), input_precision="ieee", out_dtype=tl.float32)
            tl.store(dyb_ptr + (block * m + rows[:, None]) * r + ranks[None, :], product * scale, mask=of_rows)
        if DB:
            xa = tl.load(xa_ptr + rows[:, None] * xa_stride + ranks[None, :], mask=of_rows, other=0.0)
            db = tl.dot(tl.trans(dy).to(DOT), xa.to(DOT), db, input_precision="ieee", out_dtype=tl.float32)
    if DB:
        tl.store(db_ptr + (chunk * n + columns[:, None]) * r + ranks[None, :], db * scale, mask=of_b)


@jit
def _sum_kernel(parts_ptr, out_ptr, parts, rows, columns, out_stride, BLOCK: tl.constexpr):
    """out [rows, columns] = the sum over the first dimension of parts [parts, rows, columns]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(rows, tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index // columns * out_stride + index % columns, total, mask=index < size)


@writes("xa")
def dropped_down(xa: Tensor, x: Tensor, a: Tensor, seeds: Tensor, width: int, dropped: int, scale: float) -> None:
    """xa [m, p·width] = scale · drop(x) Aᵀ, of each layer with the mask of its own seed; width at most WIDEST."""
    m, k = x.shape
    if not m or not len(a):
        return
    drawn = seeds.tolist()
    for first, layers, chosen in _groups(drawn, width):
        _down_kernel[(_blocks(m, ROWS),)](
            x, a, xa, m, k, x.stride(0), len(a), first, width, dropped, scale, *chosen,
            P=layers, R=power_of_two(width), BM=ROWS, BK=COLUMNS, DOT=dot_type(x.dtype),
            num_warps=_warps_of_down(layers), num_stages=stages_of(x.dtype.itemsize),
        )  # fmt: skip


@writes("dx", "da")
def dropped_down_gradients(
    dx: Tensor | None,
    da: Tensor | None,
    x: Tensor,
    a: Tensor,
    dyb: Tensor,
    seeds: Tensor,
    width: int,
    dropped: int,
    scale: float,
) -> None:
    """dx [m, k] = Σ over layers of scale · drop(dyb A), with x's mask, and da [p·width, k] = scale · dybᵀ drop(x)."""
    m, k = x.shape
    if not m or not k or not len(a):
        for gradient in (dx, da):
            if gradient is not None:
                gradient.zero_()
        return
    rows_each = rows_of_a_chunk(m, _blocks(k, COLUMNS))
    grid = _blocks(m, rows_each), _blocks(k, COLUMNS)
    parts = None if da is None else x.new_empty(grid[0], *a.shape, dtype=torch.float32)
    for first, layers, chosen in _groups(seeds.tolist(), width):
        _down_gradients_kernel[grid](
            x, a, dyb, dx, parts, m, k, x.stride(0), len(a), first, width, dropped, scale, *chosen, rows_each,
            P=layers, R=power_of_two(width), BM=ROWS, BK=COLUMNS, DOT=dot_type(x.dtype),
            DX=dx is not None, DA=da is not None, ADDS=first > 0, num_warps=8, num_stages=2,
        )  # fmt: skip
    if da is not None and parts is not None:
        _sum(parts, da)


@writes("dyb", "db")
def up_gradients(dyb: Tensor | None, db: Tensor | None, dy: Tensor, b: Tensor, xa: Tensor, scale: float) -> None:
    """dyb [m, r] = scale · dy B and db [n, r] = scale · dyᵀ xa; dyb and xa may be columns of wider matrices."""
    (m, n), r = dy.shape, b.shape[1]
    if not m or not n or not r:
        for gradient in (dyb, db):
            if gradient is not None:
                gradient.zero_()
        return
    block = up_columns(r, dy.dtype.itemsize, shared_memory(dy.device))
    blocks = _blocks(n, block)
    rows_each = rows_of_a_chunk(m, blocks)
    chunks = _blocks(m, rows_each)
    of_dyb = None if dyb is None else dy.new_empty(blocks, m, r, dtype=torch.float32)
    of_db = None if db is None else dy.new_empty(chunks, n, r, dtype=torch.float32)
    _up_gradients_kernel[(chunks, blocks)](
        dy, b, xa, of_dyb, of_db, m, n, r, dy.stride(0), xa.stride(0), scale, rows_each, R=power_of_two(r), BM=ROWS,
        BN=block, DOT=dot_type(dy.dtype), DYB=dyb is not None, DB=db is not None,
        num_warps=8 if dy.dtype.itemsize > 2 else 4, num_stages=stages_of(dy.dtype.itemsize),
    )  # fmt: skip
    for parts, out in ((of_dyb, dyb), (of_db, db)):
        if parts is not None and out is not None:
            _sum(parts, out)


def stages_of(itemsize: int) -> int:
    """Tiles of 4 bytes a number that are on their way at once must fit 99 KB of shared memory, too."""
    return 2 if itemsize > 2 else 3


def up_columns(r: int, itemsize: int, shared: int) -> int:
    """Columns of a tile of dy, rows of one of B: a half of them for the largest that `up_gradients_pay` allows, where
    a program has no more than the 64 KB of 7.5."""
    return UP_COLUMNS if shared > 1 << 16 or power_of_two(r) * itemsize <= LARGEST_RANK // 2 else UP_COLUMNS // 2


def up_gradients_pay(m: int, n: int, r: int, itemsize: int) -> bool:
    """Whether the partial sums of `up_gradients`, float32 written and read, are fewer bytes than dy read once more, and
    its tiles fit into shared memory."""
    if not m or not n or power_of_two(r) * itemsize > LARGEST_RANK:
        return False
    blocks = _blocks(n, UP_COLUMNS)
    chunks = _blocks(m, rows_of_a_chunk(m, blocks))
    return 2 * 4 * r * (blocks * m + chunks * n) < itemsize * m * n


def rows_of_a_chunk(m: int, blocks: int) -> int:
    """How many rows one program sums over, so that with `blocks` blocks of columns there are about PROGRAMS."""
    return _blocks(_blocks(m, max(1, PROGRAMS // blocks)), ROWS) * ROWS


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _warps_of_down(layers: int) -> int:
    """The masks of several layers do not fit the registers of four."""
    return 4 if layers == 1 else 8


def _groups(seeds: list[int], width: int) -> list[tuple[int, int, list[int]]]:
    """Layers that one kernel reads x for: their first column, their number, and three seeds."""
    at_once = max(1, min(3, WIDEST // power_of_two(width)))
    parts = [seeds[start : start + at_once] for start in range(0, len(seeds), at_once)]
    return [(i * at_once * width, len(part), [*part, 0, 0][:3]) for i, part in enumerate(parts)]


def _sum(parts: Tensor, out: Tensor) -> None:
    number, rows, columns = parts.shape
    _sum_kernel[(_blocks(rows * columns, SUM_BLOCK),)](
        parts, out, number, rows, columns, out.stride(0), BLOCK=SUM_BLOCK
    )


_SEEDS = dict.fromkeys(("seed_0", "seed_1", "seed_2"), "i32")
_OF_X = {"m": "i32", "k": "i32", "x_stride": "i32", "total": "i32", "first": "i32", "width": "i32", "dropped": "i32"}
BUILDS = [
    *(
        Build(
            f"lora_linear down of {layers}, rank {rank}", _down_kernel,
            {"x_ptr": "*{dtype}", "a_ptr": "*{dtype}", "xa_ptr": "*{dtype}", **_OF_X, "scale": "fp32", **_SEEDS},
            {"P": layers, "R": rank, "BM": ROWS, "BK": COLUMNS, "DOT": "{dtype}"},
            num_warps=_warps_of_down(layers), num_stages=3, aligned=("k", "x_stride", "total", "width"),
        )
        for layers, rank in ((1, 16), (3, 16), (1, 64))
    ),
    *(
        Build(
            f"lora_linear gradients of down of {layers}, rank {rank}", _down_gradients_kernel,
            {"x_ptr": "*{dtype}", "a_ptr": "*{dtype}", "dyb_ptr": "*{dtype}", "dx_ptr": "*{dtype}", "da_ptr": "*fp32",
             **_OF_X, "scale": "fp32", **_SEEDS, "rows_each": "i32"},
            {"P": layers, "R": rank, "BM": ROWS, "BK": COLUMNS, "DOT": "{dtype}", "DX": True, "DA": True,
             "ADDS": False},
            num_warps=8, num_stages=2, aligned=("k", "x_stride", "total", "width", "rows_each"),
        )
        for layers, rank in ((1, 16), (3, 16), (1, 64))
    ),
    *(
        Build(
            f"lora_linear gradients of up, rank {rank}", _up_gradients_kernel,
            {"dy_ptr": "*{dtype}", "b_ptr": "*{dtype}", "xa_ptr": "*{dtype}", "dyb_ptr": "*fp32", "db_ptr": "*fp32",
             "m": "i32", "n": "i32", "r": "i32", "dy_stride": "i32", "xa_stride": "i32", "scale": "fp32",
             "rows_each": "i32"},
            {"R": rank, "BM": ROWS, "BN": UP_COLUMNS, "DOT": "{dtype}", "DYB": True, "DB": True},
            num_warps=4, num_stages=3, aligned=("n", "r", "dy_stride", "xa_stride", "rows_each"),
        )
        for rank in (16, 32)
    ),
    Build(
        "lora_linear sum", _sum_kernel,
        {"parts_ptr": "*fp32", "out_ptr": "*{dtype}",
         **dict.fromkeys(("parts", "rows", "columns", "out_stride"), "i32")},
        {"BLOCK": SUM_BLOCK}, aligned=("rows", "columns", "out_stride"),
    ),
]  # fmt: skip
"""All kernels at sizes of large models."""
