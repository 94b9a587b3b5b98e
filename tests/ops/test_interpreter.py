"""What the interpreter computes is what a GPU would."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from mutants import only_interpreted

from shardtune_kernels._launch import INTERPRETED


@triton.jit
def _through_bfloat16(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x)
    tl.store(z_ptr + tl.arange(0, BLOCK), x.to(tl.bfloat16).to(tl.float32))


@only_interpreted
def test_bfloat16_is_rounded_to_the_nearest() -> None:
    assert INTERPRETED
    x = torch.randn(256) * torch.logspace(-44, 38, 256)
    ties = [1.00390625, 1.01171875, -1.99609375, 3.3895314e38, 0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan]
    x[: len(ties)] = torch.tensor(ties)
    y, z = torch.empty(256, dtype=torch.bfloat16), torch.empty(256)
    _through_bfloat16[(1,)](x, y, z, 256)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
