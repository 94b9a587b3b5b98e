"""Rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, on_triton, power_of_two, writes
from shardtune_kernels._rows import unit_stride

PAIRS = 1024
"""That a program rotates: of one token, as many heads as hold them."""


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [b, h, s, d] and k [b, g, s, d], rotated by position (Su et al. 2021, arXiv:2104.09864), halves paired:
    x · cos + rotate(x) · sin with rotate([x₁, x₂]) = [-x₂, x₁]; cos, sin [b or 1, s, d' ≤ d]; beyond d' x stays.

    Transposed views, as [b, s, h, d] is handed over, are read where they lie, and the results lie alike. In float32
    inside; the results have the dtypes that torch promotes to. Backward keeps nothing but cos and sin.

    Raises:
        ValueError: shapes that do not fit, or cos or sin that want a gradient, which they do not get.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q and k must be [b, h, s, d] and [b, g, s, d], not {tuple(q.shape)} and {tuple(k.shape)}")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[2]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [{q.shape[0]} or 1, {q.shape[2]}, d']"
        )
    if cos.shape[2] > q.shape[3] or cos.shape[2] % 2:
        raise ValueError(f"the {cos.shape[2]} columns of cos must be even and no more than the {q.shape[3]} of q")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradients: give them detached")
    if not on_triton(q) or torch.float64 in (q.dtype, k.dtype):
        return reference.rope(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin)


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        tables = torch.promote_types(cos.dtype, sin.dtype)
        turned = [_empty_as(x, torch.promote_types(x.dtype, tables)) for x in (q, k)]
        _rotate(unit_stride(q), turned[0], unit_stride(k), turned[1], unit_stride(cos), unit_stride(sin), False)
        return turned[0], turned[1]

    @staticmethod
    @once
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        given, turned = [], []
        for gradient, needed, dtype in zip((dq, dk), ctx.needs_input_grad, ctx.dtypes, strict=False):
            used = gradient if needed else None
            given.append(None if used is None else unit_stride(used))
            turned.append(None if used is None else _empty_as(used, dtype))
        _rotate(given[0], turned[0], given[1], turned[1], unit_stride(cos), unit_stride(sin), True)
        return turned[0], turned[1], None, None


def _empty_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The dimensions in the order of x's in memory, but columns last."""
    out = torch.empty_like(x, dtype=dtype)
    return out if out.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


@writes("q_out", "k_out")
def _rotate(
    q: Tensor | None, q_out: Tensor | None, k: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor,
    backward: bool,
) -> None:  # fmt: skip
    """One launch for both, or for the one that is given."""
    given = [x for x in (q, k) if x is not None and x.numel()]
    if not given:
        return
    batch, _, length, width = given[0].shape
    q, q_out, k, k_out = (None if x is None or not x.numel() else x for x in (q, q_out, k, k_out))
    pairs = power_of_two(cos.shape[2] // 2, at_least=1)
    heads = max(1, min(PAIRS // pairs, max(power_of_two(x.shape[1], at_least=1) for x in given)))
    blocks = [0 if x is None else triton.cdiv(x.shape[1], heads) for x in (q, k)]
    _kernel[(batch * length, sum(blocks))](
        q, q_out, k, k_out, cos, sin, length, width, cos.shape[2] // 2, blocks[0], *_sizes(q), *_sizes(q_out)[1:],
        *_sizes(k), *_sizes(k_out)[1:], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1),
        BACKWARD=backward, HEADS=heads, PAIRS=pairs,
        REST=0 if cos.shape[2] == width else power_of_two(width - cos.shape[2], at_least=1), num_warps=4,
    )  # fmt: skip


def _sizes(x: Tensor | None) -> tuple[int, ...]:
    """Heads, and the strides of batch, head and token."""
    return (0, 0, 0, 0) if x is None else (x.shape[1], *x.stride()[:3])


@jit
def _turn(
    x_ptr, out_ptr, cos, sin, other_cos, other_sin, batch, token, first_head, heads, width, half,
    x_batch, x_head, x_token, out_batch, out_head, out_token,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token: first · cos - second · sin, and second · other_cos + first · other_sin."""
    head = first_head + tl.arange(0, HEADS)[:, None].to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < half)
    x_ptr += batch * x_batch + token * x_token + head * x_head
    out_ptr += batch * out_batch + token * out_token + head * out_head
    first = tl.load(x_ptr + pair, mask=inside).to(tl.float32)
    second = tl.load(x_ptr + half + pair, mask=inside).to(tl.float32)
    tl.store(out_ptr + pair, first * cos - second * sin, mask=inside)
    tl.store(out_ptr + half + pair, second * other_cos + first * other_sin, mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        stays = (head < heads) & (column < width)
        tl.store(out_ptr + column, tl.load(x_ptr + column, mask=stays), mask=stays)


@jit
def _kernel(
    q_ptr, q_out_ptr, k_ptr, k_out_ptr, cos_ptr, sin_ptr, length, width, half, q_blocks,
    q_heads, q_batch, q_head, q_token, q_out_batch, q_out_head, q_out_token,
    k_heads, k_batch, k_head, k_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program: HEADS heads of one token of q, or of k after those of q."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    cos_ptr += batch * cos_batch + token * cos_token + pair
    sin_ptr += batch * sin_batch + token * sin_token + pair
    cos = tl.load(cos_ptr, mask=pair < half).to(tl.float32)
    other_cos = tl.load(cos_ptr + half, mask=pair < half).to(tl.float32)
    sin = tl.load(sin_ptr, mask=pair < half).to(tl.float32)
    other_sin = tl.load(sin_ptr + half, mask=pair < half).to(tl.float32)
    if BACKWARD:  # the transposed rotation
        sin, other_sin = -other_sin, -sin
    block = tl.program_id(1)
    if q_ptr is not None:  # noqa: SIM102 (known when it is compiled; the next is not)
        if block < q_blocks:
            _turn(
                q_ptr, q_out_ptr, cos, sin, other_cos, other_sin, batch, token, block * HEADS, q_heads, width, half,
                q_batch, q_head, q_token, q_out_batch, q_out_head, q_out_token, HEADS, PAIRS, REST,
            )  # fmt: skip
    if k_ptr is not None:  # noqa: SIM102
        if block >= q_blocks:
            _turn(
                k_ptr, k_out_ptr, cos, sin, other_cos, other_sin, batch, token, (block - q_blocks) * HEADS, k_heads,
                width, half, k_batch, k_head, k_token, k_out_batch, k_out_head, k_out_token, HEADS, PAIRS, REST,
            )  # fmt: skip


def _builds() -> list[Build]:
    pointers = dict.fromkeys(["q_ptr", "q_out_ptr", "k_ptr", "k_out_ptr", "cos_ptr", "sin_ptr"], "*{dtype}")
    sizes = dict.fromkeys(
        [name for name in _kernel.arg_names if name not in pointers and not name.isupper()], "i32"
    )  # fmt: skip
    aligned = tuple(name for name in sizes if name not in ("length", "q_blocks", "q_heads", "k_heads"))
    constants = {"HEADS": 16, "PAIRS": 64, "REST": 0}
    return [
        Build(f"rope {name}, 128 wide", _kernel, pointers | sizes, {**constants, "BACKWARD": back}, aligned=aligned)
        for name, back in (("forward", False), ("backward", True))
    ]


BUILDS = _builds()
