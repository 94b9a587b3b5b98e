"""Norms, rotary positions and gated activations in bfloat16: one JSON line.

Each forward, and forward and backward, beside plain torch and Liger; bytes a second are of what must be read and
written at least, and the share is of what a copy reaches on the same GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _gpu_timing import DEVICE, ON_GPU, copy_bandwidth, error, header, in_turn, installed, parser, ratio, report
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import reference

Op = Callable[..., Any]
SIZE = torch.bfloat16.itemsize


class Case(NamedTuple):
    name: str
    op: str
    """Of shardtune_kernels, and of the reference."""
    tensors: dict[str, Tensor]
    trained: tuple[str, ...]
    """Those that get a gradient."""
    options: dict[str, Any]
    moved: tuple[int, int]
    """Numbers read and written: forward, backward."""
    liger: Op | None
    """Takes the tensors by name."""
    liger_backward: bool = True
    """False: it writes over its inputs, so that it cannot run twice."""


def main() -> None:
    given = parser(__doc__).parse_args()
    line = header("gpu_pointwise", ["liger-kernel"])
    check(cases(True))
    bandwidth = copy_bandwidth()
    found = []
    for case in cases(given.small):
        for backward in (False, True):
            bytes_ = SIZE * (sum(case.moved) if backward else case.moved[0])
            work = {name: None if op is None else step(case, op, backward) for name, op in sides(case).items()}
            if backward and not case.liger_backward:
                work["liger"] = None
            times = in_turn(work, *((2, 1) if given.small else (given.rounds, 5)))
            speeds = {n: None if t is None else bytes_ / t * 1e3 for n, t in times.items()} if ON_GPU else {}
            found.append({
                "case": case.name, "what": "forward and backward" if backward else "forward", "milliseconds": times,
                "ratio": {name: ratio(times, name) for name in ("eager", "liger")}, "bytes": bytes_,
                "gigabytes_per_second": {name: None if s is None else s / 1e9 for name, s in speeds.items()},
                "share_of_copy": {n: s / bandwidth for n, s in speeds.items() if s is not None and bandwidth},
            })  # fmt: skip
    report({**line, "copy_bytes_per_second": bandwidth, "cases": found})


def cases(small: bool) -> list[Case]:
    """Shapes of an 8B model and 8192 tokens; small ones to try it out, and to compare values."""
    torch.manual_seed(0)
    m, d, f = (6, 40, 70) if small else (8192, 4096, 14_336)
    batch, length, heads, groups, width = (2, 3, 4, 2, 16) if small else (4, 2048, 32, 8, 128)
    x, residual, gate, up = (random(m, n) for n in (d, d, f, f))
    norm = {"x": x, "weight": random(d)}
    made = []
    for trained in ((), ("weight",)):
        said = "weight trained" if trained else "weight frozen"
        made += [
            Case(f"rms_norm, {said}", "rms_norm", norm, ("x", *trained), {"eps": 1e-6}, (2 * m * d, 3 * m * d),
                 liger("rms_norm", "LigerRMSNormFunction", lambda f: rms_norm_of(f))),
            Case(f"rms_norm with a residual, {said}", "rms_norm", {**norm, "residual": residual},
                 ("x", "residual", *trained), {"eps": 1e-6}, (4 * m * d, 4 * m * d), None),
        ]  # fmt: skip
    layer = {**norm, "bias": random(d)}
    made.append(Case(
        "layer_norm", "layer_norm", layer, tuple(layer), {"eps": 1e-5}, (2 * m * d, 3 * m * d),
        liger("layer_norm", "LigerLayerNormFunction", lambda f: partial(in_order, f, ("x", "weight", "bias"), 1e-5)),
    ))  # fmt: skip
    q, k = (random(batch, length, count, width).transpose(1, 2) for count in (heads, groups))
    angles = torch.rand(1, length, width, device=DEVICE) * 6.28
    turned = {"q": q, "k": k, "cos": angles.cos().to(q.dtype), "sin": angles.sin().to(q.dtype)}
    both = 2 * (q.numel() + k.numel())
    made.append(Case(
        "rope", "rope", turned, ("q", "k"), {}, (both, both),
        liger("rope", "LigerRopeFunction", lambda f: partial(in_order, f, ("q", "k", "cos", "sin"))),
        liger_backward=False,
    ))  # fmt: skip
    for activation, name in (("silu", "swiglu.LigerSiLUMulFunction"), ("gelu_tanh", "geglu.LigerGELUMulFunction")):
        made.append(Case(
            f"gated_activation, {activation}", "gated_activation", {"gate": gate, "up": up}, ("gate", "up"),
            {"activation": activation}, (3 * m * f, 5 * m * f),
            liger(*name.split("."), lambda f: partial(in_order, f, ("gate", "up"))), liger_backward=False,
        ))  # fmt: skip
    return made


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def liger(module: str, name: str, made: Callable[[Any], Op]) -> Op | None:
    """A function of autograd of Liger's, called as `made` says."""
    if not ON_GPU or installed("liger-kernel") is None:
        return None
    return made(getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name))


def rms_norm_of(function: Any) -> Op:
    """Not in place, as it would write over the gradient that it is given."""
    return lambda **given: function.apply(given["x"], given["weight"], 1e-6, 0.0, "llama", False)


def in_order(function: Any, names: tuple[str, ...], *more: float, **given: Tensor) -> Any:
    return function.apply(*(given[name] for name in names), *more)


def sides(case: Case) -> dict[str, Op | None]:
    return {
        "ours": partial(getattr(shardtune_kernels, case.op), **case.options),
        "eager": partial(getattr(reference, case.op), **case.options),
        "liger": case.liger,
    }


def step(case: Case, op: Op, backward: bool) -> Callable[[], None]:
    """One call; with gradients of what is trained."""
    leaves = {n: t.detach().requires_grad_(backward and n in case.trained) for n, t in case.tensors.items()}
    wanted = [leaves[name] for name in case.trained]
    with torch.no_grad():
        outputs = as_tuple(op(**leaves))
    gradients = [torch.randn_like(output) for output in outputs]
    del outputs

    def once() -> None:
        with torch.set_grad_enabled(backward):
            outputs = as_tuple(op(**leaves))
        if backward:
            torch.autograd.grad(outputs, wanted, gradients)

    return once


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(small: list[Case]) -> None:
    """Ends the run if an output or a gradient, in any dtype, is further off than it may be."""
    for case in small:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            given = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
            ours, eager = (sides(case)[name] for name in ("ours", "eager"))
            got, plain = (results(case, op, given) for op in (ours, eager))
            exact = results(case, eager, {name: tensor.double() for name, tensor in given.items()})
            for g, p, e in zip(got, plain, exact, strict=True):
                allowed = 1e-5 if dtype == torch.float32 else max(1.5 * error(p, e), 1e-5)
                if error(g, e) > allowed:
                    raise SystemExit(f"gpu_pointwise: {case.name} in {dtype} is off by {error(g, e):.3g}")


def results(case: Case, op: Op | None, given: dict[str, Tensor]) -> list[Tensor]:
    assert op is not None
    leaves = {name: tensor.detach().requires_grad_(name in case.trained) for name, tensor in given.items()}
    outputs = as_tuple(op(**leaves))
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs
    ]  # fmt: skip
    return [
        *(o.detach() for o in outputs),
        *torch.autograd.grad(outputs, [leaves[name] for name in case.trained], gradients),
    ]


if __name__ == "__main__":
    main()
