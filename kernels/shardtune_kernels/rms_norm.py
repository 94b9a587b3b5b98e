"""Root mean square normalization."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kind: str = "llama", residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., d]."""
    return reference.rms_norm(x, weight, eps, kind, residual)
