"""Triton's interpreter cuts float32 off to bfloat16; GPUs round to the nearest, ties to even, and so it must."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest() -> None:
    """From now on in this process; the way back to float32 is made fast, too."""
    others = interpreter._convert_float
    if getattr(others, "rounds_to_nearest", False):
        return

    def convert(given: Any, input_dtype: tl.dtype, output_dtype: tl.dtype, rounding_mode: Any) -> Any:
        if input_dtype == tl.bfloat16 and output_dtype == tl.float32:
            return given.view(np.uint16).astype(np.uint32) << 16
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return others(given, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(given, np.float32).view(np.uint32).astype(np.uint64).reshape(given.shape)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(given), (bits >> 16) | 0x40, nearest).astype(np.uint16)

    convert.rounds_to_nearest = True  # pyright: ignore[reportFunctionMemberAccess]
    interpreter._convert_float = convert  # pyright: ignore[reportAttributeAccessIssue]
