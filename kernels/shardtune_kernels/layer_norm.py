"""Layer normalization."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, on_triton, writes
from shardtune_kernels._rows import read_rows, rows_of, summing_programs, tile_of

WIDEST = 16384
"""Columns that a program holds in registers; wider rows are read three times."""
WIDEST_BACKWARD = 8192


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / √(variance + eps) · weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    x [..., d], weight and bias [d] or None; in float32 inside, the result in the dtype of x. With `residual`, of the
    shape of x: y of x + residual, and x + residual itself, both with gradients.

    For backward x (or x + residual) and two float32 a row are kept. Gradients of weight and bias are summed in two
    stages, without atomic additions, and only those that are trained.

    Raises:
        ValueError: shapes that do not fit.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (x.dim() == 0 or parameter.shape != x.shape[-1:]):
            raise ValueError(f"{name} must be as wide as x {tuple(x.shape)}, but is {tuple(parameter.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    if on_triton(x) and x.dtype != torch.float64:
        return _LayerNorm.apply(x, weight, bias, residual, eps)
    total = x if residual is None else x + residual
    if total.dtype.itemsize >= 4 and all(p is None or p.dtype == total.dtype for p in (weight, bias)):
        # In 16 bits torch's own sums the gradients of the parameters in 16 bits.
        y = functional.layer_norm(total, total.shape[-1:], weight, bias, eps)
        return y if residual is None else (y, total)
    return reference.layer_norm(x, weight, bias, eps, residual)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if given is None else given.dtype for given in (x, weight, bias, residual)]
        total, own = None, None
        if residual is not None:
            total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
            own = rows_of(residual)
        summed = x if total is None else total
        y = torch.empty(x.shape, dtype=summed.dtype, device=x.device)
        mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
        own_weight, own_bias = (None if given is None else given.contiguous() for given in (weight, bias))
        _forward(rows_of(x), own, own_weight, own_bias, y, total, mean, rstd, eps)
        ctx.save_for_backward(summed, weight, mean, rstd)
        return y if total is None else (y, total)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        summed, weight, mean, rstd = ctx.saved_tensors
        of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
        x_dtype, weight_dtype, bias_dtype, residual_dtype = ctx.dtypes
        dx, dweight, dbias = dtotal, None, None
        if dy is not None:
            dx = torch.empty(summed.shape, dtype=summed.dtype, device=dy.device) if of_x or of_residual else None
            width = summed.shape[-1]
            sums = (summing_programs(rstd.numel(), width), width)
            parts = [
                torch.zeros(sums, dtype=torch.float32, device=dy.device) if needed else None
                for needed in (of_weight, of_bias)
            ]
            later = None if dtotal is None or dx is None else rows_of(dtotal)
            own = None if weight is None else weight.contiguous()
            _backward(rows_of(dy), later, rows_of(summed), own, mean, rstd, dx, *parts)
            dweight, dbias = (None if part is None else part.sum(0) for part in parts)
        return (
            dx.to(x_dtype) if dx is not None and of_x else None,
            None if dweight is None else dweight.to(weight_dtype), None if dbias is None else dbias.to(bias_dtype),
            dx.to(residual_dtype) if dx is not None and of_residual else None, None,
        )  # fmt: skip


@writes("y", "total", "mean", "rstd")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, y: Tensor, total: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float,
) -> None:  # fmt: skip
    """Rows x and residual [m, d]; the outputs contiguous."""
    rows, width = x.shape
    if x.numel() == 0:
        return
    tile = tile_of(width, WIDEST)
    _forward_kernel[(triton.cdiv(rows, tile.rows),)](
        x, residual, weight, bias, y, total, mean, rstd, rows, width, x.stride(0),
        0 if residual is None else residual.stride(0), eps,
        WHOLE=tile.whole, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


@writes("dx", "dweight", "dbias")
def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    """Rows dy, dtotal and x [m, d]; dx contiguous; dweight and dbias [programs, d] zeros."""
    rows, width = x.shape
    if x.numel() == 0:
        return
    tile = tile_of(width, WIDEST_BACKWARD)
    programs = triton.cdiv(rows, tile.rows)
    for sums in (dweight, dbias):
        programs = programs if sums is None else min(programs, len(sums))
    _backward_kernel[(programs,)](
        dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias, rows, width, dy.stride(0),
        0 if dtotal is None else dtotal.stride(0), x.stride(0),
        WHOLE=tile.whole, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


@jit
def _scaled(normed, weight_ptr, bias_ptr, column, width):
    if weight_ptr is not None:
        normed = normed * tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed = normed + tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return normed


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, width, x_stride, residual_stride, eps,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if WHOLE:
        column = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
        if total_ptr is not None:
            tl.store(total_ptr + row * width + column, x, mask=inside)
        mean = tl.sum(x, axis=1, keep_dims=True) / width
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / width + eps)
        y = _scaled(centred * rstd, weight_ptr, bias_ptr, column, width)
        tl.store(y_ptr + row * width + column, y, mask=inside)
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
            if total_ptr is not None:
                tl.store(total_ptr + row * width + column, x, mask=inside)
            sums += x
        mean = tl.sum(sums, axis=1, keep_dims=True) / width
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
            centred = tl.where(inside, x - mean, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / width + eps)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            x = read_rows(x_ptr, residual_ptr, total_ptr, row, column, x_stride, residual_stride, inside)
            y = _scaled((x - mean) * rstd, weight_ptr, bias_ptr, column, width)
            tl.store(y_ptr + row * width + column, y, mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@jit
def _g_and_normed(
    dy_ptr, x_ptr, weight_ptr, mean, rstd, row, column, width, dy_stride, x_stride, inside
):  # fmt: skip
    """dL/dy, dL/dnormed and normed, 0 outside."""
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    return dy, _scaled(dy, weight_ptr, None, column, width), tl.where(inside, (x - mean) * rstd, 0.0)


@jit
def _store_dx(
    dx_ptr, dtotal_ptr, g, normed, of_normed, of_one, rstd, row, column, width, dtotal_stride, inside
):  # fmt: skip
    """rstd · (g - normed · mean(g · normed) - mean(g)), and what comes to x + residual."""
    dx = rstd * (g - normed * of_normed - of_one)
    if dtotal_ptr is not None:
        dx += tl.load(dtotal_ptr + row * dtotal_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * width + column, dx, mask=inside)


@jit
def _add_to(sums_ptr, program, width, column, more):
    own = sums_ptr + program.to(tl.int64) * width + column
    tl.store(own, tl.load(own, mask=column < width) + tl.sum(more, axis=0, keep_dims=True), mask=column < width)


@jit
def _backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, width, dy_stride, dtotal_stride, x_stride,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: every num_programs-th tile of ROWS rows, and what those give to the parameters' gradients."""
    program = tl.program_id(0)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if WHOLE:
            column = tl.arange(0, BLOCK)[None, :]
            inside = (row < rows) & (column < width)
            dy, g, normed = _g_and_normed(
                dy_ptr, x_ptr, weight_ptr, mean, rstd, row, column, width, dy_stride, x_stride, inside
            )
            if dx_ptr is not None:
                of_normed = tl.sum(g * normed, axis=1, keep_dims=True) / width
                of_one = tl.sum(g, axis=1, keep_dims=True) / width
                _store_dx(
                    dx_ptr, dtotal_ptr, g, normed, of_normed, of_one, rstd, row, column, width, dtotal_stride, inside
                )
            if dweight_ptr is not None:
                dweight += dy * normed
            if dbias_ptr is not None:
                dbias += dy
        else:
            products, ones = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)[None, :]
                inside = (row < rows) & (column < width)
                dy, g, normed = _g_and_normed(
                    dy_ptr, x_ptr, weight_ptr, mean, rstd, row, column, width, dy_stride, x_stride, inside
                )
                products += g * normed
                ones += g
            of_normed = tl.sum(products, axis=1, keep_dims=True) / width
            of_one = tl.sum(ones, axis=1, keep_dims=True) / width
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)[None, :]
                inside = (row < rows) & (column < width)
                dy, g, normed = _g_and_normed(
                    dy_ptr, x_ptr, weight_ptr, mean, rstd, row, column, width, dy_stride, x_stride, inside
                )
                if dx_ptr is not None:
                    _store_dx(
                        dx_ptr, dtotal_ptr, g, normed, of_normed, of_one, rstd,
                        row, column, width, dtotal_stride, inside,
                    )  # fmt: skip
                if dweight_ptr is not None:
                    _add_to(dweight_ptr, program, width, column, dy * normed)
                if dbias_ptr is not None:
                    _add_to(dbias_ptr, program, width, column, dy)
            tl.debug_barrier()  # another thread may read what was stored, with the next tile
    if WHOLE:
        column = tl.arange(0, BLOCK)
        if dweight_ptr is not None:
            _store_sum(dweight_ptr, program, width, column, dweight)
        if dbias_ptr is not None:
            _store_sum(dbias_ptr, program, width, column, dbias)


@jit
def _store_sum(sums_ptr, program, width, column, sums):
    tl.store(sums_ptr + program.to(tl.int64) * width + column, tl.sum(sums, axis=0), mask=column < width)


def _builds() -> list[Build]:
    of_dtype = ["x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "total_ptr"]
    forward = {**dict.fromkeys(of_dtype, "*{dtype}"), "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "rows": "i32"}
    forward |= {"width": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    backward = dict.fromkeys(["dy_ptr", "dtotal_ptr", "x_ptr", "weight_ptr", "dx_ptr"], "*{dtype}")
    backward |= dict.fromkeys(["mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"], "*fp32")
    backward |= dict.fromkeys(["rows", "width", "dy_stride", "dtotal_stride", "x_stride"], "i32")
    sizes = ("rows", "width", "x_stride")
    builds = []
    for width in (1024, 4096, 16384, 32768):
        for name, kernel, signature, widest, more in (
            ("forward", _forward_kernel, forward, WIDEST, ("residual_stride",)),
            ("backward", _backward_kernel, backward, WIDEST_BACKWARD, ("dy_stride", "dtotal_stride")),
        ):
            tile = tile_of(width, widest)
            constants = {"WHOLE": tile.whole, "ROWS": tile.rows, "BLOCK": tile.block}
            builds.append(Build(
                f"layer_norm {name}, {width} wide", kernel, signature, constants, tile.warps, aligned=(*sizes, *more),
            ))  # fmt: skip
    return builds


BUILDS = _builds()
