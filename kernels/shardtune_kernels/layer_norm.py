"""Layer normalization."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., d]."""
    return reference.layer_norm(x, weight, bias, eps, residual)
