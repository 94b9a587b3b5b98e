"""Attention with T5's relative positions, in memory that grows with the length and not with its square."""

# pyright: reportCallIssue=false

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shardtune_kernels import reference
from shardtune_kernels._biased_attention_kernels import (
    attention_backward_kv,
    attention_backward_q,
    attention_forward,
    attention_kept,
)
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import INTERPRETED, dot_type, on_triton, power_of_two, writes
from shardtune_kernels.lora_linear import draw_seed

LOG2_E = math.log2(math.e)
CHANCES = 1 << 16
"""Dropout draws 16 bits for each probability: its rate is rounded to a multiple of 1 / CHANCES."""
Blocks = tuple[int, int, int, int]
"""Queries and keys of a block, warps, stages."""


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
            kept = attention_dropout_mask(seed or 0, dropout, *q.shape[:3], k.shape[2], q.device)
        return _plain(q, k, v, table, bidirectional, max_distance, causal, scale, shown, offsets, kept, dropout)
    q_offsets, k_offsets = (None, None) if offsets is None else (offsets[0].contiguous(), offsets[1].contiguous())
    most = (-1, -1) if longest is None else longest
    numbers = bidirectional, max_distance, causal, scale, *most, dropout, seed or 0
    return _Attention.apply(q, k, v, table, shown, q_offsets, k_offsets, numbers)  # pyright: ignore[reportReturnType]


def attention_dropout_mask(
    seed: int, rate: float, b: int, h: int, s: int, t: int, device: torch.device | str
) -> Tensor:
    """bool [b, h, s, t]: the probabilities that `biased_attention` on this device keeps; of packed documents, by row
    and column of the packed row."""
    kept = torch.empty((b, h, s, t), dtype=torch.bool, device=device)
    if on_triton(kept):
        _write_kept(kept.view(torch.uint8), seed, rate)
        return kept
    folded = (seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF  # a CPU's generator takes 32 bits
    generator = torch.Generator(device=device).manual_seed(folded)
    return torch.rand((b, h, s, t), generator=generator, device=device) >= rate


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
        members, left, right = _members(len(table), max_distance, bidirectional, q.device)
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


_KNOWN: dict[tuple[int, int, bool, str], tuple[Tensor, int, int]] = {}


def _members(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> tuple[Tensor, int, int]:
    """(bucket of each distance from -left to right, left, right), beyond which the bucket stays the same."""
    key = buckets, max_distance, bidirectional, str(device)
    if key not in _KNOWN:
        distances = torch.arange(-max_distance, max_distance + 1)
        of = reference.buckets_of(distances, buckets, max_distance, bidirectional)
        low = int((of != of[0]).long().argmax()) - 1
        high = int((of != of[-1]).nonzero().max()) + 1
        _KNOWN[key] = of[low : high + 1].to(device), max_distance - low, high - max_distance
    return _KNOWN[key]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, shown: Tensor | None,
        q_offsets: Tensor | None, k_offsets: Tensor | None, numbers: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        shown = None if shown is None else shown.contiguous()
        out = _rows_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _forward(q, k, v, table, shown, q_offsets, k_offsets, out, lse, *numbers)
        ctx.save_for_backward(q, k, v, table, shown, q_offsets, k_offsets, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, shown, q_offsets, k_offsets, out, lse = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        needs = ctx.needs_input_grad
        dq, dk, dv = (_rows_like(x) if need else None for x, need in zip((q, k, v), needs, strict=False))
        dtable = torch.empty_like(table) if table is not None and needs[3] else None
        _backward(grad, q, k, v, table, shown, q_offsets, k_offsets, out, lse, dq, dk, dv, dtable, *ctx.numbers)
        return dq, dk, dv, dtable, None, None, None, None


def _rows_like(x: Tensor) -> Tensor:
    """Of the shape [b, h, s, d] of x, in memory [b, s, h, d]."""
    b, h, s, d = x.shape
    return torch.empty((b, s, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


@writes("out", "lse")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, shown: Tensor | None, q_offsets: Tensor | None,
    k_offsets: Tensor | None, out: Tensor, lse: Tensor, bidirectional: bool, max_distance: int, causal: bool,
    scale: float, longest_q: int, longest_k: int, dropout: float, seed: int,
) -> None:  # fmt: skip
    b, h, s, d = q.shape
    t = k.shape[2]
    if out.numel() == 0:
        return
    block_m, block_n, warps, stages = _blocks("forward", q, t)
    count, blocks = _sequences(b, s, q_offsets, longest_q, block_m)
    if q_offsets is not None and (lse.shape[2] and count == 0):
        out.zero_()
        return
    diagonals, left, right = _diagonals(table, max_distance, bidirectional)
    attention_forward[(count * blocks * h,)](
        q, k, v, q if diagonals is None else diagonals, q if shown is None else shown.view(torch.uint8),
        q_offsets, k_offsets, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        h, s, t, blocks, d, scale * LOG2_E, seed, round(dropout * CHANCES), 1 / (1 - dropout),
        BIAS=diagonals is not None, LEFT=left, RIGHT=right, CAUSAL=causal, SHOWN=shown is not None,
        DOCUMENTS=q_offsets is not None, DROPOUT=dropout > 0,
        WHOLE_KEYS=q_offsets is None and t % block_n == 0, WHOLE_D=d == power_of_two(d),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=power_of_two(d), DOT=dot_type(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


@writes("dq", "dk", "dv", "dtable")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, shown: Tensor | None,
    q_offsets: Tensor | None, k_offsets: Tensor | None, out: Tensor, lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dtable: Tensor | None, bidirectional: bool, max_distance: int,
    causal: bool, scale: float, longest_q: int, longest_k: int, dropout: float, seed: int,
) -> None:  # fmt: skip
    b, h, s, d = q.shape
    t = k.shape[2]
    if q.numel() == 0 or k.numel() == 0 or (q_offsets is not None and len(q_offsets) == 1):
        for gradient in (dq, dk, dv, dtable):
            if gradient is not None:
                gradient.zero_()
        return
    diagonals, left, right = _diagonals(table, max_distance, bidirectional)
    deltas = torch.empty_like(lse)
    block_d = power_of_two(d)
    same: dict[str, Any] = {
        "BIAS": diagonals is not None, "LEFT": left, "RIGHT": right, "CAUSAL": causal, "SHOWN": shown is not None,
        "DOCUMENTS": q_offsets is not None, "DROPOUT": dropout > 0, "WHOLE_D": d == block_d, "BLOCK_D": block_d,
        "DOT": dot_type(q.dtype),
    }  # fmt: skip
    given = (
        q, k, v, q if diagonals is None else diagonals, q if shown is None else shown.view(torch.uint8),
        q_offsets, k_offsets,
    )  # fmt: skip
    chance = (seed, round(dropout * CHANCES), 1 / (1 - dropout))
    if dq is not None or dk is not None or dtable is not None:
        block_m, block_n, warps, stages = _blocks("q" if dtable is None else "q and bias", q, t)
        count, blocks = _sequences(b, s, q_offsets, longest_q, block_m)
        partials = lse
        if dtable is not None:
            slots = count * blocks if q_offsets is None else s // block_m + count
            partials = torch.zeros((slots, h, left + right + 1), dtype=torch.float32, device=q.device)
        written = q if dq is None else dq
        attention_backward_q[(count * blocks * h,)](
            *given, out, grad, lse, deltas, written, partials,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad.stride()[:3],
            *written.stride()[:3], h, s, t, blocks, d, scale * LOG2_E, scale, *chance,
            NEEDS_Q=dq is not None, NEEDS_BIAS=dtable is not None, **same,
            WHOLE_KEYS=q_offsets is None and t % block_n == 0,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if dtable is not None:
            members, _, _ = _members(dtable.shape[0], max_distance, bidirectional, q.device)
            own = members == torch.arange(dtable.shape[0], device=q.device)[:, None]
            dtable.copy_((own[:, None, :] * partials.sum(0)).sum(-1))
    if dk is not None or dv is not None:
        block_m, block_n, warps, stages = _blocks("kv, dropout" if dropout else "kv", q, t)
        # dropout may begin the blocks of a document up to 7 keys before it
        ahead = 7 if dropout and q_offsets is not None else 0
        count, blocks = _sequences(b, t, k_offsets, longest_k, block_n, ahead)
        keys, values = (q if x is None else x for x in (dk, dv))
        attention_backward_kv[(count * blocks * h,)](
            *given, grad, lse, deltas, keys, values,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
            *keys.stride()[:3], *values.stride()[:3], h, s, t, blocks, d, scale * LOG2_E, scale, *chance,
            NEEDS_K=dk is not None, NEEDS_V=dv is not None, **same,
            WHOLE_QUERIES=q_offsets is None and s % block_m == 0,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip


@writes("kept")
def _write_kept(kept: Tensor, seed: int, rate: float) -> None:
    b, h, s, t = kept.shape
    if kept.numel() == 0:
        return
    block_m, block_n = power_of_two(s, 16, 64), power_of_two(t, 16, 64)
    row_blocks = triton.cdiv(s, block_m)
    attention_kept[(b * h * row_blocks, triton.cdiv(t, block_n))](
        kept, seed, round(rate * CHANCES), s, t, row_blocks, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )


def _diagonals(table: Tensor | None, max_distance: int, bidirectional: bool) -> tuple[Tensor | None, int, int]:
    """float32 [h, left + right + 1]: the bias of each distance from -left to right, in units of log 2; left; right."""
    if table is None:
        return None, 0, 0
    members, left, right = _members(len(table), max_distance, bidirectional, table.device)
    return (table.detach().float()[members].T * LOG2_E).contiguous(), left, right


def _sequences(
    b: int, length: int, offsets: Tensor | None, longest: int, block: int, ahead: int = 0
) -> tuple[int, int]:
    """How many there are: rows of the batch, or documents; and how many blocks the longest has."""
    if offsets is None:
        return b, int(triton.cdiv(length, block))
    if longest < 0:
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    return len(offsets) - 1, int(triton.cdiv(longest + ahead, block))


def _blocks(kernel: str, q: Tensor, keys: int) -> Blocks:
    """What is fit for a device; lengths below a block make it smaller, and the interpreter is to see many blocks."""
    small = q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0)
    m, n, warps, stages = _blocks_of(kernel, q.shape[3], q.dtype.itemsize, small)
    if INTERPRETED:
        m, n = (32, 16) if q.dtype.itemsize == 2 else (16, 16)
    m, n = power_of_two(q.shape[2], 16, m), power_of_two(keys, 16, n)
    if kernel == "q and bias":
        m = min(m, 2 * n)  # a diagonal crosses at most three blocks
    return m, n, warps, stages


def _blocks_of(kernel: str, d: int, itemsize: int, small: bool) -> Blocks:
    """For shared memory of 99 KB (8.6, 8.9), or 64 KB (`small`: 7.5), and the registers of 8.0 and 9.0.

    A program reads the other side's rows from the L2 cache, so the side that stays is the larger one: 128 queries of
    the forward do 128 FLOP for each byte of k and v.
    """
    if itemsize == 4:
        return (32, 32, 4, 1) if d <= 32 else (16, 16, 4, 1)
    if small or d > 128:
        return (16, 16, 4, 1) if d > (128 if small else 256) else (32, 32, 4, 1)
    if d > 64:
        return (64, 64, 4, 2) if kernel == "forward" else (32, 64, 8, 2) if kernel.startswith("kv") else (64, 32, 8, 2)
    return {
        "forward": (128, 64, 8, 3), "q": (128, 32, 8, 3), "q and bias": (64, 32, 4, 3), "kv": (32, 128, 8, 3),
        "kv, dropout": (32, 64, 8, 3),
    }[kernel]  # fmt: skip


def _builds() -> list[Build]:
    """T5's shapes: 64 wide, 32 buckets up to 128, both directions; the bias trained."""
    pointers = dict.fromkeys(("q", "k", "v"), "*{dtype}") | {"diagonals": "*fp32", "shown": "*u8"}
    pointers |= dict.fromkeys(("q_offsets", "k_offsets"), "*i32")
    numbers = dict.fromkeys(("heads", "queries", "keys", "blocks", "d"), "i32") | {"scale": "fp32"}
    chance = {"seed": "i64", "threshold": "i32", "keep_scale": "fp32"}
    _, left, right = _members(32, 128, True, torch.device("cpu"))
    constants: dict[str, Any] = {
        "BIAS": True, "LEFT": left, "RIGHT": right, "CAUSAL": False, "SHOWN": True, "DOCUMENTS": False,
        "DROPOUT": False, "WHOLE_D": True, "BLOCK_D": 64, "DOT": "{dtype}",
    }  # fmt: skip

    def strides(*names: str) -> dict[str, str]:
        return {f"{name}_{axis}": "i32" for name in names for axis in "bhs"}

    def build(name: str, kernel: Any, which: str, signature: dict[str, str], more: dict[str, Any]) -> None:
        small = "64 KB" in name
        m, n, warps, stages = _blocks_of(which, 64, 2, small)
        aligned = (*(key for key in signature if key.endswith(("_b", "_h", "_s"))), "heads", "d")
        of = constants | {"BLOCK_M": m, "BLOCK_N": n} | more
        found.append(Build(f"biased_attention {name}", kernel, signature, of, warps, stages, aligned))

    forward = pointers | {"out": "*{dtype}", "lse": "*fp32"} | strides("q", "k", "v", "o") | numbers | chance
    grad = {"grad": "*{dtype}", "lse": "*fp32", "deltas": "*fp32"}
    of_q = pointers | {"out": "*{dtype}"} | grad | {"dq": "*{dtype}", "partials": "*fp32"}
    of_q |= strides("q", "k", "v", "o", "g", "dq") | numbers | {"q_scale": "fp32"} | chance
    of_kv = pointers | grad | {"dk": "*{dtype}", "dv": "*{dtype}"} | strides("q", "k", "v", "g", "dk", "dv")
    of_kv |= numbers | {"k_scale": "fp32"} | chance
    found = [
        Build(
            "biased_attention kept", attention_kept,
            {"kept": "*u8", "seed": "i64", "threshold": "i32", "queries": "i32", "keys": "i32", "row_blocks": "i32"},
            {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        )
    ]  # fmt: skip
    packed = {"DOCUMENTS": True, "SHOWN": False, "DROPOUT": True}
    for what, more in (("", {}), (", packed, dropout", packed), (", 64 KB", {})):
        of_keys = {"WHOLE_KEYS": not more, **more}
        build(f"forward{what}", attention_forward, "forward", forward, of_keys)
        for name, trained in (("q", False), ("q and bias", True)):
            build(f"{name}{what}", attention_backward_q, name, of_q, of_keys | {"NEEDS_Q": True, "NEEDS_BIAS": trained})
        of_queries = {"WHOLE_QUERIES": not more, "NEEDS_K": True, "NEEDS_V": True, **more}
        build(f"kv{what}", attention_backward_kv, "kv, dropout" if "dropout" in what else "kv", of_kv, of_queries)
    return found


BUILDS = _builds()
