"""What each kernel is compiled as by default, so that it can be built for any GPU on a machine without one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Build(NamedTuple):
    """One kernel with the arguments that its op starts it with for large sizes."""

    name: str
    """Of the row in the table of resources: op, and what of it."""
    kernel: Any
    """What `triton.jit` made."""
    signature: dict[str, str]
    """Type of each argument that is no constant, in order, as Triton writes them: `*{dtype}` for a pointer to what the
    op computes in, `*fp32`, `i32`, `i64`, `fp32` …; `{dtype}` becomes bf16, or fp16 where there is no bfloat16."""
    constants: dict[str, Any]
    """Values of the `tl.constexpr` arguments; "{dtype}" stands for the Triton dtype that is computed in."""
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16, beside the pointers, which all are."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Others that Triton is given beside warps and stages, as `enable_fp_fusion`."""
