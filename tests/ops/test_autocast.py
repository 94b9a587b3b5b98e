"""A backward pass that is called within autocast computes what it computes outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparing import DEVICE
from torch import Tensor

import shardtune_kernels as ops
from shardtune_kernels import LoraWeights

torch.manual_seed(0)
W, A, B = (torch.randn(shape, device=DEVICE) for shape in ((16, 16), (3, 16), (16, 3)))
LAYER = LoraWeights(W, None, A.requires_grad_(), B.requires_grad_(), 2.0)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "lora_linear": lambda x: ops.lora_linear(x, LAYER),
    "lora_linear of three dimensions": lambda x: ops.lora_linear(x.view(2, 4, 16), LAYER, 0.25, seed=3),
    "lora_qkv": lambda x: sum(ops.lora_qkv(x, [LAYER, LoraWeights(W)])),  # pyright: ignore[reportReturnType]
    "lora_gated_mlp": lambda x: ops.lora_gated_mlp(x, LAYER, LAYER, LAYER),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, W, torch.arange(8, device=DEVICE)),
    "rms_norm": lambda x: ops.rms_norm(x, W[0], 1e-6),  # pyright: ignore[reportReturnType]
    "gated_activation": lambda x: ops.gated_activation(x, x),
}


@pytest.mark.parametrize("name", OPS)
def test_a_backward_within_autocast(name: str) -> None:
    found = []
    for enabled in (False, True):
        x = torch.linspace(-2, 2, 128, device=DEVICE).view(8, 16).requires_grad_()
        y = OPS[name](x)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            y.backward(torch.ones_like(y))
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
