"""act(gate) · up."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import jit, on_triton, writes
from shardtune_kernels._rows import rows_of

BLOCK = 2048
WARPS = 8
"""8 elements of a thread: one load of 16 bytes from each operand in 16 bits."""


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up, all of one shape [..., f]; in float32 inside, the result in the dtype that torch promotes to.

    activation: silu (SwiGLU), gelu or gelu_tanh (GEGLU), relu (ReGLU) (Shazeer 2020, arXiv:2002.05202). gate and up
    may be halves [..., :f] and [..., f:] of one tensor: rows are read where they lie. Only the inputs are kept for
    backward.

    Raises:
        ValueError: an unknown activation, or shapes that differ.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if not _has_kernel(gate, up):
        return reference.gated_activation(gate, up, activation)
    return _GatedActivation.apply(gate, up, activation)


class _GatedActivation(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activated(gate, up, activation)

    @staticmethod
    @once
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = ctx.needs_input_grad[:2]
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if of_gate else None
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if of_up else None
        dh_mf, gate_mf, up_mf = _as_rows(dh, gate, up)
        _backward(dh_mf, gate_mf, up_mf, dgate, dup, ctx.activation)
        return dgate, dup, None


def activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The value, without a gradient."""
    if not _has_kernel(gate, up):
        return reference.gated_activation(gate, up, activation)
    h = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    gate_mf, up_mf = _as_rows(gate, up)
    _forward(gate_mf, up_mf, h, activation)
    return h


def overwrite_with_gradients(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: gate becomes its gradient, up too, and dh becomes act(gate) · up. All three are contiguous."""
    if _has_kernel(gate, up):
        _backward_in_place(dh.view(1, -1), gate.view(1, -1), up.view(1, -1), activation)
        if not torch.compiler.is_compiling():  # so that autograd notices where they are used once more
            torch.autograd.graph.increment_version([dh, gate, up])
        return
    act = reference.ACTIVATIONS[activation](gate)
    dact, dup = dh * up, dh * act
    torch.mul(act, up, out=dh)
    up.copy_(dup)
    if activation == "silu":
        gate.copy_(torch.ops.aten.silu_backward(dact, gate))
    elif activation == "relu":
        gate.copy_(torch.ops.aten.threshold_backward(dact, gate, 0))
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        gate.copy_(torch.ops.aten.gelu_backward(dact, gate, approximate=how))


def _has_kernel(gate: Tensor, up: Tensor) -> bool:
    return on_triton(gate) and torch.float64 not in (gate.dtype, up.dtype)


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    """Each as [m, f], and as one row where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows_of(tensor) for tensor in tensors]


@writes("h")
def _forward(gate: Tensor, up: Tensor, h: Tensor, activation: str) -> None:
    """gate and up [m, f]; h contiguous."""
    rows, width = gate.shape
    if gate.numel() == 0:
        return
    _forward_kernel[(rows * triton.cdiv(width, BLOCK),)](
        gate, up, h, width, gate.stride(0), up.stride(0), ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS
    )


@writes("dgate", "dup")
def _backward(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None, activation: str) -> None:
    """dh, gate and up [m, f]; dgate and dup contiguous."""
    if gate.numel():
        _start_backward(dh, gate, up, dgate, dup, None, activation)


@writes("dh", "gate", "up")
def _backward_in_place(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """All [1, n]."""
    if gate.numel():
        _start_backward(dh, gate, up, gate, up, dh, activation)


def _start_backward(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None, h: Tensor | None, activation: str
) -> None:
    rows, width = gate.shape
    _backward_kernel[(rows * triton.cdiv(width, BLOCK),)](
        dh, gate, up, dgate, dup, h, width, dh.stride(0), gate.stride(0), up.stride(0),
        ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@jit
def _act(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative, of which the compiler drops what is not used."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
        act = x * share
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        act = x * share
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 is the sigmoid of 2 z
        square = x * x
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * square)
        act = x * share
    else:
        slope = tl.where(x > 0.0, 1.0, 0.0)
        act = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return act, slope


@jit
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program: BLOCK columns of a row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside).to(tl.float32)
    act, _ = _act(gate, ACTIVATION)
    tl.store(h_ptr + row * width + column, act * up, mask=inside)


@jit
def _backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, width, dh_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK columns of a row; each element is read before it is written, so it may be in place."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside).to(tl.float32)
    act, slope = _act(gate, ACTIVATION)
    out = row * width + column
    if dgate_ptr is not None:
        tl.store(dgate_ptr + out, dh * up * slope, mask=inside)
    if dup_ptr is not None:
        tl.store(dup_ptr + out, dh * act, mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + out, act * up, mask=inside)


def _builds() -> list[Build]:
    forward = {**dict.fromkeys(["gate_ptr", "up_ptr", "h_ptr"], "*{dtype}"), "width": "i32"}
    forward |= {"gate_stride": "i32", "up_stride": "i32"}
    backward = dict.fromkeys(["dh_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "h_ptr"], "*{dtype}")
    backward |= {"width": "i32", "dh_stride": "i32", "gate_stride": "i32", "up_stride": "i32"}
    builds = []
    for activation in reference.ACTIVATIONS:
        constants = {"ACTIVATION": activation, "BLOCK": BLOCK}
        for name, kernel, signature in (
            ("forward", _forward_kernel, forward), ("backward", _backward_kernel, backward),
        ):  # fmt: skip
            aligned = tuple(argument for argument, kind in signature.items() if kind == "i32")
            builds.append(
                Build(f"gated_activation {name}, {activation}", kernel, signature, constants, WARPS, aligned=aligned)
            )
    return builds


BUILDS = _builds()
