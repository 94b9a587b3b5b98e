"""Root mean square normalization."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, on_triton, writes
from shardtune_kernels._rows import read_rows, rows_of, summing_programs, tile_of

KINDS = ("llama", "t5", "gemma")
WIDEST = 16384
"""Columns that a program holds in registers; wider rows are read twice."""
WIDEST_BACKWARD = 8192


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kind: str = "llama", residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    x [..., d], weight [d]; in float32 inside, rounded where models of that `kind` round: llama to the dtype of x
    before the weight is multiplied, t5 to that of the weight, gemma (which multiplies 1 + weight) only at the end.
    The result has the dtype that torch promotes to, of gemma that of x. With `residual`, of the shape of x: y of
    x + residual, and x + residual itself, both with gradients.

    For backward x (or x + residual) and one float32 a row are kept. The gradient of the weight is summed in two
    stages, without atomic additions, and only if the weight is trained.

    Raises:
        ValueError: an unknown kind, or shapes that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be as wide as x {tuple(x.shape)}, but is {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    if not on_triton(x) or x.dtype == torch.float64:
        return reference.rms_norm(x, weight, eps, kind, residual)
    return _RmsNorm.apply(x, weight, residual, eps, kind)


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, kind: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kind = kind
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        total = None
        if residual is not None:
            total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        summed = x if total is None else total
        dtype = {"gemma": summed.dtype, "t5": weight.dtype}.get(kind, torch.promote_types(summed.dtype, weight.dtype))
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if any(ctx.needs_input_grad) else None
        own = None if residual is None else rows_of(residual)
        _forward(rows_of(x), own, weight.contiguous(), y, total, rstd, eps, kind)
        if rstd is not None:
            ctx.save_for_backward(summed, weight, rstd)
        return y if total is None else (y, total)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        summed, weight, rstd = ctx.saved_tensors
        of_x, of_weight, of_residual = ctx.needs_input_grad[:3]
        if dy is None:
            dx, dweight = dtotal, None
        else:
            dx = torch.empty(summed.shape, dtype=summed.dtype, device=dy.device) if of_x or of_residual else None
            partial = None
            if of_weight:
                programs = summing_programs(rstd.numel(), len(weight))
                partial = torch.zeros(programs, len(weight), dtype=torch.float32, device=dy.device)
            later = None if dtotal is None or dx is None else rows_of(dtotal)
            _backward(rows_of(dy), later, rows_of(summed), weight.contiguous(), rstd, dx, partial, ctx.kind)
            dweight = None if partial is None else partial.sum(0).to(weight.dtype)
        x_dtype, residual_dtype = ctx.dtypes
        return (
            dx.to(x_dtype) if dx is not None and of_x else None, dweight,
            dx.to(residual_dtype) if dx is not None and of_residual else None, None, None,
        )  # fmt: skip


@writes("y", "total", "rstd")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, rstd: Tensor | None,
    eps: float, kind: str,
) -> None:  # fmt: skip
    """Rows x and residual [m, d]; y, total and rstd contiguous."""
    rows, width = x.shape
    if x.numel() == 0:
        return
    tile = tile_of(width, WIDEST)
    _forward_kernel[(triton.cdiv(rows, tile.rows),)](
        x, residual, weight, y, total, rstd, rows, width, x.stride(0), 0 if residual is None else residual.stride(0),
        eps, KIND=kind, WHOLE=tile.whole, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


@writes("dx", "partial")
def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor | None,
    partial: Tensor | None, kind: str,
) -> None:  # fmt: skip
    """Rows dy, dtotal and x [m, d]; dx contiguous; partial [programs, d] zeros."""
    rows, width = x.shape
    if x.numel() == 0:
        return
    tile = tile_of(width, WIDEST_BACKWARD)
    programs = triton.cdiv(rows, tile.rows)
    _backward_kernel[(programs if partial is None else min(programs, len(partial)),)](
        dy, dtotal, x, weight, rstd, dx, partial, rows, width, dy.stride(0),
        0 if dtotal is None else dtotal.stride(0), x.stride(0),
        KIND=kind, WHOLE=tile.whole, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


@jit
def _factor(weight_ptr, column, width, KIND: tl.constexpr):
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return 1.0 + weight if KIND == "gemma" else weight


@jit
def _scaled(x, rstd, weight_ptr, x_dtype: tl.constexpr, column, width, KIND: tl.constexpr):
    """Rounded where the kind rounds."""
    normed = x * rstd
    if KIND == "llama":
        normed = normed.to(x_dtype).to(tl.float32)
    if KIND == "t5":
        normed = normed.to(weight_ptr.dtype.element_ty).to(tl.float32)
    return normed * _factor(weight_ptr, column, width, KIND)


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr,
    rows, width, x_stride, residual_stride, eps,
    KIND: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x_dtype: tl.constexpr = x_ptr.dtype.element_ty if residual_ptr is None else total_ptr.dtype.element_ty
    if WHOLE:
        column = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
        if total_ptr is not None:
            tl.store(total_ptr + row * width + column, x, mask=inside)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
        tl.store(y_ptr + row * width + column, _scaled(x, rstd, weight_ptr, x_dtype, column, width, KIND), mask=inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
            if total_ptr is not None:
                tl.store(total_ptr + row * width + column, x, mask=inside)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / width + eps)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
            y = _scaled(x, rstd, weight_ptr, x_dtype, column, width, KIND)
            tl.store(y_ptr + row * width + column, y, mask=inside)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@jit
def _dx(g, normed, mean, rstd, dtotal_ptr, row, column, dtotal_stride, inside):
    """With g = dL/dnormed and mean = mean(g · normed): rstd · (g - normed · mean), and what comes to x + residual."""
    dx = rstd * (g - normed * mean)
    if dtotal_ptr is not None:
        dx += tl.load(dtotal_ptr + row * dtotal_stride + column, mask=inside, other=0.0).to(tl.float32)
    return dx


@jit
def _backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    rows, width, dy_stride, dtotal_stride, x_stride,
    KIND: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: every num_programs-th tile of ROWS rows, and what those give to the weight's gradient."""
    program = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if WHOLE:
            column = tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) * rstd
            if dx_ptr is not None:
                g = dy * _factor(weight_ptr, column, width, KIND)
                mean = tl.sum(g * normed, axis=1, keep_dims=True) / width
                dx = _dx(g, normed, mean, rstd, dtotal_ptr, row, column, dtotal_stride, inside)
                tl.store(dx_ptr + row * width + column, dx, mask=inside)
            if partial_ptr is not None:
                dweight += dy * normed
        else:
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)[None, :]
                inside = (row < rows) & (column < width)
                dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
                products += dy * _factor(weight_ptr, column, width, KIND) * (x * rstd)
            mean = tl.sum(products, axis=1, keep_dims=True) / width
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)[None, :]
                inside = (row < rows) & (column < width)
                dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
                normed = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) * rstd
                if dx_ptr is not None:
                    g = dy * _factor(weight_ptr, column, width, KIND)
                    dx = _dx(g, normed, mean, rstd, dtotal_ptr, row, column, dtotal_stride, inside)
                    tl.store(dx_ptr + row * width + column, dx, mask=inside)
                if partial_ptr is not None:
                    own = partial_ptr + program.to(tl.int64) * width + column
                    more = tl.sum(dy * normed, axis=0, keep_dims=True)
                    tl.store(own, tl.load(own, mask=column < width) + more, mask=column < width)
            tl.debug_barrier()  # another thread may read what was stored, with the next tile
    if WHOLE and partial_ptr is not None:
        column = tl.arange(0, BLOCK)
        own = partial_ptr + program.to(tl.int64) * width + column
        tl.store(own, tl.sum(dweight, axis=0), mask=column < width)


def _builds() -> list[Build]:
    pointers = {"x_ptr": "*{dtype}", "residual_ptr": "*{dtype}", "weight_ptr": "*{dtype}", "y_ptr": "*{dtype}"}
    forward = {**pointers, "total_ptr": "*{dtype}", "rstd_ptr": "*fp32", "rows": "i32", "width": "i32"}
    forward |= {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    backward = {"dy_ptr": "*{dtype}", "dtotal_ptr": "*{dtype}", "x_ptr": "*{dtype}", "weight_ptr": "*{dtype}"}
    backward |= {"rstd_ptr": "*fp32", "dx_ptr": "*{dtype}", "partial_ptr": "*fp32", "rows": "i32", "width": "i32"}
    backward |= {"dy_stride": "i32", "dtotal_stride": "i32", "x_stride": "i32"}
    sizes = ("rows", "width", "x_stride")
    builds = []
    for width in (128, 4096, 16384, 32768):
        for name, kernel, signature, widest, more in (
            ("forward", _forward_kernel, forward, WIDEST, ("residual_stride",)),
            ("backward", _backward_kernel, backward, WIDEST_BACKWARD, ("dy_stride", "dtotal_stride")),
        ):
            tile = tile_of(width, widest)
            constants = {"KIND": "llama", "WHOLE": tile.whole, "ROWS": tile.rows, "BLOCK": tile.block}
            builds.append(Build(
                f"rms_norm {name}, {width} wide", kernel, signature, constants, tile.warps, aligned=(*sizes, *more),
            ))  # fmt: skip
    return builds


BUILDS = _builds()
