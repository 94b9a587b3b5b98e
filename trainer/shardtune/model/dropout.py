"""Dropout on CPUs with random numbers that cost little: PyTorch draws one float for each element, one at a time.

On one core `torch.nn.functional.dropout` takes 2.8 times as long, forward and backward; in a T5 with its usual rate of
0.1 that was a sixth of a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 1 << 16
"""Rates are multiples of 1 / STEPS: 16 random bits decide about an element, and a 64-bit number about four."""


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """Zero with probability `dropped` / STEPS; the others are scaled so that the mean stays."""
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = (words.view(torch.int16)[: x.numel()] >= dropped - STEPS // 2).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = STEPS / (STEPS - dropped)
        return torch.where(kept, x, x.new_zeros(())).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The same elements, with the same scale."""
        (kept,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(kept, gradient, gradient.new_zeros(())).mul_(ctx.scale), None


def dropout(x: Tensor, rate: float) -> Tensor:
    """As `torch.nn.functional.dropout` in training, for x on a CPU, of any shape; `rate` below 1 is rounded to 2⁻¹⁶."""
    dropped = min(round(rate * STEPS), STEPS - 1)
    return _Dropout.apply(x, dropped) if dropped else x  # pyright: ignore[reportReturnType]


def quicken_dropout(model: nn.Module) -> None:
    """Makes the dropout layers of a model use this one where their input is on a CPU."""
    for module in model.modules():
        if type(module) is nn.Dropout and module.p < 1:
            module.forward = partial(_forward, module)


def _forward(module: nn.Dropout, input: Tensor) -> Tensor:
    if not module.training or input.device.type != "cpu":
        return nn.functional.dropout(input, module.p, module.training)
    return dropout(input, module.p)
