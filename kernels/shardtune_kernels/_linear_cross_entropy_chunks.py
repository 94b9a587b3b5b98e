"""What linear_cross_entropy does with a chunk of rows: logits, their gradient, and the sum of the weight's gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardtune_kernels._linear_cross_entropy_kernels import start_loss, start_rescale

PITCH = 64
"""Rows of logits begin at multiples of so many numbers: loads of 16 bytes for any number of classes."""
SLICE_BYTES = 64_000_000
"""Of a float32 product that is added to a float32 sum."""


def rows_of_a_chunk(rows: int, weight: Tensor, dtype: torch.dtype, chunk_bytes: int, fused: bool) -> int:
    """So many that temporaries stay within `chunk_bytes`, and chunks are about as long as each other."""
    classes, width = weight.shape
    # A row of logits, and of hidden states gathered, scaled and differentiated; beside it softmax in plain torch.
    a_row = dtype.itemsize * (classes + 3 * width) + (0 if fused else 4 * classes)
    most = max(chunk_bytes // a_row, 1)
    step = 128 if most >= 128 else 1
    most = most // step * step
    even = math.ceil(rows / max(math.ceil(rows / most), 1))
    return max(math.ceil(even / step) * step, 1)


class Loss:
    """Losses of a chunk's rows and, if `gradient`, the gradient by scale · hidden Wᵀ + bias, in memory that all chunks
    share."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, soft_cap: float | None, smoothing: float, scale: float,
        gradient: bool,
    ) -> None:  # fmt: skip
        self._weight, self._bias, self._soft_cap = weight, bias, soft_cap
        self._smoothing, self._scale, self._gradient = smoothing, scale, gradient
        self._logits = self._memory(rows, weight.dtype)

    def _memory(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, len(self._weight), dtype=dtype, device=self._weight.device)

    def of(self, hidden: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        """Fills `losses`; the gradient [m, v], until the next chunk."""
        raise NotImplementedError


class FusedLoss(Loss):
    """One kernel between the products."""

    def _memory(self, rows: int, dtype: torch.dtype) -> Tensor:
        classes = len(self._weight)
        pitch = math.ceil(classes / PITCH) * PITCH
        memory = torch.empty(rows, pitch, dtype=dtype, device=self._weight.device)
        memory[:, classes:].zero_()  # the kernels work on it, too
        return memory

    def of(self, hidden: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        logits = self._logits[: len(hidden), : len(self._weight)]
        torch.mm(hidden, self._weight.T, out=logits)
        start_loss(logits, targets, self._bias, losses, self._soft_cap, self._smoothing, self._scale, self._gradient)
        return logits


class PlainLoss(Loss):
    """In torch, in float32 at least."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, soft_cap: float | None, smoothing: float, scale: float,
        gradient: bool,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias, rows, soft_cap, smoothing, scale, gradient)
        self._wide = torch.promote_types(weight.dtype, torch.float32)
        self._likely = self._memory(rows, self._wide)

    def of(self, hidden: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
        logits = torch.mm(hidden, self._weight.T, out=self._logits[: len(hidden)]).to(self._wide)
        if self._scale != 1.0:
            logits *= self._scale
        if self._bias is not None:
            logits += self._bias
        if self._soft_cap is not None:
            logits = logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        likely = torch.log_softmax(logits, 1, out=self._likely[: len(hidden)])
        places = targets.unsqueeze(1)
        losses.copy_(likely.gather(1, places).squeeze(1)).neg_()
        if self._smoothing:
            losses.mul_(1 - self._smoothing).sub_(likely.mean(1), alpha=self._smoothing)
        if not self._gradient:
            return likely
        gradient = likely.exp_()
        if self._smoothing:
            gradient -= self._smoothing / len(self._weight)
        gradient.scatter_add_(1, places, gradient.new_full((), self._smoothing - 1).expand_as(places))
        if self._soft_cap is not None:
            gradient *= logits.div_(self._soft_cap).square_().neg_().add_(1)
        return gradient


class WeightGradient:
    """The sum over chunks of d_logitsᵀ hidden.

    Rounding each partial sum to 16 bits would add up to more than rounding once: the sum of several chunks is float32,
    `out` itself where it is that. Where `out` is bfloat16, its own memory holds the sum as float16, with 3 digits more
    for the same bytes: `hold_in_half` chooses powers of two so that no sum can exceed float16's range, and the
    numbers that count stay far above its smallest.
    """

    def __init__(self, out: Tensor, dtype: torch.dtype, only_one: bool) -> None:
        """`dtype`: of the hidden states; `only_one`: chunk, so nothing is summed."""
        self._out = out
        alone = out.dtype == dtype and (only_one or dtype.itemsize > 2)
        wide = torch.promote_types(dtype, torch.float32)
        self._total = out if alone or out.dtype == wide else torch.empty_like(out, dtype=wide)
        self._first, self._half = True, False

    def hold_in_half(self, unit: Tensor, largest: Tensor, rows: int) -> None:
        """`largest`: of the hidden states' absolute values; `unit` becomes what one of the sum stands for.

        With |d_logits| ≤ 2^a and |hidden| < 2^b a sum over `rows` ≤ 2^c stays below 2^(a + b + c) = 2^15.
        """
        spare = 15 - math.ceil(math.log2(rows))
        b = spare // 2 - 7
        self._half, self._total = True, self._out.view(torch.float16)
        self._by_logits = torch.full_like(unit, 2.0 ** (spare - b))
        self._by_hidden = torch.exp2(b - 1 - torch.log2(largest.float().clamp(min=1e-30)).floor())
        unit.copy_(1 / (self._by_logits * self._by_hidden))

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Another chunk; may overwrite d_logits."""
        if self._half:
            d_logits, hidden = self._in_half(d_logits, hidden)
        beta, self._first = 0 if self._first else 1, False
        if self._total.dtype == d_logits.dtype == hidden.dtype:
            self._total.addmm_(d_logits.T, hidden, beta=beta)
        elif not hidden.is_cuda:
            self._total.addmm_(d_logits.T.to(self._total.dtype), hidden.to(self._total.dtype), beta=beta)
        else:
            self._add_in_slices(d_logits, hidden, beta)

    def _add_in_slices(self, d_logits: Tensor, hidden: Tensor, beta: int) -> None:
        step = max(SLICE_BYTES // (4 * hidden.shape[1]), 1)
        for begin in range(0, len(self._total), step):
            part = self._total[begin : begin + step]
            product = torch.mm(d_logits[:, begin : begin + step].T, hidden, out_dtype=torch.float32)
            part.copy_(product) if beta == 0 else part.add_(product)

    def _in_half(self, d_logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        whole = d_logits.as_strided((len(d_logits), d_logits.stride(0)), d_logits.stride())
        as_half = whole.view(torch.float16)
        start_rescale(whole, as_half, self._by_logits)
        half_hidden = torch.empty(hidden.shape, dtype=torch.float16, device=hidden.device)
        start_rescale(hidden.contiguous(), half_hidden, self._by_hidden)
        return as_half[:, : d_logits.shape[1]], half_hidden

    def finish(self) -> None:
        """`out` holds the sum: zeros if there was no chunk."""
        if self._first:
            self._out.zero_()
        elif self._total is not self._out and not self._half:
            self._out.copy_(self._total)


def largest_of(hidden: Tensor, picked: Tensor | None, rows: int) -> Tensor:
    """Of the absolute values in the picked rows, looked at in chunks of `rows`."""
    parts = hidden.split(rows) if picked is None else (hidden.index_select(0, some) for some in picked.split(rows))
    return torch.stack([torch.linalg.vector_norm(part, math.inf) for part in parts]).amax()


def picked_rows(targets: Tensor, ignore_index: int, classes: int) -> Tensor | None:
    """Indexes of the rows whose target is not ignored; None if these are all. Looks at the targets' values: on a GPU
    the CPU waits here."""
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= classes))
    count, bad = torch.stack((kept.sum(), wrong.sum())).tolist()
    if bad:
        raise ValueError(f"targets must lie between 0 and {classes - 1}, or be {ignore_index}: {bad} do not")
    return None if count == len(targets) else kept.nonzero_static(size=count).squeeze(1)
