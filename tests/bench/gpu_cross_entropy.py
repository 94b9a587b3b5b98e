"""G4: linear + cross entropy, forward and backward, in bfloat16: one JSON line.

Beside torch with all logits, Liger and cut-cross-entropy. The floor is the time of the products alone, two where the
head is frozen and three where it is trained, of the rows that are not masked, at the rate of a large product measured
here. Temporaries are the peak beyond the inputs and the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from _gpu_line import Benchmark, Check, Sides, Target, errors, normal, peer
from _gpu_timing import DEVICE, Work, in_turn, peak_bytes
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import linear_cross_entropy, reference

FLOOR, BYTES, LIGER = 1.2, 0.3e9, 1.3
"""Targets: times the floor at most, bytes of temporaries at most, times faster than Liger at least."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden, weight and targets, summed."""


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")


def liger() -> Loss:
    made = peer("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    loss = made(ignore_index=-100, reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def cut_cross_entropy() -> Loss:
    cut = peer("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=-100, reduction="sum")


def draw_targets(rows: int, classes: int, masked: float) -> Tensor:
    """A share of them masked, scattered."""
    targets = torch.randint(classes, (rows,), device=DEVICE)
    targets[torch.randperm(rows, device=DEVICE)[: int(rows * masked)]] = -100
    return targets


def check(rows: int, width: int, classes: int, options: Mapping[str, Any]) -> Check:
    def draw() -> dict[str, Tensor]:
        weight = torch.randn(classes, width).double() / width**0.5
        hidden = torch.randn(rows, width).double()
        return {"hidden": hidden, "weight": weight, "targets": draw_targets(rows, classes, 0.3)}

    def op(**given: Tensor) -> Tensor:
        return linear_cross_entropy(**given, **options)

    return Check("linear_cross_entropy", op, reference.linear_cross_entropy, draw)


def case(
    bench: Benchmark, shape: tuple[int, int, int], trained: bool, masked: float, rate: float, options: Any
) -> dict[str, Any]:
    """Times, temporaries and what becomes of the targets."""
    rows, width, classes = shape
    hidden = normal(rows, width, trained=True)
    weight = (normal(classes, width) / width**0.5).requires_grad_(trained)
    targets = draw_targets(rows, classes, masked)
    tokens = (targets != -100).sum()

    def step(loss: Loss) -> Work:
        def run() -> None:
            hidden.grad = weight.grad = None
            (loss(hidden, weight, targets) / tokens).backward()

        return run

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, **options)

    sides = Sides({
        "ours": lambda: step(ours), "eager": lambda: step(eager), "liger": lambda: step(liger()),
        "cut_cross_entropy": lambda: step(cut_cross_entropy()),
    })  # fmt: skip
    kept = hidden.nbytes + (weight.nbytes if trained else 0)

    def temporaries(run: Work) -> int | None:
        hidden.grad = weight.grad = None
        peak = peak_bytes(run)
        return None if peak is None else peak - kept

    found = sides.each(temporaries)
    floor = (3 if trained else 2) * 2 * int(tokens) * width * classes / rate * 1e3

    def limits(times: Mapping[str, float]) -> dict[str, Target]:
        return {
            "time over the floor's": Target(times["ours"] / floor, FLOOR, at_most=True),
            "bytes of temporaries": Target(found["ours"], BYTES, at_most=True),
        }

    return bench.case(
        sides, {"liger": LIGER}, limits, shape=shape, head="trained" if trained else "frozen", masked=masked,
        floor_ms=floor, temporary_bytes=found,
    )  # fmt: skip


def main() -> None:
    bench = Benchmark("G4", __doc__, ["liger-kernel", "cut-cross-entropy"], rounds=10)
    options = {"chunk_bytes": 7200} if bench.small else {}
    bench.correct(errors([check(*((20, 16, 100) if bench.small else (4096, 512, 50_257)), options)], draws=4))
    size = 64 if bench.small else 8192
    a, b = normal(size, size), normal(size, size)
    rate = 2 * size**3 / in_turn({"product": lambda: a @ b}, bench.rounds)["product"] * 1e3
    shape = (24, 16, 300) if bench.small else (8192, 4096, 128_256)
    kinds = [(trained, masked) for trained in (False, True) for masked in (0.0, 0.5)]
    bench.report([case(bench, shape, *kind, rate, options) for kind in kinds], product_tflops=rate / 1e12)


if __name__ == "__main__":
    main()
