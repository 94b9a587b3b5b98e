"""Linear layers as the fused operations read them: with an adapter of PEFT's or without, dense or in four bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardtune_kernels import FourBitWeight, LoraWeights

BLOCK = 64
"""Weights in four bits that share a scale. On a CPU bitsandbytes 0.50 takes every row to begin a block, and so reads a
matrix whose even row length is no multiple of it otherwise than on a GPU."""


def refusal(module: nn.Module, device: torch.device) -> str | None:
    """Why a layer cannot be fused on a device; None where it can."""
    if _has_hooks(module):
        return "has hooks"
    if not has_adapter(module):
        return _refused_base(module, device)
    lora: Any = module
    if len(lora.active_adapters) != 1 or lora.active_adapters[0] not in lora.lora_A:
        return "not one adapter"
    name = lora.active_adapters[0]
    if lora.lora_variant.get(name) is not None:
        return type(lora.lora_variant[name]).__name__.removesuffix("LinearVariant") + " computes otherwise"
    if lora.lora_bias.get(name):
        return "its adapter has a bias"
    if lora.fan_in_fan_out:
        return "stored the other way round"
    if not isinstance(lora.lora_dropout[name], nn.Identity | nn.Dropout):
        return "unknown dropout"
    return _refused_base(lora.base_layer, device)


def has_adapter(module: nn.Module) -> bool:
    """Whether this is a linear layer with an adapter of PEFT's low-rank family."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer") and hasattr(module, "lora_variant")


def base_of(module: nn.Module) -> Any:
    """The layer itself, without its adapter."""
    return module.base_layer if has_adapter(module) else module


def is_four_bit(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in four bits."""
    return hasattr(base_of(module), "four_bit")


def weights_of(module: nn.Module) -> LoraWeights:
    """The layer's parameters as they are now."""
    base = base_of(module)
    weight: Tensor | FourBitWeight = base.four_bit() if hasattr(base, "four_bit") else base.weight
    if base is module:
        return LoraWeights(weight, base.bias)
    lora: Any = module
    name = lora.active_adapters[0]
    return LoraWeights(weight, base.bias, lora.lora_A[name].weight, lora.lora_B[name].weight, lora.scaling[name])


def dropout_of(module: nn.Module) -> float:
    """The rate at which the adapter's inputs are dropped now."""
    if not module.training or not has_adapter(module):
        return 0.0
    lora: Any = module
    dropout = lora.lora_dropout[lora.active_adapters[0]]
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def is_plain(module: nn.Module) -> bool:
    """Whether the adapter counts now: it is neither switched off nor part of the weight."""
    lora: Any = module
    return not has_adapter(module) or not (lora.disable_adapters or lora.merged)


def compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer multiplies in: autocast's dtype, that of a quantized weight, or that of the input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return base_of(module).compute_dtype if is_four_bit(module) else x.dtype


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """From now on `module(…)` is `forward(module, its old forward, …)`."""
    module.forward = partial(forward, module, module.forward)


def _refused_base(base: Any, device: torch.device) -> str | None:
    if _has_hooks(base):
        return "has hooks"
    if hasattr(base, "four_bit") and device.type == "cpu" and base.in_features % BLOCK and base.in_features % 2 == 0:
        return f"bitsandbytes reads rows of {base.in_features} otherwise on a CPU"
    if type(base) is nn.Linear or hasattr(base, "four_bit"):
        return None
    return f"is a {type(base).__name__}"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
