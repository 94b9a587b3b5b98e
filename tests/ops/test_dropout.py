"""Masks of dropout: random, reproducible, and of all bits of their seeds."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from comparing import DEVICE

from shardtune_kernels._launch import INTERPRETED
from shardtune_kernels.biased_attention import attention_dropout_mask
from shardtune_kernels.dropout import dropout_mask, kept_tile


def test_a_mask_is_random_and_reproducible() -> None:
    one, other = (dropout_mask(seed, 0.25, (64, 512), DEVICE).float() for seed in (11, 12))
    torch.testing.assert_close(one, dropout_mask(11, 0.25, (64, 512), DEVICE).float())
    share = 4 * (0.25 * 0.75 / one.numel()) ** 0.5
    assert abs(float(one.mean()) - 0.75) < share
    centred, of_other = one - 0.75, other - 0.75
    neighbours = [centred.roll(shift, dim) for dim in (0, 1) for shift in (1, 2, 4, 8)]
    for beside in (of_other, *neighbours):
        assert abs(float((centred * beside).mean())) < share
    assert dropout_mask(1, 0.0, (3, 5), DEVICE).all()


@triton.jit
def _two_tiles(out_ptr, dropped, far):
    rows = tl.arange(0, 16).to(tl.int64)
    at = tl.arange(0, 16)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(out_ptr + at, kept_tile(5, rows, 0, dropped, 16, 128))
    tl.store(out_ptr + 2048 + at, kept_tile(5, rows + far, 0, dropped, 16, 128))


@pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="kernels run on a GPU or in the interpreter")
def test_masks_beyond_32_bits_of_rows() -> None:
    """Rows whose number has other high bits have other masks."""
    out = torch.zeros(2, 2048, dtype=torch.bool, device=DEVICE)
    _two_tiles[(1,)](out, 1 << 15, 1 << 32)
    assert 0.4 < float((out[0] == out[1]).float().mean()) < 0.6


def test_all_bits_of_a_seed_count() -> None:
    """A CPU's generator looks at the lower 32 only."""
    one, far = (dropout_mask(seed, 0.5, (16, 64), DEVICE) for seed in (5, 5 + (1 << 40)))
    assert not torch.equal(one, far)
    one, far = (attention_dropout_mask(seed, 0.5, 1, 2, 16, 16, DEVICE) for seed in (5, 5 + (1 << 40)))
    assert not torch.equal(one, far)
