"""Attention with T5's relative positions, in memory that grows with the length and not with its square."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._biased_attention_launch import BUILDS as BUILDS
from shardtune_kernels._biased_attention_launch import launch_backward, launch_forward, members_of, write_kept
from shardtune_kernels._launch import on_triton
from shardtune_kernels.dropout import draw_seed, generator_of


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    causal: bool = False,
    scale: float = 1.0,
    shown: Tensor | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v: q [b, h, s, d], k and v [b, h, t, d] -> [b, h, s, d], which lies in memory as
    [b, s, h, d].

    bias[h, i, j] = table[bucket(j - i), h], where `table` [buckets, h] holds a number for each head and bucket of
    distances, as T5 has it (Raffel et al. 2019, arXiv:1910.10683); None: no bias. It is not written out: the products
    go over blocks of queries and keys (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691), and gradients
    of q, k, v and the table compute them again.

    `causal`: a query sees keys up to its own position, where the last query stands at the last key. `shown`: bool
    [b, t], the keys that are tokens. `offsets`: int32 or int64 [n + 1] each, where documents begin and end in the rows
    of q and of k, which are then one (b = 1), without gaps: a query sees the keys of its own document, and positions
    count from its beginning. `longest`: document among the rows of q and of k, where that is known, which saves asking
    the device. A query that sees nothing gives 0.

    `dropout`: rate at which probabilities are dropped. `seed`, below 2⁶³, says which ones (`attention_dropout_mask`);
    drawn if not given. q, k and v are bfloat16, float16 or float32, all three the same; scores and sums are float32.

    Raises ValueError for shapes, dtypes, bucket numbers or a rate that do not fit.
    """
    _check(q, k, v, table, bidirectional, max_distance, shown, offsets, dropout)
    if dropout and seed is None:
        seed = draw_seed()
    if not on_triton(q) or q.dtype == torch.float64:
        kept = None
        if dropout:
            b, h, s, _ = q.shape
            kept = attention_dropout_mask(seed or 0, dropout, b, h, s, k.shape[2], q.device)
        return _plain(q, k, v, table, bidirectional, max_distance, causal, scale, shown, offsets, kept, dropout)
    q_offsets, k_offsets = (None, None) if offsets is None else (offsets[0].contiguous(), offsets[1].contiguous())
    most = (-1, -1) if longest is None else longest
    numbers = bidirectional, max_distance, causal, scale, *most, dropout, seed or 0
    return _Attention.apply(q, k, v, table, shown, q_offsets, k_offsets, numbers)


def attention_dropout_mask(
    seed: int, rate: float, b: int, h: int, s: int, t: int, device: torch.device | str
) -> Tensor:
    """bool [b, h, s, t]: the probabilities that `biased_attention` on this device keeps; of packed documents, by row
    and column of the packed row."""
    kept = torch.empty((b, h, s, t), dtype=torch.bool, device=device)
    if on_triton(kept):
        write_kept(kept.view(torch.uint8), seed, rate)
        return kept
    return torch.rand((b, h, s, t), generator=generator_of(seed, device), device=device) >= rate


def _check(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bidirectional: bool, max_distance: int,
    shown: Tensor | None, offsets: tuple[Tensor, Tensor] | None, dropout: float,
) -> None:  # fmt: skip
    """Says what does not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be [b, h, s, d], k and v [b, h, t, d]; they are {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; they have {q.dtype}, {k.dtype} and {v.dtype}")
    if table is not None:
        if table.dim() != 2 or table.shape[1] != q.shape[1]:
            raise ValueError(f"the table must be [buckets, {q.shape[1]} heads]; it is {tuple(table.shape)}")
        exact = len(table) // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"{len(table)} buckets and a largest distance of {max_distance} do not fit: {exact} distances of a "
                "direction have a bucket each, which must be at least 1 and less than the largest distance"
            )
    if shown is not None and (shown.shape != (q.shape[0], k.shape[2]) or shown.dtype != torch.bool):
        raise ValueError(f"shown must be bool [{q.shape[0]}, {k.shape[2]}]; it is {shown.dtype} {tuple(shown.shape)}")
    if offsets is not None:
        if shown is not None or q.shape[0] != 1:
            raise ValueError("packed documents (offsets) are one row without padding: b = 1, and no `shown`")
        if len(offsets[0]) != len(offsets[1]) or len(offsets[0]) < 1:
            raise ValueError(
                f"offsets of q and k must be of the same documents; they have {len(offsets[0])} and "
                f"{len(offsets[1])} entries"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1; it is {dropout}")


def _plain(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bidirectional: bool, max_distance: int, causal: bool,
    scale: float, shown: Tensor | None, offsets: tuple[Tensor, Tensor] | None, kept: Tensor | None, rate: float,
) -> Tensor:  # fmt: skip
    """With the scores as torch keeps them, one document after the other."""
    if offsets is not None:
        pieces = [q[:, :, :0]]
        documents = zip(*(list(itertools.pairwise(o.tolist())) for o in offsets), strict=True)
        for (i, j), (low, high) in documents:
            own = None if kept is None else kept[:, :, i:j, low:high]
            pieces.append(_plain(
                q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], table, bidirectional, max_distance, causal, scale,
                None, None, own, rate,
            ))  # fmt: skip
        return torch.cat(pieces, dim=2)
    queries, keys = q.shape[2], k.shape[2]
    if 0 in (*q.shape, keys):
        return q * 0 if keys else torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())
    hidden = None
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    if shown is not None:
        hidden = ~shown[:, None, None, :] if hidden is None else hidden | ~shown[:, None, None, :]
    blind = None
    if hidden is not None:  # who sees nothing looks at everything, and the result is put away
        blind = hidden.all(-1, keepdim=True)
        hidden = hidden & ~blind
    wide = torch.float32 if q.dtype.itemsize < 4 else q.dtype
    bias = None
    if table is not None:
        members, left, right = members_of(len(table), max_distance, bidirectional, q.device)
        distances = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
        bias = table.to(wide)[members].T[:, distances.clamp(-left, right) + left].unsqueeze(0)
    if hidden is not None:
        bias = hidden.new_zeros((), dtype=wide) if bias is None else bias
        bias = bias.masked_fill(hidden, -math.inf)
    if kept is None and wide == q.dtype:
        out = functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    else:
        scores = scale * (q.to(wide) @ k.to(wide).transpose(2, 3))
        p = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        out = (reference.dropped(p, kept, rate) @ v.to(wide)).to(q.dtype)
    return out if blind is None else out.masked_fill(blind, 0.0)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, shown: Tensor | None,
        q_offsets: Tensor | None, k_offsets: Tensor | None, numbers: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        shown = None if shown is None else shown.contiguous()
        out = _rows_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        launch_forward(q, k, v, table, shown, q_offsets, k_offsets, out, lse, *numbers)
        ctx.save_for_backward(q, k, v, table, shown, q_offsets, k_offsets, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, shown, q_offsets, k_offsets, out, lse = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        needs = ctx.needs_input_grad
        dq, dk, dv = (_rows_like(x) if need else None for x, need in zip((q, k, v), needs, strict=False))
        dtable = torch.empty_like(table) if table is not None and needs[3] else None
        launch_backward(grad, q, k, v, table, shown, q_offsets, k_offsets, out, lse, dq, dk, dv, dtable, *ctx.numbers)
        return dq, dk, dv, dtable, None, None, None, None


def _rows_like(x: Tensor) -> Tensor:
    """Of the shape [b, h, s, d] of x, in memory [b, s, h, d]."""
    b, h, s, d = x.shape
    return torch.empty((b, s, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)
