"""The most usual LoRA layer on a CPU, with as little of Python around its eight products as can be: one dense weight,
an adapter without dropout, one dtype. Small models spend more time on calls than on products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
        and x.is_cpu
        and x.dtype == weight.dtype == a.dtype == b.dtype
        and (bias is None or (bias.dtype == x.dtype and not bias.requires_grad))
        and not INTERPRETED
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Flat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        xa = functional.linear(rows, a)
        ctx.save_for_backward(rows, xa, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        y = functional.linear(rows, weight, bias).addmm_(xa, b.t(), alpha=scale)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a LoRA layer can be differentiated once, not twice")
        x, xa, weight, a, b = ctx.saved_tensors
        needs_x, needs_weight, _, needs_a, needs_b, _ = ctx.needs_input_grad
        (dy,) = gradients
        if dy.dim() != 2:
            dy = dy.reshape(-1, dy.shape[-1])
        dx = dw = da = db = None
        dyb = torch.addmm(xa, dy, b, beta=0, alpha=ctx.scale) if needs_x or needs_a else xa
        if needs_x:
            dx = dyb.mm(a).addmm_(dy, weight)
            if len(ctx.shape) != 2:
                dx = dx.view(ctx.shape)
        if needs_weight:
            dw = dy.t().mm(x)
        if needs_a:
            da = dyb.t().mm(x)
        if needs_b:
            db = torch.addmm(b, dy.t(), xa, beta=0, alpha=ctx.scale)
        return dx, dw, None, da, db, None


_apply: Any = super(torch.autograd.Function, _Flat).apply  # pyright: ignore[reportAttributeAccessIssue]
"""Without the wrapper for functorch's transforms, which costs as much as a product."""


def lora_linear_flat(x: Tensor, w: LoraWeights) -> Tensor:
    """As `lora_linear`; torch's own RuntimeError for shapes that do not fit."""
    weight, bias, a, b, scale = w
    return _apply(x, weight, bias, a, b, scale)
