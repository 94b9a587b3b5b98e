"""A second backward pass through one graph gives the same gradients or is refused; and none is differentiated again,
unless plain torch does it right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparing import DEVICE
from torch import Tensor

import shardtune_kernels as kernels
from shardtune_kernels import FourBitWeight, LoraWeights
from shardtune_kernels._launch import INTERPRETED

Op = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def drawn(*shape: int) -> Tensor:
    """The same for each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def layer(n: int, k: int, bias: bool = True) -> LoraWeights:
    return LoraWeights(drawn(n, k), drawn(n) if bias else None, drawn(3, k), drawn(n, 3))


def four_bits() -> FourBitWeight:
    packed = torch.arange(5 * 64 // 2, dtype=torch.uint8, device=DEVICE)
    return FourBitWeight(packed, drawn(5).abs() + 0.5, (5, 64), torch.float32)


OPS: dict[str, tuple[tuple[int, ...], Op]] = {
    "lora_linear": ((6, 8), lambda x: kernels.lora_linear(x, layer(5, 8))),
    "lora_linear, flat": ((6, 8), lambda x: kernels.lora_linear(x, layer(5, 8, False))),
    "lora_linear, dropout": ((6, 8), lambda x: kernels.lora_linear(x, layer(5, 8), 0.25, 3)),
    "lora_qkv": ((6, 8), lambda x: kernels.lora_qkv(x, (layer(5, 8), layer(4, 8)))),
    "lora_gated_mlp": ((6, 8), lambda x: kernels.lora_gated_mlp(x, layer(9, 8), layer(9, 8), layer(8, 9))),
    "four_bit_linear": ((6, 64), lambda x: kernels.four_bit_linear(x, four_bits())),
    "linear_cross_entropy": (
        (6, 8), lambda x: kernels.linear_cross_entropy(x, drawn(7, 8), torch.arange(6, device=DEVICE))
    ),
    "rms_norm": ((6, 8), lambda x: kernels.rms_norm(x, drawn(8), 1e-6)),
    "layer_norm": ((6, 8), lambda x: kernels.layer_norm(x, drawn(8), None, 1e-6)),
    "rope": ((1, 2, 3, 8), lambda x: kernels.rope(x, x, drawn(1, 3, 8), drawn(1, 3, 8))),
    "gated_activation": ((6, 8), lambda x: kernels.gated_activation(x, x)),
    "biased_attention": ((1, 2, 5, 8), lambda x: kernels.biased_attention(x, x, x)),
    "unpad": ((2, 3, 4), lambda x: kernels.unpad(x, torch.tensor([0, 2, 5], device=DEVICE))),
}  # fmt: skip
PLAIN = () if INTERPRETED or DEVICE.type == "cuda" else (
    "rms_norm", "layer_norm", "rope", "gated_activation"
)  # fmt: skip
"""What is torch's own on a CPU, and can be differentiated again."""


def test_every_op_with_a_gradient_is_here() -> None:
    assert {name.partition(",")[0] for name in OPS} == set(kernels.OPS) - {"nf4_dequantize", "pad", "pack"}


def started(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op, summed up to one number, and an x."""
    torch.manual_seed(0)
    shape, op = OPS[name]

    def summed(x: Tensor) -> Tensor:
        y = op(x)
        return torch.stack([part.sin().sum() for part in y]).sum() if isinstance(y, tuple) else y.sum()

    return summed, torch.randn(shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_second_backward(name: str, factor: float) -> None:
    op, x = started(name)
    y = op(x)
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    kept = first.clone()
    try:
        (second,) = torch.autograd.grad(factor * y, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        assert name in ("lora_gated_mlp", "linear_cross_entropy")
    else:
        torch.testing.assert_close(second, factor * kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", OPS)
def test_differentiated_twice(name: str) -> None:
    op, x = started(name)
    if name not in PLAIN:
        with pytest.raises(RuntimeError, match=r"once, not twice|is not implemented"):
            torch.autograd.grad(torch.autograd.grad(op(x), x, create_graph=True)[0].sum(), x)
        return

    def slope(at: Tensor) -> Tensor:
        return torch.autograd.grad(op(at), at, create_graph=True)[0].square().sum()

    step = torch.randn_like(x) * 1e-2
    (second,) = torch.autograd.grad(slope(x), x)
    seen = slope((x + step).detach().requires_grad_()) - slope((x - step).detach().requires_grad_())
    torch.testing.assert_close(2 * (second * step).sum(), seen, rtol=0.02, atol=1e-3)
