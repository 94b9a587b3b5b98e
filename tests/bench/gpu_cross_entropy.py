"""Linear + cross entropy on one GPU, forward and backward, in bfloat16: one JSON line.

Beside torch with all logits, Liger and cut-cross-entropy, where they are installed. The floor is the time of the
products alone, two where the head is frozen and three where it is trained, of the rows that are not masked, at the rate
of a large product measured here. Temporaries are the peak beyond the inputs and the gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _gpu_timing import DEVICE, ON_GPU, error, header, in_turn, met, parser, peak_bytes, ratio, report
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import linear_cross_entropy, reference

FLOOR, BYTES, LIGER = 1.2, 0.3e9, 1.3
"""Targets: times the floor at most, bytes of temporaries at most, times faster than Liger at least."""
Op = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden, weight and targets: the summed loss."""


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(rounds=10)
    given = made.parse_args()
    rows, width, classes = (24, 16, 300) if given.small else (8192, 4096, 128_256)
    rounds = 2 if given.small else given.rounds
    ops = sides({"chunk_bytes": 7200} if given.small else {})
    line = header("gpu_cross_entropy", ["liger-kernel", "cut-cross-entropy"])
    line |= {"shape": [rows, width, classes], "dtype": "bfloat16", "errors": errors(ops, given.small)}
    rate = matmul_rate(256 if given.small else 8192, rounds)
    line |= {"matmul_tflops": rate / 1e12, "cases": {}}
    for trained in (False, True):
        for masked in (0.0, 0.5):
            name = f"head {'trained' if trained else 'frozen'}, {masked:.0%} masked"
            line["cases"][name] = case(ops, (rows, width, classes), trained, masked, rate, rounds)
    report(line)


def sides(options: Mapping[str, Any]) -> dict[str, Op | None]:
    """Ours, with `options`, and the peers; None of one that is not installed."""
    liger = imported("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    cut = imported("cut_cross_entropy", "linear_cross_entropy")
    liger_loss = None if liger is None else liger(ignore_index=-100, reduction="sum")
    return {
        "ours": lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, **options),
        "eager": lambda hidden, weight, targets: functional.cross_entropy(
            functional.linear(hidden, weight).float(), targets, reduction="sum"
        ),
        "liger": None if liger_loss is None else lambda hidden, weight, targets: liger_loss(weight, hidden, targets),
        "cut_cross_entropy": None
        if cut is None
        else lambda hidden, weight, targets: cut(hidden, weight, targets, ignore_index=-100, reduction="sum"),
    }


def imported(module: str, name: str) -> Any:
    """None where the package is not installed, or there is no GPU for its kernels."""
    if not ON_GPU:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def inputs(rows: int, width: int, classes: int, dtype: torch.dtype, masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as of a model: of size 1, targets at random, a share of them masked, scattered."""
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.float32)
    weight = torch.randn(classes, width, device=DEVICE, dtype=torch.float32) / width**0.5
    targets = torch.randint(classes, (rows,), device=DEVICE)
    targets[torch.randperm(rows, device=DEVICE)[: int(rows * masked)]] = -100
    return hidden.to(dtype), weight.to(dtype), targets


def errors(ops: Mapping[str, Op | None], small: bool) -> dict[str, Any]:
    """Of loss and gradients beside float64, in every dtype, each side; ours must not be worse than 1.5 x eager in 16
    bits, and below 1e-5 in float32."""
    shape = (20, 16, 300) if small else (4096, 512, 50_257)
    allowed_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, weight, targets = inputs(*shape, dtype, 0.3)
        exact = gradients(reference.linear_cross_entropy, hidden.double(), weight.double(), targets)
        of: dict[str, Any] = {}
        for name, op in ops.items():
            if op is None:
                of[name] = None
                continue
            try:
                got = gradients(op, hidden, weight, targets)
            except Exception as problem:  # a peer need not know every dtype
                if name == "ours":
                    raise
                of[name] = type(problem).__name__
                continue
            of[name] = [error(one, wanted) for one, wanted in zip(got, exact, strict=True)]
        limits = [max(1.5 * plain, 1e-5) if dtype.itemsize < 4 else 1e-5 for plain in of["eager"]]
        if any(own > limit for own, limit in zip(of["ours"], limits, strict=True)):
            raise SystemExit(f"gpu_cross_entropy: wrong in {dtype}: {of['ours']} beside {limits}")
        found[str(dtype).removeprefix("torch.")] = of
    torch.backends.cuda.matmul.allow_tf32 = allowed_tf32
    return found


def gradients(op: Op, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and the gradients of hidden and weight."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    loss = op(leaves[0], leaves[1], targets)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def matmul_rate(size: int, rounds: int) -> float:
    """FLOP a second of a square product in bfloat16."""
    a, b = (torch.randn(size, size, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    milliseconds = in_turn({"product": lambda: a @ b}, rounds=rounds)["product"] or 1.0
    return 2 * size**3 / milliseconds * 1e3


def case(
    ops: Mapping[str, Op | None],
    shape: tuple[int, int, int],
    trained: bool,
    masked: float,
    rate: float,
    rounds: int,
) -> dict[str, Any]:
    """Times, temporaries and what becomes of the targets."""
    hidden, weight, targets = inputs(*shape, torch.bfloat16, masked)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    tokens = (targets != -100).sum()

    def step(op: Op) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            (op(hidden, weight, targets) / tokens).backward()

        return run

    steps = {name: None if op is None else step(op) for name, op in ops.items()}
    times = in_turn(steps, rounds=rounds, warm_up=2)
    hidden.grad = weight.grad = None
    kept_bytes = hidden.nbytes + (weight.nbytes if trained else 0)
    temporaries = {}
    for name, run in steps.items():
        hidden.grad = weight.grad = None
        peak = None if run is None else peak_bytes(run)
        temporaries[name] = None if peak is None else peak - kept_bytes
    floor = (3 if trained else 2) * 2 * int(tokens) * shape[1] * shape[2] / rate * 1e3
    own, own_bytes = times["ours"], temporaries["ours"]
    over_floor = None if own is None else own / floor
    return {
        "milliseconds": times,
        "floor_milliseconds": floor,
        "over_floor": {"found": over_floor, "target": FLOOR, "met": met(over_floor, FLOOR, at_most=True)},
        "temporary_bytes": {"found": temporaries, "target": BYTES, "met": met(own_bytes, BYTES, at_most=True)},
        "ratio": {
            "eager": ratio(times, "eager"),
            "liger": {"found": ratio(times, "liger"), "target": LIGER, "met": met(ratio(times, "liger"), LIGER)},
            "cut_cross_entropy": ratio(times, "cut_cross_entropy"),
        },
    }


if __name__ == "__main__":
    main()
