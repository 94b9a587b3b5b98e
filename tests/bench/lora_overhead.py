"""Microseconds that a LoRA linear layer costs beside its products: forward and backward of [8, 64], rank 16.

The products take one or two microseconds each; what Python and torch do around them is most of the time, beside PEFT's
layer. `overhead` is the time beyond the eight products and two sums of gradients by themselves; `ratio` is of that, and
`whole_ratio` of all. One JSON line, with the nodes of autograd and the calls of Python functions of one layer.

Ours is the same layer as `kernels.fused` leaves it. Layers are timed as models have them, one after the other with one
backward for all, since starting a backward costs as much as a layer; the clock is the thread's own time, so that other
processes matter less.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from shardtune.fused.lora import fuse_lora

ROWS, WIDTH, RANK, ALPHA = 8, 64, 16, 32
LAYERS = 16
TARGET = 2.0


def peft_layer(base: nn.Linear) -> Any:
    """PEFT's layer."""
    layer = Linear(base, "default", LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0), RANK, ALPHA)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.25)
    return layer


def fused_layer(layer: Any) -> Any:
    """A copy of PEFT's layer as a run fuses it."""
    copied = copy.deepcopy(layer)
    count, _ = fuse_lora(copied, set(), torch.device("cpu"))
    assert count == 1
    return copied


def products(x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """What a layer computes, without autograd: three products forward, five backward, two sums of gradients."""
    weight, a, b = torch.randn(WIDTH, WIDTH), torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    of_a, of_b, x, scale = torch.zeros_like(a), torch.zeros_like(b), x.detach(), ALPHA / RANK

    def run() -> None:
        for _ in range(LAYERS):
            xa = nn.functional.linear(x, a)
            nn.functional.linear(x, weight).addmm_(xa, b.t(), alpha=scale)
            dyb = torch.addmm(xa, gradient, b, beta=0, alpha=scale)
            dyb.mm(a).addmm_(gradient, weight)
            of_a.add_(dyb.t().mm(x))
            of_b.add_(torch.addmm(b, gradient.t(), xa, beta=0, alpha=scale))

    return run


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gradients are left where they are summed, as within a step of several micro-batches."""

    def run() -> Tensor:
        y = layer(x)
        y.backward(gradient)
        return y

    return run


def nodes(y: Tensor) -> int:
    """Of the graph behind y, those that accumulate gradients included."""
    seen: set[Any] = set()
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def python_calls(work: Callable[[], Any]) -> int:
    """Python functions called, those of the backward included: on a CPU it runs in this thread."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    work()
    sys.setprofile(None)
    return calls - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="how often each side runs, in turn")
    parser.add_argument("--steps", type=int, default=20, help="of a side in each round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    gradient = torch.randn(ROWS, WIDTH)
    bases = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(LAYERS)]
    peft = [peft_layer(base) for base in bases]
    layers = {"ours": [fused_layer(layer) for layer in peft], "peft": peft}
    single = {name: step(of[0], x, gradient) for name, of in layers.items()}
    check({name: (run, layers[name][0]) for name, run in single.items()}, x)
    counts = {name: {"nodes": nodes(run()), "python_calls": python_calls(run)} for name, run in single.items()}
    sides: dict[str, Callable[[], Any]] = {name: step(nn.Sequential(*of), x, gradient) for name, of in layers.items()}
    sides["products"] = products(x, gradient)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            begun = time.thread_time()
            for _ in range(given.steps):
                run()
            taken[name].append((time.thread_time() - begun) / given.steps / LAYERS * 1e6)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    overhead = {name: medians[name] - medians["products"] for name in layers}
    ratio = overhead["peft"] / overhead["ours"]
    line = {
        "benchmark": "lora_overhead", "unit": "µs a layer, forward and backward", "layers": LAYERS,
        "rounds": given.rounds, "steps": given.steps, **{name: round(value, 1) for name, value in medians.items()},
        "overhead": {name: round(value, 1) for name, value in overhead.items()}, "ratio": round(ratio, 2),
        "whole_ratio": round(medians["peft"] / medians["ours"], 2), "target": TARGET, "met": ratio >= TARGET,
        "counts": counts,
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "peft")}},
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    print(json.dumps(line, ensure_ascii=False))


def check(sides: dict[str, tuple[Callable[[], Tensor], Any]], x: Tensor) -> None:
    """Both sides compute the same."""
    found = []
    for run, layer in sides.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x.grad = a.grad = b.grad = None
        found.append([run().detach(), x.grad, a.grad, b.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


if __name__ == "__main__":
    main()
