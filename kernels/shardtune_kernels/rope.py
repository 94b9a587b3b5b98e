"""Rotary positions."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [b, h, s, d], k [b, g, s, d]."""
    return reference.rope(q, k, cos, sin)
