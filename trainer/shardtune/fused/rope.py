"""Rotary positions: the function that attention layers of one class call, replaced in these layers only."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardtune_kernels import reference, rope

FUNCTION = "apply_rotary_pos_emb"


def fuse_rope(model: nn.Module) -> tuple[int, dict[str, int]]:
    """Fuses the rotation in attention layers; how many, and why others were not, counted."""
    count, reasons = 0, {}
    known: dict[type[nn.Module], Callable[..., Any] | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or FUNCTION not in forward.__code__.co_names:
            continue
        if type(module) not in known:
            known[type(module)] = _with_fused(forward) if _rotates_halves(forward.__globals__.get(FUNCTION)) else None
        fused = known[type(module)]
        if fused is None or "forward" in module.__dict__:
            reason = f"{type(module).__name__} rotates otherwise"
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        module.forward = types.MethodType(fused, module)
        count += 1
    return count, reasons


def _with_fused(forward: types.FunctionType) -> Callable[..., Any]:
    """The same function with the fused rotation in the place of its own."""
    fused = types.FunctionType(
        forward.__code__, {**forward.__globals__, FUNCTION: _rotate}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin)


def _rotates_halves(function: Callable[..., Any] | None) -> bool:
    """Whether it computes what the fused one does, tried on a few numbers."""
    if function is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 1, 5, 8, generator=generator)
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    try:
        own = function(q, k, cos, sin)
    except Exception:  # another signature
        return False
    wanted = reference.rope(q, k, cos, sin)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own, wanted, strict=True))
