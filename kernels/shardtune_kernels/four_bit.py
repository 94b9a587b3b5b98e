"""Frozen linear layers in four bits: dequantization, and products that dequantize on the way."""

from __future__ import annotations

from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels.weights import FourBitWeight, LoraWeights


def nf4_dequantize(weight: FourBitWeight, out: Tensor | None = None) -> Tensor:
    """W [n, k] in `weight.dtype` on the device of its bytes, written to `out` if given; the kind may be fp4, too."""
    values = reference.dequantized(weight)
    return values if out is None else out.copy_(values)


def four_bit_linear(x: Tensor, weight: FourBitWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., k] -> x Wᵀ + bias [..., n] in the dtype of x, with gradients for x and bias."""
    return reference.lora_linear(x, LoraWeights(weight, bias))
