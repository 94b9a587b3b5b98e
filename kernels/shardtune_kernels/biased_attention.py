"""Attention with T5's relative positions."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    causal: bool = False,
    scale: float = 1.0,
    shown: Tensor | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    longest: tuple[int, int] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """q [b, h, s, d], k and v [b, h, t, d] -> [b, h, s, d]; `longest`: document among the rows of q and of k, where
    that is known, which saves asking the device."""
    return reference.biased_attention(
        q, k, v, table, bidirectional=bidirectional, max_distance=max_distance, causal=causal, scale=scale,
        shown=shown, offsets=offsets,
    )  # fmt: skip
