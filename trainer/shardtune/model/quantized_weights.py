"""The stored bits of quantized layers, from the values they stand for: any range of them, in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardtune.model.quantized import BLOCK, NESTED_BLOCK, Linear4bit, Linear8bit, QuantizedLinear
from shardtune.protocols import Weights

PIECE = 1 << 21
"""Weights quantized at once: bounds what loading holds beside the stored bits."""


class QuantizedWeights:
    """Implements the Weights protocol for a model with quantized layers, over the values they are made from.

    A range of a quantized parameter is read from the blocks or rows that it lies in, and their scales are noted. No
    full-precision matrix is held.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, device: torch.device, over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """`device`: where to quantize; `over_ranks`: the elementwise maximum over all ranks, a collective."""
        self._weights = weights
        self._device = device
        self._over_ranks = over_ranks
        self._layers = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
        }
        self._scales: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Of a quantized parameter the layer's compute dtype, in whose numbers the bits are stored."""
        layer = self._layers.get(name)
        return self._weights.dtype(name) if layer is None else layer.compute_dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter as it is stored, 1-D."""
        layer = self._layers.get(name)
        if layer is None:
            return self._weights.read(name, start, stop)
        size = layer.compute_dtype.itemsize
        first, last = start * size, stop * size  # bytes
        out = torch.empty(last - first, dtype=torch.uint8, device=self._device)
        unit = BLOCK if isinstance(layer, Linear4bit) else layer.in_features
        a_byte = 2 if isinstance(layer, Linear4bit) else 1
        total = layer.in_features * layer.out_features
        begin = first * a_byte // unit * unit
        step = max(PIECE // unit, 1) * unit
        for low in range(begin, min(-(-last * a_byte // unit) * unit, total), step):
            high = min(low + step, total, -(-last * a_byte // unit) * unit)
            values = self._weights.read(name, low, high).to(self._device, layer.compute_dtype)
            stored, scales = _quantized(layer, values)
            self._noted(name, layer)[low // unit : -(-high // unit)] = scales
            byte = low // a_byte
            inner = slice(max(first, byte), min(last, byte + len(stored)))
            out[inner.start - first : inner.stop - first] = stored[inner.start - byte : inner.stop - byte]
        return out.view(layer.compute_dtype)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The scales of layer `name`, all of them, after its bits were read.

        A collective: ranks have read different ranges.
        """
        name = f"{name}.weight"
        layer = self._layers[name]
        scales = self._over_ranks(self._noted(name, layer))
        del self._scales[name]
        if not (isinstance(layer, Linear4bit) and layer.nested):
            return {"absmax": scales}
        import bitsandbytes.functional as bnb

        offset = scales.mean()
        absmax, nested = bnb.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        return {"absmax": absmax, "nested_absmax": nested.absmax, "offset": offset}

    def _noted(self, name: str, layer: QuantizedLinear) -> Tensor:
        if name not in self._scales:
            count = layer.out_features if isinstance(layer, Linear8bit) else layer.in_features * layer.out_features
            count = count if isinstance(layer, Linear8bit) else -(-count // BLOCK)
            self._scales[name] = torch.zeros(count, device=self._device)
        return self._scales[name]


def _quantized(layer: QuantizedLinear, values: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes and the scales of whole blocks or rows."""
    import bitsandbytes.functional as bnb

    if isinstance(layer, Linear4bit):
        stored, state = bnb.quantize_4bit(values, blocksize=BLOCK, quant_type=layer.kind)
        return stored.view(-1), state.absmax
    rows, absmax, _ = bnb.int8_vectorwise_quant(values.view(-1, layer.in_features).half())
    return rows.view(torch.uint8).view(-1), absmax.float()
