"""What the Triton kernels of attention with relative positions share: blocks of scores, of one sequence and head.

A program takes a block of one sequence: a row of the batch, or a document of a packed row, and one head. Positions
count from the sequence's beginning, and a query's is that of the key it stands at. Scores are in units of log 2.

The bias is one number a head and distance: `diagonals` [heads, LEFT + RIGHT + 1], distances from -LEFT to RIGHT and
constant beyond. So the blocks that a program goes over fall into three parts: all distances ≤ -LEFT (one number), near
ones (a look-up for each score), all distances ≥ RIGHT (one number). Only near blocks need the causal mask.

Dropout: probability (b, head, i, j) is kept if its 16 bits of Philox (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3") are at least `threshold`. One call gives eight: those of j // 8, so that blocks of a document begin
at a multiple of 8 of the packed row, `lead` columns before the document.
"""

from __future__ import annotations

import triton.language as tl

from shardtune_kernels._launch import jit

ROUNDS = tl.constexpr(7)
"""The fewest of Philox 4x32 that pass all tests of the paper."""
UNSPECIALIZED = ["seed", "threshold", "queries", "keys", "blocks"]


@jit
def is_kept(seed, plane, rows, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: of `rows`, and the columns from `first_column`, a multiple of 8; `plane`: b · h + head."""
    groups = (first_column // 8).to(tl.int32) + tl.arange(0, COLUMNS // 8)
    zeros = tl.zeros((ROWS, COLUMNS // 8), tl.int32)
    a, b, c, d = tl.philox(
        seed, zeros + groups[None, :], zeros + rows.to(tl.int32)[:, None], zeros + plane.to(tl.int32), zeros, ROUNDS
    )
    low = tl.join(tl.join(_low(a, threshold), _low(b, threshold)), tl.join(_low(c, threshold), _low(d, threshold)))
    high = tl.join(tl.join(_high(a, threshold), _high(b, threshold)), tl.join(_high(c, threshold), _high(d, threshold)))
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS)) != 0


@jit
def _low(word, threshold):
    return ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int8)


@jit
def _high(word, threshold):
    return ((word >> 16).to(tl.int32) >= threshold).to(tl.int8)


@jit
def place_of(index, blocks, heads, queries, keys, q_offsets, k_offsets, DOCUMENTS: tl.constexpr):
    """Of a program: block, head, sequence, row of the batch, first row and length of its queries and of its keys."""
    block = index % blocks
    head = index // blocks % heads
    sequence = index // blocks // heads
    batch = sequence.to(tl.int64)
    first_q = tl.zeros((), tl.int64)
    first_k = tl.zeros((), tl.int64)
    if DOCUMENTS:
        batch = tl.zeros((), tl.int64)
        first_q = tl.load(q_offsets + sequence).to(tl.int64)
        first_k = tl.load(k_offsets + sequence).to(tl.int64)
        queries = (tl.load(q_offsets + sequence + 1).to(tl.int64) - first_q).to(tl.int32)
        keys = (tl.load(k_offsets + sequence + 1).to(tl.int64) - first_k).to(tl.int32)
    return block, head, sequence, batch, first_q, queries, first_k, keys


@jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@jit
def key_parts(
    start, keys, lead, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Of queries at positions from `start`: the block of keys where the near ones begin, where they end, the end."""
    end = tl.cdiv(keys + lead, BLOCK_N)
    if CAUSAL:
        end = tl.minimum(end, tl.cdiv(tl.maximum(start + BLOCK_M + lead, 0), BLOCK_N))
    near = end
    right = end
    if BIAS or CAUSAL:
        near = tl.minimum(tl.maximum(start - LEFT + 1 + lead, 0) // BLOCK_N, end)
    if BIAS and not CAUSAL:
        right = clamp(tl.cdiv(tl.maximum(start + BLOCK_M - 1 + RIGHT + lead, 0), BLOCK_N), near, end)
    return near, right, end


@jit
def scores_of(
    products, columns, positions, lowest, diagonals, scale, is_near, far, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """scale · products + bias, -inf where the causal mask hides; columns and positions spread over the block.

    `lowest`: the least of the distances. Those of a block are few: they are loaded once and looked up from there.
    """
    scores = products * scale
    if BIAS or CAUSAL:
        if is_near:
            distances = columns - positions
            if BIAS:
                M: tl.constexpr = products.shape[0]
                N: tl.constexpr = products.shape[1]
                window = lowest + tl.arange(0, 2 * (M if M > N else N))
                window = tl.load(diagonals + (clamp(window, -LEFT, RIGHT) + LEFT))
                picked = tl.gather(window, tl.reshape(distances - lowest, (M * N,)), 0)
                scores += tl.reshape(picked, (M, N))
            if CAUSAL:
                scores = tl.where(distances <= 0, scores, float("-inf"))
        else:
            scores += far
    return scores


@jit
def load_rows(base, rows, dims, stride, inside, d, WHOLE_ROWS: tl.constexpr, WHOLE_D: tl.constexpr):
    """[rows, d] from `base`, 0 outside."""
    places = base + rows[:, None] * stride + dims[None, :]
    if WHOLE_ROWS and WHOLE_D:
        return tl.load(places)
    elif WHOLE_ROWS:
        return tl.load(places, mask=dims[None, :] < d, other=0.0)
    elif WHOLE_D:
        return tl.load(places, mask=inside[:, None], other=0.0)
    else:
        return tl.load(places, mask=inside[:, None] & (dims[None, :] < d), other=0.0)


@jit
def hide(scores, inside, shown, SHOWN: tl.constexpr, WHOLE_KEYS: tl.constexpr):
    """-inf for the keys (columns) that are not there or not shown."""
    if SHOWN:
        seen = tl.load(shown, mask=inside, other=0) != 0
        scores = tl.where(seen[None, :], scores, float("-inf"))
    elif not WHOLE_KEYS:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    return scores
