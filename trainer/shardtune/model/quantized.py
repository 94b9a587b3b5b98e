"""Frozen linear layers in 4 or 8 bits (Dettmers et al. 2023, arXiv:2305.14314; 2022, arXiv:2208.07339).

The numbers are bitsandbytes': the same stored bits and the same products. What is our own is where the bits lie: in a
plain parameter that a strategy splits and gathers like any other, with the scales as buffers beside it, and in a
backward pass that looks the weight up when it comes to it, so that a gathered one is not kept until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.model.initialization import Recorder
from shardtune.quantization import Quantization

if TYPE_CHECKING:  # takes seconds to import
    from bitsandbytes.functional import QuantState

    from shardtune_kernels import FourBitWeight

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one; bitsandbytes' defaults, which other tools load with."""
OUTLIER = 6.0
"""LLM.int8: inputs above it are multiplied in 16 bits, outside of training."""


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with a frozen W [d_out, d_in]; x and y [..., d_in] and [..., d_out] in the compute dtype.

    `weight`: the stored bits as numbers of the compute dtype, [n, 1]: what a strategy shards has one dtype.
    """

    weight: Any

    def __init__(self, linear: nn.Linear, bits: int, compute_dtype: torch.dtype, where: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        stored_bits, width = self.in_features * self.out_features * bits, 8 * compute_dtype.itemsize
        if stored_bits % width:
            raise ConfigError(
                f"tuning.quantization: {where} is {self.out_features} x {self.in_features}, which does not fill whole "
                f"numbers of {width} bits; choose tuning.method: lora"
            )
        stored = torch.empty(stored_bits // width, 1, dtype=compute_dtype, device="meta")
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.weight.unpacked_shape = linear.weight.shape  # pyright: ignore[reportAttributeAccessIssue]
        self.bias = linear.bias

    def _scale(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)

    @property
    def W_q(self) -> nn.Parameter:
        """The stored bits."""
        return self.weight

    def dequantize(self) -> Tensor:
        """W [d_out, d_in] in the compute dtype."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b without a gradient."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _Product.apply(input.to(self.compute_dtype), bias, self).to(input.dtype)  # pyright: ignore


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """Keeps the layer, not its weight."""
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dL/dx = dL/dy W, and dL/db = Σ dL/dy."""
        (gradient,) = gradients
        for_x, for_bias, _ = ctx.needs_input_grad
        return (
            gradient @ ctx.layer.dequantize().to(gradient.dtype) if for_x else None,
            gradient.flatten(0, -2).sum(0) if for_bias else None,
            None,
        )


class Linear4bit(QuantizedLinear):
    """Two weights a byte, in blocks of 64 with a scale each: buffer `absmax`, float32, or uint8 with nested scales.

    `nested_absmax` (float32, one for 256 scales) and `offset` (float32, their mean) are there in the latter case.
    """

    def __init__(self, linear: nn.Linear, quantization: Quantization, compute_dtype: torch.dtype, where: str) -> None:
        super().__init__(linear, 4, compute_dtype, where)
        assert quantization.kind != "int8"
        self.kind: Literal["nf4", "fp4"] = quantization.kind
        self.nested = quantization.double
        blocks = -(-linear.weight.numel() // BLOCK)
        self._scale("absmax", (blocks,), torch.uint8 if self.nested else torch.float32)
        if self.nested:
            self._scale("nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32)
            self._scale("offset", (), torch.float32)

    def dequantize(self) -> Tensor:
        """W [d_out, d_in] in the compute dtype."""
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(self.weight.detach().view(torch.uint8).view(-1, 1), self._state())

    def four_bit(self) -> FourBitWeight:
        """The stored bits and scales as the fused operations read them, where they lie now."""
        from shardtune_kernels import FourBitWeight

        buffers: Any = self._buffers
        return FourBitWeight(
            self.weight, buffers["absmax"], (self.out_features, self.in_features), self.compute_dtype, self.kind,
            BLOCK, buffers.get("nested_absmax"), buffers.get("offset"), NESTED_BLOCK,
        )  # fmt: skip

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' product."""
        import bitsandbytes

        packed = self.weight.detach().view(torch.uint8).view(-1, 1)
        return bitsandbytes.matmul_4bit(x, packed, self._state(), bias=bias)

    def _state(self) -> QuantState:
        """The scales as bitsandbytes takes them; made anew where a buffer was replaced."""
        from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

        known = self.__dict__.get("_known_state")
        absmax: Tensor = self._buffers["absmax"]  # pyright: ignore[reportAssignmentType]
        if known is None or known.absmax is not absmax:
            nested = None
            if self.nested:
                code = create_dynamic_map().to(absmax.device)
                nested = QuantState(
                    absmax=self._buffers["nested_absmax"], blocksize=NESTED_BLOCK, code=code, dtype=torch.float32
                )
            known = QuantState(
                absmax=absmax, shape=torch.Size((self.out_features, self.in_features)), dtype=self.compute_dtype,
                code=get_4bit_type(self.kind, device=absmax.device), blocksize=BLOCK, quant_type=self.kind,
                offset=self._buffers.get("offset"), state2=nested,
            )  # fmt: skip
            self.__dict__["_known_state"] = known
        return known


class Linear8bit(QuantizedLinear):
    """A signed byte for each weight; buffer `absmax`, float32 [d_out]: the largest magnitude of each row."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype, where: str) -> None:
        super().__init__(linear, 8, compute_dtype, where)
        self._scale("absmax", (self.out_features,), torch.float32)

    def dequantize(self) -> Tensor:
        """W [d_out, d_in] in the compute dtype."""
        absmax: Tensor = self._buffers["absmax"]  # pyright: ignore[reportAssignmentType]
        # In place: rounded once to the compute dtype, as in bitsandbytes' product.
        return self._bytes().to(self.compute_dtype).mul_(absmax.unsqueeze(1) * (1.0 / 127.0))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' product: outside of training, inputs below the outliers are rounded to 8 bits as well."""
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = self._bytes(), self._buffers["absmax"]
        state.threshold, state.has_fp16_weights, state.is_training = OUTLIER, False, self.training
        return bitsandbytes.matmul(x, self._bytes(), bias=bias, state=state)

    def _bytes(self) -> Tensor:
        return self.weight.detach().view(torch.int8).view(self.out_features, self.in_features)


def quantize_layers(
    model: PreTrainedModel,
    task: str,
    recorder: Recorder,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    path: str,
) -> int:
    """Puts quantized layers in the place of a meta-device model's linear ones; returns how many.

    Those that transformers quantizes, too: not the output layer, nor what the architecture keeps in full precision
    (T5's `wo`); and no classification head. Raises ConfigError where there is none.
    """
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    if HEADS[task].is_new:  # the head is trained
        kept += [name for name, _ in model.named_children() if name != model.base_model_prefix]
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            raise ConfigError(
                f"tuning.method: the layers of a {model.config.model_type} model ({path}) are stored the other way "
                "round, and are not quantized here; use tuning.method: lora"
            )
        if type(module) is not nn.Linear or not should_convert_module(name, kept):
            continue
        if quantization.kind == "int8":
            fresh = Linear8bit(module, compute_dtype, name)
        else:
            fresh = Linear4bit(module, quantization, compute_dtype, name)
        recorder.replaced(module.weight, fresh.weight)
        outer, _, key = name.rpartition(".")
        setattr(model.get_submodule(outer), key, fresh)
        count += 1
    if not count:
        raise ConfigError(f"tuning.method: {path} has no linear layers to quantize; use tuning.method: lora")
    return count


def dequantize_layers(model: nn.Module) -> None:
    """Puts linear layers in float32 in the place of the quantized ones: with the same weights, one after the other."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        weight = module.dequantize().float()
        fresh = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        fresh.weight, fresh.bias = nn.Parameter(weight, requires_grad=False), module.bias
        outer, _, key = name.rpartition(".")
        setattr(model.get_submodule(outer), key, fresh)
