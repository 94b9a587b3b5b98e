"""Linear layers with a low-rank adapter, each or several that read one input as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardtune_kernels import _lora_layers as shared
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._lora_flat import is_flat, lora_linear_flat
from shardtune_kernels._lora_kernels import BUILDS as BUILDS
from shardtune_kernels._rows import flattened, rows_of
from shardtune_kernels.weights import LoraWeights


def lora_linear(x: Tensor, w: LoraWeights, dropout: float = 0.0, seed: int | None = None) -> Tensor:
    """x [..., k] -> [..., n]: x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685).

    Dropout (Srivastava et al. 2014) is drawn from `seed`, or from one of torch's random stream of the CPU, and once
    more in the backward: `dropout.dropout_mask(seed, dropout, x.shape, x.device)` is what was kept. Computed in the
    dtype of x, or of autocast; the gradients of x and of what is trained of `w` have the dtypes of these. Saved for
    backward are x and drop(x) Aᵀ [..., r]; weights are looked at again. Without an adapter (`w.a` is None) it is a
    plain linear layer. Raises ValueError for shapes that do not fit, and unless 0 <= dropout < 1.
    """
    if is_flat(x, w, dropout):
        try:
            return lora_linear_flat(x, w)
        except RuntimeError:
            shared.check(x.shape[-1], w)
            raise
    (y,) = lora_qkv(x, (w,), dropout, None if seed is None else (seed,))
    return y


@shared.in_autocasts_dtype
def lora_qkv(
    x: Tensor, weights: Sequence[LoraWeights], dropout: float = 0.0, seeds: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """x [..., k] -> [..., n] for each of any number of layers that read the same x, as `lora_linear` of each.

    The adapters' A are applied together, x read once; each has a mask of its own, of `seeds[i]`, and the gradients of
    x are summed in one buffer.
    """
    for w in weights:
        shared.check(x.shape[-1], w)
    drawn, settings, tensors = shared.of_autograd(weights, dropout, seeds)
    return _LoraLinears.apply(x, drawn, settings, *tensors)


class _LoraLinears(Function):
    """Arguments after the third: weight (None if in four bits), bias, a and b of each layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, settings: shared.Settings, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layers = shared.layers_of(settings, tensors)
        dropout = shared.dropout_of(settings, seeds, layers)
        x_mk = rows_of(x)
        outputs, xa = shared.outputs_of(x_mk, layers, dropout)
        needs = ctx.needs_input_grad[3:]
        needs_x = dropout is not None or any(needs[shared.WEIGHT :: 4]) or any(needs[shared.A :: 4])
        ctx.save_for_backward(x_mk if needs_x else None, xa if any(needs[shared.B :: 4]) else None, seeds, *tensors)
        ctx.settings, ctx.shape = settings, x.shape
        return tuple(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in outputs)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, xa, seeds, *tensors = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        found: list[Tensor | None] = [None] * len(needs)
        dys = [None if dy is None else flattened(dy) for dy in gradients]
        if all(dy is None for dy in dys):
            return None, None, None, *found
        layers = shared.layers_of(ctx.settings, tensors)
        of = shared.Gradients(layers, dys, needs, found, 0, shared.dropout_of(ctx.settings, seeds, layers))
        dx = of.of_all(of.of_b(xa, needs_x), x, needs_x)
        return None if dx is None else dx.view(ctx.shape), None, None, *found
