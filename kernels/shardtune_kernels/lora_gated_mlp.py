"""A gated feed-forward layer, all three of its linear layers with adapters or without."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels.weights import LoraWeights


def lora_gated_mlp(
    x: Tensor,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    activation: str = "silu",
    dropout: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """x [..., d] -> down(act(gate(x)) · up(x)) [..., d]."""
    return reference.lora_gated_mlp(x, gate, up, down, activation)
