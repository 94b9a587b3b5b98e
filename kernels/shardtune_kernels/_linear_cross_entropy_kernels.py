"""Triton kernels of linear_cross_entropy: losses of rows of logits with their gradient in place, and scaling."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, power_of_two

BLOCK = 8192
"""Of a row of logits: with 16 warps a thread holds 16 numbers, and a row of 128k takes 16 turns."""
RESCALED = 4096
"""Numbers of a program that rescales: 32 a thread with 4 warps, as four loads of 16 bytes in 16 bits."""


@jit
def _tanh(x):
    # Near 0 the quotient cancels: the series there, whose next term is below 1e-8 of the value.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@jit
def _logits_at(row, bias, columns, classes, stride, scale, soft_cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """float32: the logits of a block as the loss sees them, -inf beyond the last; and tanh, where they are capped."""
    # Up to the stride, a multiple of 16: so loads are whole for any number of classes.
    z = tl.load(row + columns, mask=columns < stride, other=0.0).to(tl.float32) * scale
    inside = columns < classes
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    turned = z
    if CAPPED:
        turned = _tanh(z / soft_cap)
        z = soft_cap * turned
    return tl.where(inside, z, float("-inf")), turned


@jit
def _loss_kernel(
    logits, targets, bias, losses, classes, stride, scale, soft_cap, smoothing,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss and, in place of the products hidden Wᵀ, the gradient by scale · hidden Wᵀ + bias."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    target = tl.load(targets + number)
    # Read before anything is overwritten: the reductions below make all threads wait.
    z_target, _of_target = _logits_at(row, bias, target, classes, stride, scale, soft_cap, HAS_BIAS, CAPPED)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    plain_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, turned = _logits_at(row, bias, columns, classes, stride, scale, soft_cap, HAS_BIAS, CAPPED)
        higher = tl.maximum(highest, tl.max(z, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), axis=0)
        highest = higher
        if SMOOTHED:
            plain_sum += tl.sum(tl.where(columns < classes, z, 0.0), axis=0)
    loss = (highest - z_target) + tl.log(total)
    if SMOOTHED:
        loss += smoothing * (z_target - plain_sum / classes)
    tl.store(losses + number, loss)
    if GRADIENT:
        # From the end to the beginning: the end of the row is what the cache still holds.
        blocks = tl.cdiv(classes, BLOCK)
        for index in range(blocks):
            columns = (blocks - 1 - index) * BLOCK + tl.arange(0, BLOCK)
            z, turned = _logits_at(row, bias, columns, classes, stride, scale, soft_cap, HAS_BIAS, CAPPED)
            gradient = tl.exp(z - highest) / total
            if SMOOTHED:
                gradient -= smoothing / classes
                gradient -= tl.where(columns == target, 1.0 - smoothing, 0.0)
            else:
                gradient -= tl.where(columns == target, 1.0, 0.0)
            if CAPPED:
                gradient *= 1.0 - turned * turned
            tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < stride)


@jit
def _rescale_kernel(source, out, factor, count, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """out = source · factor, where both may lie in the same place: each number is read and written by one thread."""
    by = tl.load(factor)
    if not SAME or by != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < count
        x = tl.load(source + places, mask=inside, other=0.0).to(tl.float32) * by
        tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)


def start_loss(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    losses: Tensor,
    soft_cap: float | None,
    smoothing: float,
    scale: float,
    gradient: bool,
) -> None:
    """logits [m, v], products hidden Wᵀ, become their gradient if `gradient`; losses float32 [m].

    What lies between the v logits of a row and the next row must be finite and is overwritten.
    """
    rows, classes = logits.shape
    if rows == 0:
        return
    block = power_of_two(classes, 256, BLOCK)
    _loss_kernel[(rows,)](
        logits, targets, losses if bias is None else bias, losses, classes, logits.stride(0), scale,
        1.0 if soft_cap is None else soft_cap, smoothing,
        HAS_BIAS=bias is not None, CAPPED=soft_cap is not None, SMOOTHED=smoothing != 0.0, GRADIENT=gradient,
        BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip


def start_rescale(source: Tensor, out: Tensor, factor: Tensor) -> None:
    """out = source · factor, a float32 scalar; both contiguous, maybe of two dtypes in one place of memory."""
    count = source.numel()
    if count:
        _rescale_kernel[(triton.cdiv(count, RESCALED),)](
            source, out, factor, count, SAME=source.dtype == out.dtype and source.data_ptr() == out.data_ptr(),
            BLOCK=RESCALED, num_warps=4,
        )  # fmt: skip


def _loss_build(name: str, plain: bool, gradient: bool) -> Build:
    return Build(
        f"linear_cross_entropy: {name}", _loss_kernel,
        {"logits": "*{dtype}", "targets": "*i64", "bias": "*{dtype}", "losses": "*fp32", "classes": "i32",
         "stride": "i32", "scale": "fp32", "soft_cap": "fp32", "smoothing": "fp32"},
        {"HAS_BIAS": not plain, "CAPPED": not plain, "SMOOTHED": not plain, "GRADIENT": gradient, "BLOCK": BLOCK},
        num_warps=BLOCK // 512, aligned=("stride",),
    )  # fmt: skip


def _rescale_build(name: str, source: str, out: str) -> Build:
    return Build(
        f"linear_cross_entropy: {name}", _rescale_kernel,
        {"source": source, "out": out, "factor": "*fp32", "count": "i32"}, {"SAME": source == out, "BLOCK": RESCALED},
        num_warps=4, aligned=("count",),
    )  # fmt: skip


BUILDS = [
    _loss_build("loss and gradient", plain=True, gradient=True),
    _loss_build("loss and gradient; bias, cap, smoothing", plain=False, gradient=True),
    _loss_build("loss", plain=True, gradient=False),
    _rescale_build("rescale", "*{dtype}", "*{dtype}"),
    _rescale_build("rescale to half", "*{dtype}", "*fp16"),
    _rescale_build("rescale from half", "*fp16", "*{dtype}"),
]
"""Of what runs for large sizes in 16 bits."""
