"""What linear layers compute with: weights in four bits as bitsandbytes stores them, and those of a LoRA layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class FourBitWeight:
    """A frozen matrix W [n, k], two weights a byte, in blocks with a scale each (Dettmers et al. 2023,
    arXiv:2305.14314, section 3); the bytes are those of bitsandbytes.

    W.flatten()[i] = code[nibble i] · scale[i // block], the high nibble of a byte first, where scale is `absmax`, or,
    nested, nested_code[absmax[j]] · nested_absmax[j // nested_block] + offset.
    """

    packed: Tensor
    """The bytes, ⌈n·k / 2⌉ of them, contiguous, under any dtype and shape: what shards and gathers may need it as
    bfloat16 numbers. Looked at when the weight is needed, so that it may be gathered between forward and backward."""
    absmax: Tensor
    """float32 or, nested, uint8 [⌈n·k / block⌉]."""
    shape: tuple[int, int]
    """(n, k)."""
    dtype: torch.dtype
    """What it is dequantized to."""
    kind: Literal["nf4", "fp4"] = "nf4"
    block: int = 64
    nested_absmax: Tensor | None = None
    """float32 [⌈blocks / nested_block⌉]."""
    offset: Tensor | None = None
    """float32 scalar."""
    nested_block: int = 256

    @property
    def bytes(self) -> Tensor:
        """uint8 [⌈n·k / 2⌉], where `packed` lies now."""
        return self.packed.detach().view(torch.uint8).view(-1)

    @classmethod
    def from_bitsandbytes(cls, packed: Tensor, state: Any) -> FourBitWeight:
        """Of what `bitsandbytes.functional.quantize_4bit` returns."""
        nested = state.state2
        return cls(
            packed, state.absmax, (state.shape[0], state.shape[1]), state.dtype, state.quant_type, state.blocksize,
            None if nested is None else nested.absmax, state.offset if nested is not None else None,
            256 if nested is None else nested.blocksize,
        )  # fmt: skip

    def to_bitsandbytes(self) -> Any:
        """The `bitsandbytes.functional.QuantState` that goes with `packed`: the inverse of `from_bitsandbytes`."""
        from bitsandbytes.functional import QuantState

        from shardtune_kernels.reference import CODES, nested_code

        device, outer = self.absmax.device, None
        if self.nested_absmax is not None:
            outer = QuantState(
                absmax=self.nested_absmax, code=nested_code().to(device), blocksize=self.nested_block,
                dtype=torch.float32,
            )  # fmt: skip
        return QuantState(
            absmax=self.absmax, shape=torch.Size(self.shape), code=torch.tensor(CODES[self.kind], device=device),
            blocksize=self.block, quant_type=self.kind, dtype=self.dtype, offset=self.offset, state2=outer,
        )  # fmt: skip


class LoraWeights(NamedTuple):
    """A linear layer with a low-rank adapter (Hu et al. 2021, arXiv:2106.09685): y = W x + bias + scale · B A x."""

    weight: Tensor | FourBitWeight
    """[n, k]; a tensor may be trained."""
    bias: Tensor | None = None
    """[n]."""
    a: Tensor | None = None
    """[r, k], of any floating dtype; None: no adapter."""
    b: Tensor | None = None
    """[n, r]."""
    scale: float = 1.0
