"""The most usual LoRA layer on a CPU, with as little of Python around its eight products as can be: one dense weight,
an adapter without dropout, x [m, k], one dtype. Small models spend more time on calls than on products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardtune_kernels._autograd import Function
from shardtune_kernels._launch import INTERPRETED
from shardtune_kernels.weights import LoraWeights


def is_flat(x: Tensor, w: LoraWeights, dropout: float) -> bool:
    """Whether `lora_linear_flat` is for it: cheap to tell, wrong shapes may pass."""
    weight, bias, a, b, _ = w
    return (
        dropout == 0.0
        and a is not None
        and b is not None
        and isinstance(weight, Tensor)
        and x.dim() == 2
        and x.is_cpu
        and x.dtype == weight.dtype == a.dtype == b.dtype
        and bias is None
        and not INTERPRETED
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Flat(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        xa = functional.linear(x, a)
        ctx.save_for_backward(x, xa, weight, a, b)
        ctx.scale = scale
        return functional.linear(x, weight).addmm_(xa, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a LoRA layer can be differentiated once, not twice")
        x, xa, weight, a, b = ctx.saved_tensors
        needs_x, needs_weight, needs_a, needs_b, _ = ctx.needs_input_grad
        (dy,) = gradients
        dx = dw = da = db = None
        dyb = torch.addmm(xa, dy, b, beta=0, alpha=ctx.scale) if needs_x or needs_a else xa
        if needs_x:
            dx = dyb.mm(a).addmm_(dy, weight)
        if needs_weight:
            dw = dy.t().mm(x)
        if needs_a:
            da = dyb.t().mm(x)
        if needs_b:
            db = torch.addmm(b, dy.t(), xa, beta=0, alpha=ctx.scale)
        return dx, dw, da, db, None


_apply: Any = super(Function, _Flat).apply
"""Without the wrapper for functorch's transforms, which costs as much as a product."""


def lora_linear_flat(x: Tensor, w: LoraWeights) -> Tensor:
    """As `lora_linear`; torch's own RuntimeError for shapes that do not fit."""
    weight, _, a, b, scale = w
    return _apply(x, weight, a, b, scale)
