"""Fused operations for fine-tuning, usable without shardtune: every op is a function of this package.

On a GPU they are Triton kernels; with TRITON_INTERPRET=1 the same kernels run on a CPU, slowly, in Triton's
interpreter; elsewhere plain torch computes the same. `reference.py` says what each computes, in a few lines of torch.

Shape legend: b batch, s length of queries, t length of keys, h heads, d width, k and n a linear layer's inputs and
outputs, m rows (all tokens), v vocabulary, r rank of LoRA.
"""

from shardtune_kernels.biased_attention import biased_attention
from shardtune_kernels.four_bit import four_bit_linear, nf4_dequantize
from shardtune_kernels.gated_activation import gated_activation
from shardtune_kernels.layer_norm import layer_norm
from shardtune_kernels.linear_cross_entropy import linear_cross_entropy
from shardtune_kernels.lora_gated_mlp import lora_gated_mlp
from shardtune_kernels.lora_linear import lora_linear, lora_qkv
from shardtune_kernels.padding import pack, pad, unpad
from shardtune_kernels.rms_norm import rms_norm
from shardtune_kernels.rope import rope
from shardtune_kernels.weights import FourBitWeight, LoraWeights

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
__all__ = [
    "OPS", "FourBitWeight", "LoraWeights", "biased_attention", "four_bit_linear", "gated_activation", "layer_norm",
    "linear_cross_entropy", "lora_gated_mlp", "lora_linear", "lora_qkv", "nf4_dequantize", "pack", "pad", "rms_norm",
    "rope", "unpad",
]  # fmt: skip
