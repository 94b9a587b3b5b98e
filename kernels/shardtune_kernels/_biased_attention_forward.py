"""Triton kernels of attention with relative positions: forward, and the mask of its dropout."""

from __future__ import annotations

import triton.language as tl

from shardtune_kernels._biased_attention_tiles import (
    UNSPECIALIZED,
    hide,
    is_kept,
    key_parts,
    load_rows,
    place_of,
    scores_of,
)
from shardtune_kernels._launch import jit


@jit
def _attend(
    acc, top, total, q_md, k, v, shown, diagonals, near, right, end, first_position, rows, plane, first_k, keys, lead,
    d, k_stride, v_stride, scale, left_far, right_far, seed, threshold, keep_scale,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    SHOWN: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Goes over the blocks of keys: sum of p v, largest score and sum of p of each query."""
    own, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    positions = first_position + tl.arange(0, BLOCK_M)
    for block in range(end):
        start = block * BLOCK_N - lead
        columns = start + own
        inside = (columns >= 0) & (columns < keys)
        offset = start.to(tl.int64)
        k_nd = load_rows(k + offset * k_stride, own, dims, k_stride, inside, d, WHOLE_KEYS, WHOLE_D)
        products = tl.dot(q_md, tl.trans(k_nd.to(DOT)), input_precision="ieee", out_dtype=tl.float32)
        is_near = (block >= near) & (block < right)
        far = tl.where(block < near, left_far, right_far)
        scores = scores_of(
            products, columns[None, :], positions[:, None], start - first_position - BLOCK_M + 1, diagonals, scale,
            is_near, far, BIAS, CAUSAL, LEFT, RIGHT,
        )  # fmt: skip
        scores = hide(scores, inside, shown + columns, SHOWN, WHOLE_KEYS)
        highest = tl.maximum(top, tl.max(scores, 1))
        finite = highest
        if SHOWN or CAUSAL or not WHOLE_KEYS:
            finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            kept = is_kept(seed, plane, rows, first_k + offset, threshold, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p * keep_scale, 0.0)
        v_nd = load_rows(v + offset * v_stride, own, dims, v_stride, inside, d, WHOLE_KEYS, WHOLE_D)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v_nd.dtype).to(DOT), v_nd.to(DOT), acc, input_precision="ieee", out_dtype=tl.float32)
        top = highest
    return acc, top, total


@jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(
    q, k, v, diagonals, shown, q_offsets, k_offsets, out, lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    heads, queries, keys, blocks, d, scale, seed, threshold, keep_scale,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr, SHOWN: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [b, h, s, d] and lse float32 [b, h, s], log₂ of each query's sum, infinite where it sees nothing."""
    index = tl.program_id(0)
    if CAUSAL:  # the longest first
        index = tl.num_programs(0) - 1 - index
    block, head, _, batch, first_q, own_queries, first_k, own_keys = place_of(
        index, blocks, heads, queries, keys, q_offsets, k_offsets, DOCUMENTS
    )
    first = block * BLOCK_M
    if first < own_queries:
        lead = tl.zeros((), tl.int32)
        if DOCUMENTS and DROPOUT:
            lead = (first_k % 8).to(tl.int32)
        plane = batch * heads + head
        shown += batch * keys
        row = first_q + first
        q += batch * q_b + head * q_h + row * q_s
        k += batch * k_b + head * k_h + first_k * k_s
        v += batch * v_b + head * v_h + first_k * v_s
        out += batch * o_b + head * o_h + row * o_s
        diagonals += head * (LEFT + RIGHT + 1)
        own, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        there = first + own < own_queries
        start = first + own_keys - own_queries
        near, right, end = key_parts(start, own_keys, lead, BLOCK_M, BLOCK_N, LEFT, RIGHT, BIAS, CAUSAL)
        q_md = load_rows(q, own, dims, q_s, there, d, False, WHOLE_D).to(DOT)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        left_far, right_far = 0.0, 0.0
        if BIAS:
            left_far, right_far = tl.load(diagonals), tl.load(diagonals + LEFT + RIGHT)
        acc, top, total = _attend(
            acc, top, total, q_md, k, v, shown, diagonals, near, right, end, start, row + own, plane, first_k,
            own_keys, lead, d, k_s, v_s, scale, left_far, right_far, seed, threshold, keep_scale,
            BIAS, LEFT, RIGHT, CAUSAL, SHOWN, DROPOUT, WHOLE_KEYS, WHOLE_D, BLOCK_M, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        sees = total > 0
        acc = acc * tl.where(sees, 1.0 / tl.where(sees, total, 1.0), 0.0)[:, None]
        logs = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
        tl.store(lse + plane * queries + row + own, logs, mask=there)
        places = out + own[:, None] * o_s + dims[None, :]
        tl.store(places, acc.to(out.dtype.element_ty), mask=there[:, None] & (dims[None, :] < d))


@jit(do_not_specialize=["seed", "threshold", "queries", "keys"])
def attention_kept(
    kept, seed, threshold, queries, keys, row_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """kept uint8 [b · h, s, t]: what dropout keeps."""
    plane = tl.program_id(0).to(tl.int64) // row_blocks
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    found = is_kept(seed, plane, rows, first, threshold, BLOCK_M, BLOCK_N)
    places = kept + (plane * queries + rows)[:, None] * keys + columns[None, :]
    tl.store(places, found.to(tl.uint8), mask=(rows < queries)[:, None] & (columns < keys)[None, :])
