"""How the kernels of biased_attention are started: their blocks, and what they are given of the table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels._biased_attention_backward import attention_backward_kv, attention_backward_q
from shardtune_kernels._biased_attention_forward import attention_forward, attention_kept
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import INTERPRETED, ceil_div, dot_type, power_of_two, writes

LOG2_E = math.log2(math.e)
CHANCES = 1 << 16
"""Dropout draws 16 bits for each probability: its rate is rounded to a multiple of 1 / CHANCES."""
Blocks = tuple[int, int, int, int]
"""Queries and keys of a block, warps, stages."""

_KNOWN: dict[tuple[int, int, bool, str], tuple[Tensor, int, int]] = {}


def members_of(buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> tuple[Tensor, int, int]:
    """(bucket of each distance from -left to right, left, right), beyond which the bucket stays the same."""
    key = buckets, max_distance, bidirectional, str(device)
    if key not in _KNOWN:
        distances = torch.arange(-max_distance, max_distance + 1)
        of = reference.buckets_of(distances, buckets, max_distance, bidirectional)
        low = int((of != of[0]).long().argmax()) - 1
        high = int((of != of[-1]).nonzero().max()) + 1
        _KNOWN[key] = of[low : high + 1].to(device), max_distance - low, high - max_distance
    return _KNOWN[key]


@writes("out", "lse")
def launch_forward(
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
def launch_backward(
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
            members, _, _ = members_of(dtable.shape[0], max_distance, bidirectional, q.device)
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
def write_kept(kept: Tensor, seed: int, rate: float) -> None:
    b, h, s, t = kept.shape
    if kept.numel() == 0:
        return
    block_m, block_n = power_of_two(s, 16, 64), power_of_two(t, 16, 64)
    row_blocks = ceil_div(s, block_m)
    attention_kept[(b * h * row_blocks, ceil_div(t, block_n))](
        kept, seed, round(rate * CHANCES), s, t, row_blocks, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )


def _diagonals(table: Tensor | None, max_distance: int, bidirectional: bool) -> tuple[Tensor | None, int, int]:
    """float32 [h, left + right + 1]: the bias of each distance from -left to right, in units of log 2; left; right."""
    if table is None:
        return None, 0, 0
    members, left, right = members_of(len(table), max_distance, bidirectional, table.device)
    return (table.detach().float()[members].T * LOG2_E).contiguous(), left, right


def _sequences(
    b: int, length: int, offsets: Tensor | None, longest: int, block: int, ahead: int = 0
) -> tuple[int, int]:
    """How many there are: rows of the batch, or documents; and how many blocks the longest has."""
    if offsets is None:
        return b, ceil_div(length, block)
    if longest < 0:
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    return len(offsets) - 1, ceil_div(longest + ahead, block)


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
    _, left, right = members_of(32, 128, True, torch.device("cpu"))
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
