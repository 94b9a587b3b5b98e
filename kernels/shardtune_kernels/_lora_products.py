"""The products that linear layers with adapters are made of: the large ones are torch's, the low-rank ones torch's or
kernels, whichever read less.

Adapters that read one x are stacked: `a` [p·r, k] holds the A of p layers one below the other, `xa` and `dyb`
[m, p·r] lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import _lora_kernels as kernels
from shardtune_kernels._launch import on_triton
from shardtune_kernels._rows import unit_stride
from shardtune_kernels.dropout import draw_mask
from shardtune_kernels.four_bit import four_bit_product, four_bit_transposed_product, nf4_dequantize
from shardtune_kernels.weights import FourBitWeight

FOUR_BIT_ROWS = 1024
"""Up to so many rows of x `four_bit` chooses how to multiply by a weight in four bits. With more, dequantizing costs
little beside the product, and one more pass over what it is added to would cost more."""
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Dropout(NamedTuple):
    """One mask over x for each of p adapters; nothing but seeds is kept of them."""

    seeds: Tensor
    """int64 [p], on the CPU."""
    steps: int
    """Probability of a zero, as `dropout.dropped_steps` says."""
    scale: float
    """Of what is not zero, so that the mean stays."""


def dense(weight: Tensor | FourBitWeight, dtype: torch.dtype) -> Tensor:
    """W [n, k] in `dtype`."""
    matrix = nf4_dequantize(weight) if isinstance(weight, FourBitWeight) else weight
    return matrix if matrix.dtype == dtype else matrix.to(dtype)


def base_product(x: Tensor, weight: Tensor | FourBitWeight, y: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ [m, n], added to y in place where there is one, which is read as the product is written; else + bias."""
    if isinstance(weight, FourBitWeight) and len(x) <= FOUR_BIT_ROWS:
        product = four_bit_product(x, weight)
        added = bias if y is None else y
        return product if added is None else product.add_(added)
    transposed = dense(weight, x.dtype).t()
    if y is not None:
        return y.addmm_(x, transposed)
    return torch.mm(x, transposed) if bias is None else torch.addmm(bias.to(x.dtype), x, transposed)


def base_product_backward(dy: Tensor, weight: Tensor | FourBitWeight, dx: Tensor | None) -> Tensor:
    """dy W [m, k], added to dx in place where there is one."""
    if isinstance(weight, FourBitWeight) and len(dy) <= FOUR_BIT_ROWS:
        product = four_bit_transposed_product(dy, weight)
        return product if dx is None else dx.add_(product)
    matrix = dense(weight, dy.dtype)
    return torch.mm(dy, matrix) if dx is None else dx.addmm_(dy, matrix)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right, scaled before it is rounded."""
    if scale == 1.0:
        return torch.mm(left, right)
    return torch.addmm(left.new_empty((left.shape[0], right.shape[1])), left, right, beta=0, alpha=scale)


def stacked(matrices: Sequence[Tensor], dtype: torch.dtype, rank: int) -> Tensor:
    """[p·rank, k] in `dtype`: each matrix [r ≤ rank, k] with rows of zeros below; the matrix itself if it is one."""
    if len(matrices) == 1 and len(matrices[0]) == rank:
        return matrices[0] if matrices[0].dtype == dtype else matrices[0].to(dtype)
    wide = matrices[0].new_zeros((len(matrices), rank, matrices[0].shape[1]), dtype=dtype)
    for index, matrix in enumerate(matrices):
        wide[index, : len(matrix)] = matrix
    return wide.flatten(0, 1)


def padded_rank(ranks: Sequence[int], drops: bool) -> int:
    """What adapters that are stacked are padded to; with dropout a large one is computed in parts of equal width."""
    rank, widest = max(ranks), kernels.WIDEST
    return -(-rank // widest) * widest if drops and rank > widest else rank


def down(x: Tensor, a: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(x) Aᵀ [m, p·r]; reads x once."""
    if dropout is None:
        return torch.mm(x, a.t())
    xa = x.new_empty((x.shape[0], a.shape[0]))
    if _has_kernels(x):
        kernels.dropped_down(xa, x, a.contiguous(), *_parts(a, dropout))
        return xa
    for index, layer in enumerate(_layers(a, dropout)):
        xa[:, layer] = scaled_product(_dropped(x, dropout, index), a[layer].t(), dropout.scale)
    return xa


def up(xa: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """scale · xa Bᵀ + bias [m, n]: what the base product is added to."""
    own = b.t() if b.dtype == xa.dtype else b.to(xa.dtype).t()
    if bias is None:
        return scaled_product(xa, own, scale)
    return torch.addmm(bias if bias.dtype == xa.dtype else bias.to(xa.dtype), xa, own, alpha=scale)


def down_gradients(
    dyb: Tensor, x: Tensor | None, a: Tensor, dropout: Dropout | None, needs_dx: bool, needs_da: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [m, k] and a [p·r, k] from that of xa; x is read once, and only for dA or a mask."""
    if dropout is None:
        assert x is not None or not needs_da
        return torch.mm(dyb, a) if needs_dx else None, torch.mm(dyb.t(), x) if needs_da and x is not None else None
    assert x is not None
    dx = x.new_empty(x.shape) if needs_dx else None
    da = x.new_empty(a.shape) if needs_da else None
    if _has_kernels(x):
        kernels.dropped_down_gradients(dx, da, x, a.contiguous(), dyb.contiguous(), *_parts(a, dropout))
        return dx, da
    for index, layer in enumerate(_layers(a, dropout)):
        kept, own = _mask(x, dropout, index), dyb[:, layer]
        if dx is not None:
            part = scaled_product(own, a[layer], dropout.scale).masked_fill_(~kept, 0.0)
            dx = part if index == 0 else dx.add_(part)
        if da is not None:
            da[layer] = scaled_product(own.t(), torch.where(kept, x, 0.0), dropout.scale)
    return dx, da


def up_gradients(
    dy: Tensor, b: Tensor, xa: Tensor | None, scale: float, needs_dyb: bool
) -> tuple[Tensor | None, Tensor | None]:
    """scale · dy B [m, r] if needed, and, given xa, scale · dyᵀ xa [n, r] in the dtype of b; dy is read once where
    that is less than to write and read the parts of the sums."""
    (m, n), r = dy.shape, b.shape[1]
    if _has_kernels(dy) and needs_dyb and xa is not None and kernels.up_gradients_pay(m, n, r, dy.dtype.itemsize):
        dyb, db = dy.new_empty((m, r)), b.new_empty(b.shape)
        kernels.up_gradients(dyb, db, unit_stride(dy), b.to(dy.dtype).contiguous(), xa, scale)
        return dyb, db
    own = b if b.dtype == dy.dtype else b.to(dy.dtype)
    dyb = scaled_product(dy, own, scale) if needs_dyb else None
    return dyb, None if xa is None else scaled_product(dy.t(), xa, scale)


def side_by_side(parts: Sequence[Tensor], rank: int) -> Tensor:
    """[m, p·rank] of parts [m, r ≤ rank], each with zeros at its right."""
    wide = [p if p.shape[1] == rank else functional.pad(p, (0, rank - p.shape[1])) for p in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)


def _has_kernels(x: Tensor) -> bool:
    return on_triton(x) and x.dtype in _KERNEL_DTYPES


def _parts(a: Tensor, dropout: Dropout) -> tuple[Tensor, int, int, float]:
    """Seeds and rank of the layers as kernels take them: one of a large rank is several with one seed."""
    rank = len(a) // len(dropout.seeds)
    width = min(rank, kernels.WIDEST)
    return dropout.seeds.repeat_interleave(rank // max(width, 1)), width, dropout.steps, dropout.scale


def _layers(a: Tensor, dropout: Dropout) -> list[slice]:
    """Each layer's rows of a, columns of xa."""
    count = len(dropout.seeds)
    rank = len(a) // count
    return [slice(index * rank, (index + 1) * rank) for index in range(count)]


def _mask(x: Tensor, dropout: Dropout, index: int) -> Tensor:
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    draw_mask(kept, dropout.seeds, index, dropout.steps)
    return kept


def _dropped(x: Tensor, dropout: Dropout, index: int) -> Tensor:
    return torch.where(_mask(x, dropout, index), x, 0.0)
