"""Fused operations for fine-tuning, usable without shardtune: every op is a function of this package.

On a GPU they are Triton kernels; with TRITON_INTERPRET=1 the same kernels run on a CPU, slowly, in Triton's
interpreter; elsewhere plain torch computes the same. `reference.py` says what each computes, in a few lines of torch.

Shape legend: b batch, s length of queries, t length of keys, h heads, d width, k and n a linear layer's inputs and
outputs, m rows (all tokens), v vocabulary, r rank of LoRA.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardtune_kernels.biased_attention import biased_attention as biased_attention
    from shardtune_kernels.four_bit import four_bit_linear as four_bit_linear
    from shardtune_kernels.four_bit import nf4_dequantize as nf4_dequantize
    from shardtune_kernels.gated_activation import gated_activation as gated_activation
    from shardtune_kernels.layer_norm import layer_norm as layer_norm
    from shardtune_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from shardtune_kernels.lora_gated_mlp import lora_gated_mlp as lora_gated_mlp
    from shardtune_kernels.lora_linear import lora_linear as lora_linear
    from shardtune_kernels.lora_linear import lora_qkv as lora_qkv
    from shardtune_kernels.padding import pack as pack
    from shardtune_kernels.padding import pad as pad
    from shardtune_kernels.padding import unpad as unpad
    from shardtune_kernels.rms_norm import rms_norm as rms_norm
    from shardtune_kernels.rope import rope as rope
    from shardtune_kernels.weights import FourBitWeight as FourBitWeight
    from shardtune_kernels.weights import LoraWeights as LoraWeights

OPS = {
    "lora_linear": "lora_linear",
    "lora_qkv": "lora_linear",
    "lora_gated_mlp": "lora_gated_mlp",
    "nf4_dequantize": "four_bit",
    "four_bit_linear": "four_bit",
    "linear_cross_entropy": "linear_cross_entropy",
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "rope": "rope",
    "gated_activation": "gated_activation",
    "biased_attention": "biased_attention",
    "pad": "padding",
    "unpad": "padding",
    "pack": "padding",
}
"""Every op and the module it is in."""
_MODULES = {**OPS, "FourBitWeight": "weights", "LoraWeights": "weights"}


class _Package(ModuleType):
    """Importing a module sets it as an attribute of its package; an op of the same name must stay the op."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Loads an op's module when the op is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
