"""From hidden states and the output layer to the summed loss, without the logits.

Rows are taken in chunks: the logits of a chunk are overwritten by their gradient, which is multiplied into the
gradients of what was given before the next chunk comes. So the gradients are made in the forward pass, and the
backward pass only scales them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardtune_kernels import _linear_cross_entropy_chunks as chunks
from shardtune_kernels import _linear_cross_entropy_kernels as kernels
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._launch import on_triton, writes

BUILDS = kernels.BUILDS
GPU_BYTES = 290_000_000
"""Of temporaries: 1024 rows of 128,256 classes and width 4096 in 16 bits, with their hidden states and gradients."""
CPU_BYTES = 128_000_000
"""On a CPU, where the logits of a chunk stand beside their softmax."""
HALF_ROWS = 1 << 16
"""Up to so many rows a sum in float16 has digits to spare (`WeightGradient`)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    *,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Σ over targets that are not ignored of -log softmax(z)[target], where z = scale · hidden Wᵀ + bias.

    hidden [..., d], weight [v, d], bias [v], targets [...] of integers, to a scalar of float32 (float64 if hidden is).
    soft_cap: z becomes cap · tanh(z / cap) (Gemma 2, arXiv:2408.00118). label_smoothing ε: (1 - ε) · loss + ε · the
    mean over all classes of -log softmax(z) (Szegedy et al. 2016, arXiv:1512.00567, section 7). The softmax of a row
    is summed online (Milakov & Gimelshein 2018, arXiv:1805.02867).

    Products are computed in the dtype of hidden, whatever autocast says; weight is cast to it as a whole if it has
    another one. The gradients have the dtypes of what they belong to, and only those that are needed are made: in
    this forward pass. The backward pass scales them in place, so it can run once, and needs no `weight`.

    The logits never exist at once: rows go in chunks whose temporaries stay below `chunk_bytes` (0.29 GB on a GPU).
    Beside them stands a float32 sum of the weight's gradient where that gradient's own memory cannot hold the sum: a
    trained weight in float16, in 16 bits other than those of hidden, or, in plain torch, in any 16 bits. Rows with
    ignored targets cost nothing. Where all are ignored, the loss is 0 and the gradients are zeros.

    On a GPU the CPU waits once for the targets, unless they lie on the CPU. Raises ValueError for shapes that do not
    fit, and for targets that are no class.
    """
    width = _checked(hidden, weight, targets, bias, soft_cap, label_smoothing)
    recorded = torch.is_grad_enabled()
    fused = _fused(hidden)
    rows = hidden.reshape(targets.numel(), width)
    settings = _Settings(
        ignore_index, soft_cap, label_smoothing, scale, chunk_bytes or (GPU_BYTES if fused else CPU_BYTES),
        *(recorded and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)),
    )  # fmt: skip
    return _LinearCrossEntropy.apply(rows, weight, bias, targets.reshape(-1), settings)


class _Settings(NamedTuple):
    """What is no tensor."""

    ignore_index: int
    soft_cap: float | None
    label_smoothing: float
    scale: float
    chunk_bytes: int
    hidden_trained: bool
    weight_trained: bool
    bias_trained: bool


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, soft_cap: float | None, smoothing: float
) -> int:
    """The width d, once everything fits."""
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit a weight {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets are integers, not {targets.dtype}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: there must be at least one class")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be above 0, not {soft_cap}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {smoothing}")
    return weight.shape[1]


def _fused(hidden: Tensor) -> bool:
    """Kernels compute in float32; float64 is for plain torch."""
    return on_triton(hidden) and hidden.dtype != torch.float64


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.empty((), dtype=wide, device=hidden.device)
        unit = torch.empty_like(loss)
        contiguous = torch.contiguous_format
        d_hidden = torch.empty_like(hidden, memory_format=contiguous) if settings.hidden_trained else None
        d_weight = torch.empty_like(weight, memory_format=contiguous) if settings.weight_trained else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=hidden.device) if settings.bias_trained else None
        half = d_weight is not None and _sums_in_half(hidden, weight, settings.chunk_bytes)
        _loss_and_gradients(
            hidden, weight, targets, bias, loss, unit, d_hidden, d_weight, d_bias, settings.ignore_index,
            settings.soft_cap, settings.label_smoothing, settings.scale, settings.chunk_bytes, half,
        )  # fmt: skip
        ctx.save_for_backward(d_hidden, d_weight, d_bias, unit)
        ctx.scale, ctx.half = settings.scale, half
        ctx.bias_dtype = None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias, unit = ctx.saved_tensors
        if d_hidden is not None:
            _multiply(d_hidden, gradient * ctx.scale, False)
        if d_weight is not None:
            _multiply(d_weight, gradient * ctx.scale * unit, ctx.half)
        if d_bias is not None:
            d_bias = (d_bias * gradient).to(ctx.bias_dtype)
        return d_hidden, d_weight, d_bias, None, None


@writes("values")
def _multiply(values: Tensor, factor: Tensor, held_in_half: bool) -> None:
    """values *= factor in place, multiplied in float32; `held_in_half`: their 16 bits are those of float16 before."""
    if _fused(values):
        kernels.start_rescale(values.view(torch.float16) if held_in_half else values, values, factor)
    elif float(factor) != 1.0:
        values.mul_(float(factor))
    torch.autograd.graph.increment_version(values)  # so that a second backward pass is refused, by 1, too


def _sums_in_half(hidden: Tensor, weight: Tensor, chunk_bytes: int) -> bool:
    """Whether the weight's gradient in bfloat16 is summed over chunks as float16, in its own memory."""
    rows = len(hidden)
    return (
        _fused(hidden)
        and hidden.dtype == weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and chunks.rows_of_a_chunk(rows, weight, hidden.dtype, chunk_bytes, True) < rows <= HALF_ROWS
    )


@writes("loss", "unit", "d_hidden", "d_weight", "d_bias")
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    loss: Tensor,
    unit: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    ignore_index: int,
    soft_cap: float | None,
    label_smoothing: float,
    scale: float,
    chunk_bytes: int,
    half: bool,
) -> None:
    """The sum of the losses and its gradients; d_hidden and d_weight still have to be multiplied by `scale`, d_weight
    by `unit`, too; d_bias, given as zeros, is float32 at least."""
    fused, wide, classes = _fused(hidden), loss.dtype, len(weight)
    picked = chunks.picked_rows(targets, ignore_index, classes)
    targets = (targets if picked is None else targets[picked]).to(hidden.device, torch.int64)
    picked = None if picked is None else picked.to(hidden.device)
    kept = len(targets)
    rows = chunks.rows_of_a_chunk(kept, weight, hidden.dtype, chunk_bytes, fused)
    weight = weight.detach().to(hidden.dtype)
    bias = None if bias is None else bias.detach().contiguous()
    losses = torch.empty(kept, dtype=wide, device=hidden.device)
    head = None if d_weight is None else chunks.WeightGradient(d_weight, hidden.dtype, kept <= rows)
    unit.fill_(1.0)
    if head is not None and half and kept:
        head.hold_in_half(unit, chunks.largest_of(hidden, picked, rows), kept)
    if d_hidden is not None and picked is not None:
        d_hidden.zero_()
    differentiated = any(gradient is not None for gradient in (d_hidden, d_weight, d_bias))
    kind = chunks.FusedLoss if fused else chunks.PlainLoss
    work = kind(weight, bias, rows, soft_cap, label_smoothing, scale, differentiated)
    for begin in range(0, kept, rows):
        part = slice(begin, min(begin + rows, kept))
        h = hidden[part] if picked is None else hidden.index_select(0, picked[part])
        d_logits = work.of(h, targets[part], losses[part])
        if d_hidden is not None:
            direct = picked is None
            d_rows = d_hidden[part] if direct else torch.empty(len(h), h.shape[1], dtype=h.dtype, device=h.device)
            torch.mm(d_logits.to(weight.dtype), weight, out=d_rows)
            if picked is not None:
                d_hidden.index_copy_(0, picked[part], d_rows)
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=wide)
        if head is not None:
            head.add(d_logits, h)
    loss.copy_(losses.sum(dtype=torch.float64))
    if head is not None:
        head.finish()
