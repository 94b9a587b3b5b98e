"""What functions of autograd share here: each can be differentiated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Function: Any = torch.autograd.Function
"""As Any: each has parameters of its own."""


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of a `backward` whose results autograd cannot differentiate again: where they would be (create_graph=True), an
    error, at once. torch's own `once_differentiable` says nothing where the gradient given needs none, as that of a
    sum, although the result depends on the inputs. It computes in the dtypes it is given, also where `backward()` is
    called within autocast."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("an op of shardtune_kernels can be differentiated once, not twice (create_graph=True)")
        device = next((gradient.device.type for gradient in gradients if gradient is not None), "cpu")
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return backward(ctx, *gradients)
        return backward(ctx, *gradients)

    return run
