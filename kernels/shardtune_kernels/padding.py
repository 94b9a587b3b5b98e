"""Dynamic padding on the device: from a flat stream of ragged tokens to what a model reads, and back.

Of the forms a host would copy (ids, labels, mask, positions and documents, 40 bytes a position), the stream has 4 bytes
a token and no padding; one launch writes all five.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardtune_kernels._autograd import Function, once
from shardtune_kernels._launch import on_triton
from shardtune_kernels._padding_kernels import BUILDS as BUILDS
from shardtune_kernels._padding_kernels import launch_gather, launch_pack, launch_pad, launch_scatter


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
    """Ragged rows to rows of `width`: row i is tokens[offsets[i] : offsets[i + 1]], at most `width` of them, then
    `fill`, or with `left` before them.

    tokens [n], offsets [b + 1] from 0 to n, learned_from [b]: int32 or int64, in any mixture. A token below 0 is read
    as ~token and never learned. With x_j the j-th token of a row of length l, as it is read:

    - input_ids: x_j at column j, and labels: x_{j + 1}, where j + 1 < l;
    - with `start`, as a decoder beside an encoder reads it (Raffel et al. 2020, arXiv:1910.10683, section 2.1):
      input_ids `start`, x_0, x_1 … and labels x_j.

    A label is `ignore_index` where there is nothing to learn: on padding, of a token below 0, and of the tokens of row
    i before the learned_from[i]-th. All on one device; on a GPU one launch, without a sync. Raises ValueError for
    shapes or dtypes that do not fit.
    """
    _check(tokens, offsets, learned_from)
    if width < 0:
        raise ValueError(f"width is {width}; it must be at least 0")
    out = tokens.new_empty((5, len(offsets) - 1, width), dtype=torch.int64)
    given = (out, *_contiguous(tokens, offsets, learned_from), fill, start or 0, ignore_index, start is not None)
    if on_triton(tokens):
        launch_pad(*given, left)
    else:
        _pad_plain(*given, left)
    return Rows(*out.unbind())


def pack(
    tokens: Tensor,
    offsets: Tensor,
    *,
    learned_from: Tensor | None = None,
    start: int | None = None,
    ignore_index: int = -100,
) -> Rows:
    """All rows one after the other in one, [1, n], without padding (Raffel et al. 2020, arXiv:1910.10683, section 2.1;
    Krell et al. 2021, arXiv:2107.02027). Arguments, values and errors are those of `pad`; a label never crosses from
    one row into the next. A token behind the last row counts as padding, which is read as 0."""
    _check(tokens, offsets, learned_from)
    out = tokens.new_empty((5, 1, len(tokens)), dtype=torch.int64)
    given = (out, *_contiguous(tokens, offsets, learned_from), start or 0, ignore_index, start is not None)
    if on_triton(tokens):
        launch_pack(*given)
    else:
        _pack_plain(*given)
    return Rows(*out.unbind())


def unpad(rows: Tensor, offsets: Tensor, total: int | None = None, left: bool = False) -> Tensor:
    """Rows [b, width, ...] of any dtype to their stream [total, ...]: of row i its offsets[i + 1] - offsets[i] first
    entries, or with `left` its last ones. The inverse of `pad`, and so in the gradient: 0 on padding.

    offsets [b + 1], int32 or int64, from 0, no row longer than `width`: an entry that is not there is 0. `total` is
    offsets[b], for a caller who knows it; else it is read, which on a GPU waits for all that came before. Raises
    ValueError for shapes or dtypes that do not fit.
    """
    if rows.dim() < 2:
        raise ValueError(f"rows have {rows.dim()} dimensions; they must be [b, width, ...]")
    _check_offsets(offsets, rows)
    if len(offsets) != len(rows) + 1:
        raise ValueError(f"{len(rows)} rows need {len(rows) + 1} offsets, not {len(offsets)}")
    total = int(offsets[-1]) if total is None else total
    if total < 0:
        raise ValueError(f"total is {total}; it must be at least 0")
    return _Unpad.apply(rows, offsets.contiguous(), total, left)


class _Unpad(Function):
    """Moves bits, as integers of the same size: the same kernels serve any dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, offsets: Tensor, total: int, left: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.shape, ctx.left = rows.shape, left
        out = rows.new_empty((total, *rows.shape[2:]))
        gather = launch_gather if on_triton(rows) else _gather_plain
        gather(_bits(out, 1), _bits(rows.contiguous(), 2), offsets, left)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (offsets,), gradient = ctx.saved_tensors, gradients[0]
        out = gradient.new_empty(ctx.shape)
        scatter = launch_scatter if on_triton(gradient) else _scatter_plain
        scatter(_bits(out, 2), _bits(gradient.contiguous(), 1), offsets, ctx.left)
        return out, None, None, None


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _bits(x: Tensor, dimensions: int) -> Tensor:
    """A contiguous tensor's memory as integers, all but the first `dimensions` flattened to one."""
    flat = x.view(*x.shape[:dimensions], math.prod(x.shape[dimensions:]))
    return flat.view(_INTEGERS[x.dtype.itemsize])


def _check(tokens: Tensor, offsets: Tensor, learned_from: Tensor | None) -> None:
    if tokens.dim() != 1 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be int32 or int64, [n]")
    _check_offsets(offsets, tokens)
    if learned_from is None:
        return
    if learned_from.shape != (len(offsets) - 1,) or learned_from.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"learned_from is {learned_from.dtype} {list(learned_from.shape)}; it must be int32 or int64, "
            f"[{len(offsets) - 1}]: one number a row"
        )
    if learned_from.device != tokens.device:
        raise ValueError(f"learned_from is on {learned_from.device}, tokens are on {tokens.device}")


def _check_offsets(offsets: Tensor, beside: Tensor) -> None:
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets are {offsets.dtype} {list(offsets.shape)}; they must be int32 or int64, [b + 1]")
    if offsets.device != beside.device:
        raise ValueError(f"offsets are on {offsets.device}, what they divide is on {beside.device}")


def _contiguous(tokens: Tensor, offsets: Tensor, learned_from: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return tokens.contiguous(), offsets.contiguous(), None if learned_from is None else learned_from.contiguous()


# ------------------------------------------------------------------------------------------------ plain torch


def _pad_plain(
    out: Tensor, tokens: Tensor, offsets: Tensor, learned_from: Tensor | None, fill: int, start: int,
    ignore_index: int, shifted: bool, left: bool,
) -> None:  # fmt: skip
    _, rows, width = out.shape
    low, length = offsets[:-1].long()[:, None], offsets.diff().long()[:, None]
    place = torch.arange(width, device=out.device).expand(rows, width)
    if left:
        place = place - (width - length).clamp(min=0)
    row = torch.arange(rows, device=out.device)[:, None].expand(rows, width)
    first = None if learned_from is None else learned_from[:, None]
    inside = (place >= 0) & (place < length)
    _fill_plain(out, tokens, inside, row, place, low, length, first, fill, start, ignore_index, shifted)


def _pack_plain(
    out: Tensor, tokens: Tensor, offsets: Tensor, learned_from: Tensor | None, start: int, ignore_index: int,
    shifted: bool,
) -> None:  # fmt: skip
    if len(offsets) == 1:
        offsets, learned_from = offsets.new_zeros(2), None
    found, place, inside = _places_plain(offsets, len(tokens))
    low, length = offsets[:-1].long()[found], offsets.diff().long()[found]
    first = None if learned_from is None else learned_from[found]
    _fill_plain(out[:, 0], tokens, inside, found, place, low, length, first, 0, start, ignore_index, shifted)


def _fill_plain(
    out: Tensor, tokens: Tensor, inside: Tensor, row: Tensor, place: Tensor, low: Tensor, length: Tensor,
    first: Tensor | None, fill: int, start: int, ignore_index: int, shifted: bool,
) -> None:  # fmt: skip
    """All five of positions that are `inside` of a row, at `place` in it."""
    tokens = tokens if len(tokens) else tokens.new_zeros(1)

    def at(places: Tensor) -> Tensor:
        return tokens[(low + places).clamp(0, len(tokens) - 1)].long()

    def read(given: Tensor) -> Tensor:
        return torch.where(given < 0, ~given, given)

    target_place = place if shifted else place + 1
    ids, target = read(at(place - int(shifted))), at(target_place)
    if shifted:
        ids = torch.where(place == 0, start, ids)
    learns = inside & (target >= 0) & (target_place < length)
    if first is not None:
        learns = learns & (target_place >= first)
    parts = (
        torch.where(inside, ids, fill), torch.where(learns, target, ignore_index), inside,
        torch.where(inside, place, 0), torch.where(inside, row, -1),
    )  # fmt: skip
    for part, values in zip(out, parts, strict=True):
        part.copy_(values)


def _places_plain(offsets: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of a stream's positions: its row, its place in it, and whether it is in one at all."""
    position = torch.arange(total, device=offsets.device)
    found = torch.searchsorted(offsets[1:].long(), position, right=True)
    inside = found < len(offsets) - 1
    found = found.clamp(max=len(offsets) - 2)
    return found, position - offsets[found].long(), inside


def _gather_plain(out_nd: Tensor, rows_bwd: Tensor, offsets: Tensor, left: bool) -> None:
    rows, width, inner = rows_bwd.shape
    if not rows * width * inner:
        out_nd.zero_()
        return
    row, place, inside = _places_plain(offsets, len(out_nd))
    if left:
        place = place + width - offsets.diff().long()[row]
    inside = inside & (place >= 0) & (place < width)
    values = rows_bwd.flatten(0, 1).index_select(0, torch.where(inside, row * width + place, 0))
    out_nd.copy_(torch.where(inside[:, None], values, 0))


def _scatter_plain(out_bwd: Tensor, stream_nd: Tensor, offsets: Tensor, left: bool) -> None:
    rows, width, inner = out_bwd.shape
    if not len(stream_nd) * inner:
        out_bwd.zero_()
        return
    low, length = offsets[:-1].long()[:, None], offsets.diff().long()[:, None]
    place = torch.arange(width, device=offsets.device).expand(rows, width)
    if left:
        place = place - (width - length)
    index = low + place
    inside = (place >= 0) & (place < length) & (index < len(stream_nd))
    values = stream_nd.index_select(0, torch.where(inside, index, 0).flatten()).view(out_bwd.shape)
    out_bwd.copy_(torch.where(inside[:, :, None], values, 0))
