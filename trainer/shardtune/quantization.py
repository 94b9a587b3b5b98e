"""How frozen weights are stored in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantization:
    """What frozen linear layers are stored as; the layers inside a model's stacks, never its output or a head."""

    kind: Literal["nf4", "fp4", "int8"]
    """4-bit normal floats, 4-bit floats (both in blocks of 64 with a scale each), or LLM.int8 (a scale a row)."""
    double: bool = True
    """Of the 4-bit kinds: store the scales in 8 bits, in blocks of 256 with a scale each."""

    def round_trip(self, matrix: Tensor) -> Tensor:
        """What a model that stores `matrix` [out, in] so computes with: the same shape, dtype and device."""
        import bitsandbytes.functional as bnb

        if self.kind == "int8":
            stored, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
            return bnb.int8_vectorwise_dequant(stored, scales).to(matrix.dtype)
        packed, state = bnb.quantize_4bit(matrix.contiguous(), quant_type=self.kind, compress_statistics=self.double)
        return bnb.dequantize_4bit(packed, state)
