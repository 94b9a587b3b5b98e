"""How kernels are started: on a GPU, in Triton's interpreter, or not at all; and inside of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import triton
import triton.knobs
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run on the CPU, one program after the other (TRITON_INTERPRET=1 when triton was first imported)."""
if INTERPRETED:
    from shardtune_kernels._interpreter import round_to_nearest

    round_to_nearest()
Launch = TypeVar("Launch", bound=Callable[..., None])
jit: Any = triton.jit
"""As Any: what it makes is started with options, num_warps and the like, that are no parameters of the kernel."""


def on_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels; else they are plain torch."""
    return tensor.is_cuda or INTERPRETED


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have on a device: 64 KB on 7.5, 99 on 8.6, 8.9 and 12.0, 163 on 8.0, 227 on 9.0."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of `tl.dot` are cast to: their own dtype, but float32 for bfloat16 in the interpreter, which
    multiplies bfloat16 wrongly. Products of bfloat16 numbers are exact in float32, so the sum is that of a GPU."""
    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else names[dtype]


def writes(*outputs: str) -> Callable[[Launch], Launch]:
    """Of a function that starts kernels which write into its arguments `outputs`, and returns None.

    torch.compile takes the call for one opaque operation; without it, it is the function itself. It runs with the GPU
    of its first tensor on one as the current one, which Triton launches on.
    """

    def wrap(function: Launch) -> Launch:
        def there(*arguments: Any, **named: Any) -> None:
            given = (*arguments, *named.values())
            first = next((value for value in given if isinstance(value, Tensor) and value.is_cuda), None)
            if first is not None and first.device.index != torch.cuda.current_device():
                with torch.cuda.device_of(first):
                    function(*arguments, **named)
            else:
                function(*arguments, **named)

        name = f"{function.__module__}.{function.__qualname__}".replace(".", "_")
        schema = torch.library.infer_schema(function, mutates_args=outputs)
        opaque = torch.library.custom_op(f"shardtune_kernels::{name}", there, mutates_args=outputs, schema=schema)
        opaque.register_fake(lambda *arguments, **named: None)

        @wraps(function)
        def start(*arguments: Any, **named: Any) -> None:
            if torch.compiler.is_compiling():
                opaque(*arguments, **named)
            else:
                there(*arguments, **named)

        return cast(Launch, start)

    return wrap


def power_of_two(size: int, at_least: int = 16, at_most: int = 1 << 30) -> int:
    """The smallest power of two that holds `size`, within bounds: the width of a block."""
    return max(at_least, min(at_most, 1 << max(size - 1, 0).bit_length()))


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)
