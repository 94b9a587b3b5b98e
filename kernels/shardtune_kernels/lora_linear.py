"""Linear layers with a low-rank adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels.weights import LoraWeights


def draw_seed() -> int:
    """A seed from torch's random stream of the CPU, which activation recomputation sets back."""
    return int(torch.randint(1 << 31, ()))


def lora_linear(x: Tensor, w: LoraWeights, dropout: float = 0.0, seed: int | None = None) -> Tensor:
    """x [..., k] -> [..., n]."""
    (y,) = lora_qkv(x, [w], dropout, None if seed is None else [seed])
    return y


def lora_qkv(
    x: Tensor, weights: Sequence[LoraWeights], dropout: float = 0.0, seeds: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """x [..., k] -> [..., n] for each of any number of layers that read the same x."""
    kept = (torch.rand_like(x) >= dropout) if dropout else None
    return tuple(reference.lora_linear(x, w, kept, dropout) for w in weights)
