"""From hidden states and the output layer to the summed loss, without the logits."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """float32 scalar."""
    return reference.linear_cross_entropy(hidden, weight, targets, bias, ignore_index, soft_cap, label_smoothing, scale)
