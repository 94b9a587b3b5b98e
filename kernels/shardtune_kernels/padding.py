"""Dynamic padding on the device: from a flat stream of ragged tokens to what a model reads, and back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shardtune_kernels import reference


class Rows(NamedTuple):
    """What a model reads, all int64: [b, width] of `pad`, [1, n] of `pack`."""

    input_ids: Tensor
    labels: Tensor
    """What each position is to predict; `ignore_index` where it is nothing."""
    attention_mask: Tensor
    """1 where there is a token, 0 where there is padding."""
    positions: Tensor
    """Of each token in its own row or document; 0 on padding."""
    documents: Tensor
    """Which row of the stream a token is from; -1 on padding."""


def pad(
    tokens: Tensor,
    offsets: Tensor,
    width: int,
    *,
    fill: int = 0,
    learned_from: Tensor | None = None,
    start: int | None = None,
    left: bool = False,
    ignore_index: int = -100,
) -> Rows:
    """int32 tokens [n] and offsets [b + 1] to rows of `width`."""
    return Rows(*reference.pad(tokens, offsets, width, fill, learned_from, start, left, ignore_index))


def pack(
    tokens: Tensor,
    offsets: Tensor,
    *,
    learned_from: Tensor | None = None,
    start: int | None = None,
    ignore_index: int = -100,
) -> Rows:
    """All in one row, without padding."""
    return Rows(*reference.pack(tokens, offsets, learned_from, start, ignore_index))


def unpad(rows: Tensor, offsets: Tensor, total: int | None = None, left: bool = False) -> Tensor:
    """rows [b, width, ...] to the stream [n, ...], with a gradient that is 0 on padding."""
    return reference.unpad(rows, offsets, left)
