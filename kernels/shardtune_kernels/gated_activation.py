"""act(gate) · up."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up, all of one shape."""
    return reference.gated_activation(gate, up, activation)
