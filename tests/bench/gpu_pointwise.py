"""Norms, rotary positions and gated activations in bfloat16: one JSON line.

Each forward, and forward and backward, beside plain torch and Liger; bytes a second are of what must be read and
written at least, and the share is of what a copy reaches on the same GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _gpu_line import Absent, Benchmark, Check, Sides, errors, normal, peer
from _gpu_timing import DEVICE, Work, copy_bandwidth
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
    liger: tuple[str, Callable[[Any], Op]] | None
    """A function of autograd of Liger's by name, and how it is called with the tensors by name."""
    liger_backward: bool = True
    """False: it writes over its inputs, so that it cannot run twice."""

    def run(self, package: Any) -> Op:
        return partial(getattr(package, self.op), **self.options)

    def check(self) -> Check:
        drawn = {name: (t.shape, t.transpose(1, 2).is_contiguous() if t.dim() == 4 else False)
                 for name, t in self.tensors.items()}  # fmt: skip
        return Check(
            self.name, self.run(shardtune_kernels), self.run(reference), lambda: {
                name: torch.randn(shape).double() if not apart else
                torch.randn(shape).double().transpose(1, 2).contiguous().transpose(1, 2)
                for name, (shape, apart) in drawn.items()
            }, trained={name: name in self.trained for name in drawn},
        )  # fmt: skip


def cases(small: bool) -> list[Case]:
    """Shapes of an 8B model and 8192 tokens; small ones to try it out, and to compare values."""
    m, d, f = (6, 40, 70) if small else (8192, 4096, 14_336)
    batch, length, heads, groups, width = (2, 3, 4, 2, 16) if small else (4, 2048, 32, 8, 128)
    x, residual, gate, up = (normal(m, n) for n in (d, d, f, f))
    norm = {"x": x, "weight": normal(d)}
    made = []
    for trained in ((), ("weight",)):
        said = "weight trained" if trained else "weight frozen"
        # Not in place, as it would write over the gradient that it is given.
        liger = "LigerRMSNormFunction", partial(in_order, ("x", "weight"), (1e-6, 0.0, "llama", False))
        made += [
            Case(f"rms_norm, {said}", "rms_norm", norm, ("x", *trained), {"eps": 1e-6}, (2 * m * d, 3 * m * d), liger),
            Case(f"rms_norm with a residual, {said}", "rms_norm", {**norm, "residual": residual},
                 ("x", "residual", *trained), {"eps": 1e-6}, (4 * m * d, 4 * m * d), None),
        ]  # fmt: skip
    layer = {**norm, "bias": normal(d)}
    made.append(Case(
        "layer_norm", "layer_norm", layer, tuple(layer), {"eps": 1e-5}, (2 * m * d, 3 * m * d),
        ("LigerLayerNormFunction", partial(in_order, ("x", "weight", "bias"), (1e-5,))),
    ))  # fmt: skip
    q, k = (normal(batch, length, count, width).transpose(1, 2) for count in (heads, groups))
    angles = torch.rand(1, length, width, device=DEVICE) * 6.28
    turned = {"q": q, "k": k, "cos": angles.cos().to(q.dtype), "sin": angles.sin().to(q.dtype)}
    both = 2 * (q.numel() + k.numel())
    made.append(Case(
        "rope", "rope", turned, ("q", "k"), {}, (both, both),
        ("LigerRopeFunction", partial(in_order, ("q", "k", "cos", "sin"), ())), liger_backward=False,
    ))  # fmt: skip
    for activation, name in (("silu", "LigerSiLUMulFunction"), ("gelu_tanh", "LigerGELUMulFunction")):
        made.append(Case(
            f"gated_activation, {activation}", "gated_activation", {"gate": gate, "up": up}, ("gate", "up"),
            {"activation": activation}, (3 * m * f, 5 * m * f), (name, partial(in_order, ("gate", "up"), ())),
            liger_backward=False,
        ))  # fmt: skip
    return made


def in_order(names: tuple[str, ...], more: tuple[Any, ...], function: Any) -> Op:
    return lambda **given: function.apply(*(given[name] for name in names), *more)


def liger(case: Case, backward: bool) -> Op:
    if case.liger is None:
        raise Absent("has no such operation")
    if backward and not case.liger_backward:
        raise Absent("writes over its inputs")
    name, called = case.liger
    return called(peer("liger-kernel", "liger_kernel.ops", name))


def step(case: Case, op: Op, backward: bool) -> Work:
    """One call; with gradients of what is trained."""
    leaves = {n: t.detach().requires_grad_(backward and n in case.trained) for n, t in case.tensors.items()}
    wanted = [leaves[name] for name in case.trained]
    with torch.no_grad():
        gradients = [torch.randn_like(output) for output in as_tuple(op(**leaves))]

    def once() -> None:
        with torch.set_grad_enabled(backward):
            outputs = as_tuple(op(**leaves))
        if backward:
            torch.autograd.grad(outputs, wanted, gradients)

    return once


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def main() -> None:
    bench = Benchmark(None, __doc__, ["liger-kernel"])
    bench.correct(errors(case.check() for case in cases(small=True)))
    bandwidth = copy_bandwidth()
    found = []
    for case in cases(bench.small):
        for backward in (False, True):
            makers = {
                "ours": lambda case=case, backward=backward: step(case, case.run(shardtune_kernels), backward),
                "eager": lambda case=case, backward=backward: step(case, case.run(reference), backward),
                "liger": lambda case=case, backward=backward: step(case, liger(case, backward), backward),
            }
            moved = SIZE * (sum(case.moved) if backward else case.moved[0])
            line = bench.case(Sides(makers), what=case.name, backward=backward, bytes=moved)
            times = {"ours": line["ours_ms"], **line["peers_ms"]}
            line["share_of_copy"] = {n: moved / t * 1e3 / bandwidth for n, t in times.items() if t and bandwidth}
            found.append(line)
    bench.report(found, copy_gigabytes_per_second=bandwidth / 1e9 if bandwidth else None)


if __name__ == "__main__":
    main()
