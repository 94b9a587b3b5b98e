"""Triton kernels of attention with relative positions: gradients of q and of the bias, and of k and v."""

# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# tl.constexpr annotates what is a number to Python; and what one constant's branch sets, another branch of it reads.

from __future__ import annotations

import triton.language as tl

from shardtune_kernels._biased_attention_tiles import (
    UNSPECIALIZED,
    clamp,
    hide,
    is_kept,
    key_parts,
    load_rows,
    place_of,
    scores_of,
)
from shardtune_kernels._launch import jit


@jit
def _add_up_diagonals(ds, own_m, N: tl.constexpr, TURN: tl.constexpr):
    """Of a block: for x < N the sum over its entries with column - row = x - TURN · N."""
    turned = tl.arange(0, N)[None, :] + own_m[:, None]
    picked = tl.gather(ds, turned % N, 1)
    return tl.sum(tl.where(turned // N == TURN, picked, 0.0), 0)


@jit
def _store_diagonals(partial, sums, distances, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Stores the sums of near distances; those of distant ones are added to the tails (left, right)."""
    tl.store(partial + distances + LEFT, sums, mask=(distances > -LEFT) & (distances < RIGHT))
    left += tl.sum(tl.where(distances <= -LEFT, sums, 0.0), 0)
    right += tl.sum(tl.where(distances >= RIGHT, sums, 0.0), 0)
    return left, right


@jit
def _q_part(
    dq, q_md, do_md, k, v, shown, diagonals, partial, logs, delta, near, right, end, first_position, rows, plane,
    first_k, keys, lead, d, k_stride, v_stride, scale, left_far, right_far, seed, threshold, keep_scale,
    NEEDS_Q: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    SHOWN: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Goes over the blocks of keys: dq += dS k; and the sums of dS over each diagonal go to `partial`, those of the
    distances that have one number together."""
    own_m, own, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    positions = first_position + own_m
    TURNS: tl.constexpr = 2 if BLOCK_M > BLOCK_N else 1
    waiting = tl.zeros((BLOCK_N,), tl.float32)
    later = tl.zeros((BLOCK_N,), tl.float32)
    left_rows, right_rows = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    left_sum, right_sum = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for block in range(end):
        place = block * BLOCK_N - lead
        columns = place + own
        inside = (columns >= 0) & (columns < keys)
        offset = place.to(tl.int64)
        k_nd = load_rows(k + offset * k_stride, own, dims, k_stride, inside, d, WHOLE_KEYS, WHOLE_D)
        v_nd = load_rows(v + offset * v_stride, own, dims, v_stride, inside, d, WHOLE_KEYS, WHOLE_D)
        products = tl.dot(q_md, tl.trans(k_nd.to(DOT)), input_precision="ieee", out_dtype=tl.float32)
        is_near = (block >= near) & (block < right)
        far = tl.where(block < near, left_far, right_far)
        scores = scores_of(
            products, columns[None, :], positions[:, None], place - first_position - BLOCK_M + 1, diagonals, scale,
            is_near, far, BIAS, CAUSAL, LEFT, RIGHT,
        )  # fmt: skip
        scores = hide(scores, inside, shown + columns, SHOWN, WHOLE_KEYS)
        p = tl.exp2(scores - logs[:, None])
        dp = tl.dot(do_md, tl.trans(v_nd.to(DOT)), input_precision="ieee", out_dtype=tl.float32)
        if DROPOUT:
            kept = is_kept(seed, plane, rows, first_k + offset, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if NEEDS_Q:
            dq = tl.dot(ds.to(k_nd.dtype).to(DOT), k_nd.to(DOT), dq, input_precision="ieee", out_dtype=tl.float32)
        if NEEDS_BIAS:
            if is_near:
                # a diagonal crosses up to TURNS + 1 blocks of keys: its sum is whole with the last one
                sums = _add_up_diagonals(ds, own_m, BLOCK_N, 0)
                whole = later + _add_up_diagonals(ds, own_m, BLOCK_N, TURNS)
                if TURNS == 2:
                    later = waiting + _add_up_diagonals(ds, own_m, BLOCK_N, 1)
                    waiting = sums
                else:
                    later = sums
                distances = place - first_position - TURNS * BLOCK_N + own
                left_sum, right_sum = _store_diagonals(partial, whole, distances, left_sum, right_sum, LEFT, RIGHT)
            else:
                added = tl.sum(ds, 1)
                left_rows += tl.where(block < near, added, 0.0)
                right_rows += tl.where(block < near, 0.0, added)
    if NEEDS_BIAS:
        distances = right * BLOCK_N - lead - first_position - TURNS * BLOCK_N + own
        left_sum, right_sum = _store_diagonals(partial, later, distances, left_sum, right_sum, LEFT, RIGHT)
        if TURNS == 2:
            distances += BLOCK_N
            left_sum, right_sum = _store_diagonals(partial, waiting, distances, left_sum, right_sum, LEFT, RIGHT)
        tl.store(partial, left_sum + tl.sum(left_rows, 0))
        tl.store(partial + LEFT + RIGHT, right_sum + tl.sum(right_rows, 0))
    return dq


@jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_q(
    q, k, v, diagonals, shown, q_offsets, k_offsets, out, grad, lse, deltas, dq, partials,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s, dq_b, dq_h, dq_s,
    heads, queries, keys, blocks, d, scale, q_scale, seed, threshold, keep_scale,
    NEEDS_Q: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr, SHOWN: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """deltas float32 [b, h, s], row sums of grad · out; dq; and `partials` float32 [slots, h, LEFT + RIGHT + 1], one
    slot a block of queries, zero before: the sums of dS over each distance.

    The bias costs no product: of near blocks, of which there are about (LEFT + RIGHT + BLOCK_M + BLOCK_N) / BLOCK_N, a
    turn through shared memory (4 bytes a score, there and back, for each of up to three sums), of distant ones an
    addition a score. `partials` are written and read once: 4 (LEFT + RIGHT + 1) / BLOCK_M bytes a query and head, about
    6 of the default, where dq in 16 bits has 128.
    """
    index = tl.program_id(0)
    if CAUSAL:
        index = tl.num_programs(0) - 1 - index
    block, head, sequence, batch, first_q, own_queries, first_k, own_keys = place_of(
        index, blocks, heads, queries, keys, q_offsets, k_offsets, DOCUMENTS
    )
    first = block * BLOCK_M
    if first < own_queries:
        lead = tl.zeros((), tl.int32)
        if DOCUMENTS and DROPOUT:
            lead = (first_k % 8).to(tl.int32)
        plane = batch * heads + head
        row = first_q + first
        own, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        there = first + own < own_queries
        out += batch * o_b + head * o_h + row * o_s
        grad += batch * g_b + head * g_h + row * g_s
        do_md = load_rows(grad, own, dims, g_s, there, d, False, WHOLE_D)
        o_md = load_rows(out, own, dims, o_s, there, d, False, WHOLE_D)
        delta = tl.sum(do_md.to(tl.float32) * o_md.to(tl.float32), 1)
        places = plane * queries + row + own
        tl.store(deltas + places, delta, mask=there)
        if NEEDS_Q or NEEDS_BIAS:
            logs = tl.load(lse + places, mask=there, other=float("inf"))
            shown += batch * keys
            q += batch * q_b + head * q_h + row * q_s
            k += batch * k_b + head * k_h + first_k * k_s
            v += batch * v_b + head * v_h + first_k * v_s
            dq += batch * dq_b + head * dq_h + row * dq_s
            diagonals += head * (LEFT + RIGHT + 1)
            slot = sequence.to(tl.int64) * blocks + block
            if DOCUMENTS:  # blocks of a document: at most those that begin in its rows, and one
                slot = first_q // BLOCK_M + sequence + block
            partials += (slot * heads + head) * (LEFT + RIGHT + 1)
            start = first + own_keys - own_queries
            near, right, end = key_parts(start, own_keys, lead, BLOCK_M, BLOCK_N, LEFT, RIGHT, BIAS, CAUSAL)
            q_md = load_rows(q, own, dims, q_s, there, d, False, WHOLE_D).to(DOT)
            do_md = do_md.to(DOT)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            left_far, right_far = 0.0, 0.0
            if BIAS:
                left_far, right_far = tl.load(diagonals), tl.load(diagonals + LEFT + RIGHT)
            acc = _q_part(
                acc, q_md, do_md, k, v, shown, diagonals, partials, logs, delta, near, right, end, start, row + own,
                plane, first_k, own_keys, lead, d, k_s, v_s, scale, left_far, right_far, seed, threshold, keep_scale,
                NEEDS_Q, NEEDS_BIAS, BIAS, LEFT, RIGHT, CAUSAL, SHOWN, DROPOUT, WHOLE_KEYS, WHOLE_D, BLOCK_M, BLOCK_N,
                BLOCK_D, DOT,
            )  # fmt: skip
            if NEEDS_Q:
                places = dq + own[:, None] * dq_s + dims[None, :]
                acc = (acc * q_scale).to(dq.dtype.element_ty)
                tl.store(places, acc, mask=there[:, None] & (dims[None, :] < d))


@jit
def _key_part(
    dk, dv, k_nd, v_nd, q, grad, lse, deltas, diagonals, begin, near, left, end, first, shift, first_q, first_column,
    plane, queries, d, q_stride, g_stride, scale, left_far, right_far, seed, threshold, keep_scale,
    NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_QUERIES: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Goes over blocks of queries: dv += pᵀ grad, dk += dSᵀ q. Blocks of scores are [keys, queries] here."""
    own, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    columns = first + tl.arange(0, BLOCK_N)
    for block in range(begin, end):
        start = block * BLOCK_M
        rows = start + own
        there = rows < queries
        offset = start.to(tl.int64)
        q_md = load_rows(q + offset * q_stride, own, dims, q_stride, there, d, WHOLE_QUERIES, WHOLE_D)
        do_md = load_rows(grad + offset * g_stride, own, dims, g_stride, there, d, WHOLE_QUERIES, WHOLE_D)
        logs = tl.load(lse + rows, mask=there, other=float("inf"))
        products = tl.dot(k_nd, tl.trans(q_md.to(DOT)), input_precision="ieee", out_dtype=tl.float32)
        positions = rows + shift
        is_near = (block >= near) & (block < left)
        far = tl.where(block < near, right_far, left_far)
        scores = scores_of(
            products, columns[:, None], positions[None, :], first - shift - start - BLOCK_M + 1, diagonals, scale,
            is_near, far, BIAS, CAUSAL, LEFT, RIGHT,
        )  # fmt: skip
        p = tl.exp2(scores - logs[None, :])
        weights = p
        if DROPOUT:
            kept = is_kept(seed, plane, first_q + rows, first_column, threshold, BLOCK_M, BLOCK_N)
            kept = tl.trans(kept.to(tl.int8)) != 0
            weights = tl.where(kept, p * keep_scale, 0.0)
        if NEEDS_V:
            weights = weights.to(do_md.dtype).to(DOT)
            dv = tl.dot(weights, do_md.to(DOT), dv, input_precision="ieee", out_dtype=tl.float32)
        if NEEDS_K:
            delta = tl.load(deltas + rows, mask=there, other=0.0)
            dp = tl.dot(v_nd, tl.trans(do_md.to(DOT)), input_precision="ieee", out_dtype=tl.float32)
            if DROPOUT:
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q_md.dtype).to(DOT), q_md.to(DOT), dk, input_precision="ieee", out_dtype=tl.float32)
    return dk, dv


@jit(do_not_specialize=UNSPECIALIZED)
def attention_backward_kv(
    q, k, v, diagonals, shown, q_offsets, k_offsets, grad, lse, deltas, dk, dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads, queries, keys, blocks, d, scale, k_scale, seed, threshold, keep_scale,
    NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    BIAS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAUSAL: tl.constexpr, SHOWN: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, WHOLE_QUERIES: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv. A key that is not shown is hidden when its rows are stored, for rows of keys never mix."""
    block, head, _, batch, first_q, own_queries, first_k, own_keys = place_of(
        tl.program_id(0), blocks, heads, queries, keys, q_offsets, k_offsets, DOCUMENTS
    )
    lead = tl.zeros((), tl.int32)
    if DOCUMENTS and DROPOUT:
        lead = (first_k % 8).to(tl.int32)
    first = block * BLOCK_N - lead
    if first < own_keys:
        plane = batch * heads + head
        own, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        columns = first + own
        inside = (columns >= 0) & (columns < own_keys)
        row = first_k + first
        q += batch * q_b + head * q_h + first_q * q_s
        grad += batch * g_b + head * g_h + first_q * g_s
        k += batch * k_b + head * k_h + row * k_s
        v += batch * v_b + head * v_h + row * v_s
        dk += batch * dk_b + head * dk_h + row * dk_s
        dv += batch * dv_b + head * dv_h + row * dv_s
        lse += plane * queries + first_q
        deltas += plane * queries + first_q
        diagonals += head * (LEFT + RIGHT + 1)
        shift = own_keys - own_queries
        # blocks of queries: from `begin` the keys are far right of them, from `near` near, from `left` far left
        end = tl.cdiv(own_queries, BLOCK_M)
        begin = end * 0
        near = end
        left = end
        if CAUSAL:
            begin = tl.minimum(tl.maximum(first - shift, 0) // BLOCK_M, end)
            near = begin
        elif BIAS:
            near = tl.minimum(tl.maximum(first - RIGHT - shift + 1, 0) // BLOCK_M, end)
        if BIAS or CAUSAL:
            left = clamp(tl.cdiv(tl.maximum(first + BLOCK_N - 1 + LEFT - shift, 0), BLOCK_M), near, end)
        k_nd = load_rows(k, own, dims, k_s, inside, d, False, WHOLE_D).to(DOT)
        v_nd = load_rows(v, own, dims, v_s, inside, d, False, WHOLE_D).to(DOT)
        k_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        v_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        left_far, right_far = 0.0, 0.0
        if BIAS:
            left_far, right_far = tl.load(diagonals), tl.load(diagonals + LEFT + RIGHT)
        k_acc, v_acc = _key_part(
            k_acc, v_acc, k_nd, v_nd, q, grad, lse, deltas, diagonals, begin, near, left, end, first, shift, first_q,
            row, plane, own_queries, d, q_s, g_s, scale, left_far, right_far, seed, threshold, keep_scale, NEEDS_K,
            NEEDS_V, BIAS, LEFT, RIGHT, CAUSAL, DROPOUT, WHOLE_QUERIES, WHOLE_D, BLOCK_M, BLOCK_N, BLOCK_D, DOT,
        )  # fmt: skip
        if SHOWN:
            seen = tl.load(shown + batch * keys + columns, mask=inside, other=0) != 0
            k_acc = tl.where(seen[:, None], k_acc, 0.0)
            v_acc = tl.where(seen[:, None], v_acc, 0.0)
        stored = inside[:, None] & (dims[None, :] < d)
        if NEEDS_K:
            k_acc = (k_acc * k_scale).to(dk.dtype.element_ty)
            tl.store(dk + own[:, None] * dk_s + dims[None, :], k_acc, mask=stored)
        if NEEDS_V:
            tl.store(dv + own[:, None] * dv_s + dims[None, :], v_acc.to(dv.dtype.element_ty), mask=stored)
