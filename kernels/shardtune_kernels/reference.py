"""What each op computes, in plain torch and in the dtype of its inputs: given float64, this is the truth.

Tests and benchmarks compare with these; dropout is given as a mask of what is kept, so that it can be the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shardtune_kernels.weights import FourBitWeight, LoraWeights

# NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E) and the 4-bit floats of bitsandbytes.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip


def nested_code() -> Tensor:
    """float32 [256]: what a byte of a nested scale stands for, bitsandbytes' dynamic map (Dettmers et al. 2022,
    arXiv:2110.02861, section 2.1): of a sign, an exponent in base 10 as leading zeros, and a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def dequantized(weight: FourBitWeight) -> Tensor:
    """W [n, k] in `weight.dtype`; each product is rounded to float32 once, and once more to the dtype."""
    bytes_ = weight.bytes.long()
    nibbles = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).flatten()[: math.prod(weight.shape)]
    scales = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.offset is not None
        outer = weight.nested_absmax.repeat_interleave(weight.nested_block)[: len(scales)]
        scales = nested_code().to(scales.device)[scales.long()] * outer + weight.offset
    code = torch.tensor(CODES[weight.kind], device=nibbles.device)
    values = code[nibbles] * scales.repeat_interleave(weight.block)[: len(nibbles)]
    return values.to(weight.dtype).view(weight.shape)


def dropped(x: Tensor, kept: Tensor | None, rate: float) -> Tensor:
    """x where `kept`, scaled so that the mean stays, else 0."""
    return x if kept is None else torch.where(kept, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))


def lora_linear(x: Tensor, w: LoraWeights, kept: Tensor | None = None, rate: float = 0.0) -> Tensor:
    """x [..., k] -> [..., n]: x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ, all in the dtype of x."""
    weight = dequantized(w.weight) if isinstance(w.weight, FourBitWeight) else w.weight
    y = functional.linear(x, weight.to(x.dtype), None if w.bias is None else w.bias.to(x.dtype))
    if w.a is None or w.b is None:
        return y
    return y + w.scale * (dropped(x, kept, rate) @ w.a.to(x.dtype).T @ w.b.to(x.dtype).T)


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""SwiGLU is silu, GEGLU a gelu (Shazeer 2020, arXiv:2002.05202); ReGLU relu."""


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up, all of one shape."""
    return ACTIVATIONS[activation](gate) * up


def lora_gated_mlp(
    x: Tensor,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    activation: str = "silu",
    kept: Sequence[Tensor | None] = (None, None, None),
    rate: float = 0.0,
) -> Tensor:
    """x [..., d] -> [..., d]: down(act(gate(x)) · up(x)); `kept`: of the inputs of gate, up and down's adapters."""
    inner = gated_activation(lora_linear(x, gate, kept[0], rate), lora_linear(x, up, kept[1], rate), activation)
    return lora_linear(inner, down, kept[2], rate)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Σ over targets that are not ignored of -log softmax(z)[target]: hidden [..., d], weight [v, d], targets [...].

    z = cap · tanh(z₀ / cap) with z₀ = scale · hidden Wᵀ + bias; smoothing ε mixes in the mean over all classes:
    (1 - ε) · loss + ε · mean of -log softmax(z) (Szegedy et al. 2016, arXiv:1512.00567, section 7). Of float32 at
    least, as the logits are cast to it.
    """
    logits = functional.linear(hidden, weight.to(hidden.dtype), None) * scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum",
        label_smoothing=label_smoothing,
    )  # fmt: skip


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kind: str = "llama", residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    In float32 at least. llama: rounded to the dtype of x before the weight is multiplied; t5: rounded to the weight's,
    if that has 16 bits, and not otherwise. The result has the dtype torch promotes to. gemma: multiplied by 1 + weight
    in float32, then rounded to the dtype of x. With `residual`: of x + residual, which is returned, too.
    """
    if residual is not None:
        x = x + residual
    wide = x.float() if x.dtype.itemsize < 4 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind == "gemma":
        y = (normed * (1.0 + weight.to(normed.dtype))).to(x.dtype)
    elif kind == "t5":
        y = weight * (normed.to(weight.dtype) if weight.dtype.itemsize < 4 else normed)
    else:
        y = weight * normed.to(x.dtype)
    return y if residual is None else (y, x)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / √(variance + eps) · weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    In float32 at least; the result has the dtype of x. With `residual`: of x + residual, which is returned, too.
    """
    if residual is not None:
        x = x + residual
    wide = x.float() if x.dtype.itemsize < 4 else x
    shape = (x.shape[-1],)
    own = [None if p is None else p.to(wide.dtype) for p in (weight, bias)]
    y = functional.layer_norm(wide, shape, own[0], own[1], eps).to(x.dtype)
    return y if residual is None else (y, x)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [b, h, s, d] and k [b, g, s, d], rotated by position (Su et al. 2021, arXiv:2104.09864), halves paired:
    x · cos + rotate(x) · sin with rotate([x₁, x₂]) = [-x₂, x₁]; cos, sin [b or 1, s, d' ≤ d]; beyond d' x stays."""

    def rotated(x: Tensor) -> Tensor:
        width = cos.shape[-1]
        turned, stays = x[..., :width], x[..., width:]
        first, second = turned[..., : width // 2], turned[..., width // 2 :]
        own = turned * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
        return torch.cat((own, stays), dim=-1) if stays.shape[-1] else own

    return rotated(q), rotated(k)


def relative_buckets(queries: int, keys: int, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """int64 [queries, keys]: which bucket the distance of a key from a query is in (Raffel et al. 2019,
    arXiv:1910.10683, section 2.1); the last query stands at the last key."""
    distance = torch.arange(keys)[None, :] - torch.arange(keys - queries, keys)[:, None]
    return buckets_of(distance, buckets, max_distance, bidirectional)


def buckets_of(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """int64, of the shape of `distance`, key minus query: half of the buckets (of one direction) are for one distance
    each, the others grow logarithmically up to `max_distance`, beyond which all is one."""
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    larger = (exact + growth.long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, larger)


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
    kept: Tensor | None = None,
    rate: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v: q [b, h, s, d], k and v [b, h, t, d] -> [b, h, s, d].

    bias[h, i, j] = table[bucket(j - i), h], table [buckets, h]. `causal`: a query sees keys up to its own position,
    where the last query stands at the last key. `shown`: bool [b, t], the keys that are tokens. `offsets`: int [n + 1]
    each, where documents begin and end in the rows of q and of k, which are then one (b = 1): a query sees the keys of
    its own document, and positions count from its beginning. `kept` [b, h, s, t]: of the probabilities, dropout `rate`.
    A query that sees nothing gives 0.
    """
    if offsets is not None:
        pieces = []
        for (i, j), (low, high) in zip(_pairs(offsets[0]), _pairs(offsets[1]), strict=True):
            own = None if kept is None else kept[:, :, i:j, low:high]
            pieces.append(biased_attention(
                q[:, :, i:j], k[:, :, low:high], v[:, :, low:high], table, bidirectional=bidirectional,
                max_distance=max_distance, causal=causal, scale=scale, kept=own, rate=rate,
            ))  # fmt: skip
        return torch.cat(pieces, dim=2)
    queries, keys = q.shape[2], k.shape[2]
    scores = scale * (q @ k.transpose(2, 3))
    if table is not None:
        buckets = relative_buckets(queries, keys, len(table), max_distance, bidirectional).to(q.device)
        scores = scores + table[buckets].permute(2, 0, 1).to(scores.dtype)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(keys - queries)
    seen = seen[None, None] if shown is None else seen[None, None] & shown[:, None, None, :]
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1).masked_fill(~seen, 0.0)
    return dropped(weights, kept, rate) @ v


def _pairs(offsets: Tensor) -> list[tuple[int, int]]:
    found = offsets.tolist()
    return list(itertools.pairwise(found))


def pad(
    tokens: Tensor,
    offsets: Tensor,
    width: int,
    fill: int = 0,
    learned_from: Tensor | None = None,
    start: int | None = None,
    left: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row i is tokens[offsets[i] : offsets[i + 1]], at most `width` of them, then `fill` (or, `left`, before): ids,
    labels, mask, positions and documents, int64 [b, width], as in `padding.Rows`.

    A token below 0 is read as ~token and never learned. Labels are shifted: at column j stands the next token. With
    `start` the ids are shifted instead, as a decoder beside an encoder reads them: `start`, then all tokens but the
    last, and at column j the label is token j. `learned_from` [b]: of each row, the first token that is learned.
    """
    shape = len(offsets) - 1, width
    ids, mask = tokens.new_full(shape, fill).long(), tokens.new_zeros(shape).long()
    labels, positions = torch.full_like(ids, ignore_index), torch.zeros_like(ids)
    documents = torch.full_like(ids, -1)
    for row, (low, high) in enumerate(_pairs(offsets)):
        given = tokens[low:high].long()
        read, learns = torch.where(given < 0, ~given, given), given >= 0
        if learned_from is not None:
            learns = learns & (torch.arange(len(given), device=given.device) >= learned_from[row])
        targets = torch.where(learns, read, ignore_index)
        if start is None:
            targets = torch.cat((targets[1:], targets.new_full((1,), ignore_index)))[: len(given)]
        else:
            read = torch.cat((read.new_full((1,), start), read[:-1]))[: len(given)]
        count = min(len(given), width)
        columns = slice(width - count, width) if left else slice(0, count)
        ids[row, columns], labels[row, columns] = read[:count], targets[:count]
        mask[row, columns], documents[row, columns] = 1, row
        positions[row, columns] = torch.arange(count, device=ids.device)
    return ids, labels, mask, positions, documents


def pack(
    tokens: Tensor,
    offsets: Tensor,
    learned_from: Tensor | None = None,
    start: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `pad`, but all rows one after the other in one: int64 [1, n]."""
    width = max((high - low for low, high in _pairs(offsets)), default=0)
    padded = pad(tokens, offsets, width, 0, learned_from, start, False, ignore_index)
    kept = padded[2].bool()
    return tuple(part[kept].unsqueeze(0) for part in padded)  # pyright: ignore[reportReturnType]


def unpad(rows: Tensor, offsets: Tensor, left: bool = False) -> Tensor:
    """rows [b, width, ...] to [n, ...]: of row i its offsets[i + 1] - offsets[i] first (or, `left`, last) entries. Of a
    row longer than `width` what is not there is 0: those beyond `width` or, `left`, those before the first."""
    width = rows.shape[1]
    parts = [rows.flatten(0, 1)[:0]]
    for row, (low, high) in zip(rows, _pairs(offsets), strict=True):
        count = min(high - low, width)
        absent = row.new_zeros((high - low - count, *row.shape[1:]))
        parts += (absent, row[width - count :]) if left else (row[:count], absent)
    return torch.cat(parts)
