"""Linear layers as the fused operations read them: with an adapter of PEFT's or without, dense or in four bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardtune_kernels import LoraWeights

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
    """Whether this is a linear layer with an adapter of PEFT's low-rank family: of modules A and B, as AdaLoRA's are
    not."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "lora_variant")


def base_of(module: nn.Module) -> Any:
    """The layer itself, without its adapter."""
    return module.base_layer if has_adapter(module) else module


def is_four_bit(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in four bits."""
    return hasattr(base_of(module), "four_bit")


class Layer:
    """A linear layer as an operation reads it: what it needs is found once, as looking for it costs as much as a small
    product does; parameters are looked up at each call."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.base: Any = base_of(module)
        self._four_bit = getattr(self.base, "four_bit", None)
        self._adapted = has_adapter(module)
        if self._adapted:
            name = self.module.active_adapters[0]
            self._a, self._b = self.module.lora_A[name], self.module.lora_B[name]
            self._scaling, self._name = self.module.scaling, name
            self._dropout = getattr(self.module.lora_dropout[name], "p", 0.0)

    def weights(self) -> LoraWeights:
        """The parameters as they are now."""
        own = self.base._parameters
        weight = own["weight"] if self._four_bit is None else self._four_bit()
        if not self._adapted:
            return LoraWeights(weight, own.get("bias"))
        a, b = self._a._parameters["weight"], self._b._parameters["weight"]
        return LoraWeights(weight, own.get("bias"), a, b, self._scaling[self._name])

    def dropout(self) -> float:
        """The rate at which the adapter's inputs are dropped now."""
        return self._dropout if self._adapted and self.module.training else 0.0

    def is_plain(self) -> bool:
        """Whether the adapter counts now: it is neither switched off nor part of the weight."""
        return not self._adapted or not (self.module._disable_adapters or self.module.merged_adapters)

    def cast(self, x: Tensor) -> Tensor:
        """The input in what the layer multiplies in: autocast's dtype, or that of a quantized weight."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return x.to(torch.get_autocast_dtype(device))
        return x if self._four_bit is None else x.to(self.base.compute_dtype)


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
