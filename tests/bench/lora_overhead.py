"""Microseconds that a LoRA linear layer costs before it computes anything: forward and backward of [8, 64], rank 16.

The products take about a microsecond each, so this is what Python and torch do around them, beside PEFT's layer: one
JSON line, with the nodes of autograd and the calls of Python functions of one layer. Layers are timed as models have
them, one after the other with one backward for all, since starting a backward costs as much as a layer; the clock is
the thread's own time, so that other processes matter less.
"""

from __future__ import annotations

import argparse
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

from shardtune_kernels import LoraWeights, lora_linear

ROWS, WIDTH, RANK, ALPHA = 8, 64, 16, 32
LAYERS = 16
TARGET = 2.0


class Fused(nn.Module):
    """A layer as a model would hold it; parameters are looked up where nn.Module would look for them in the end."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.a = nn.Parameter(torch.randn(RANK, WIDTH) / 8)
        self.b = nn.Parameter(torch.randn(WIDTH, RANK) / 4)

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters
        return lora_linear(x, LoraWeights(own["weight"], own["bias"], own["a"], own["b"], ALPHA / RANK))


def peft_layer(base: nn.Linear, like: Fused) -> nn.Module:
    """PEFT's layer with the same weights."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    layer = Linear(base, "default", config, RANK, ALPHA)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(like.a)
        layer.lora_B["default"].weight.copy_(like.b)
    return layer


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
    ours = [Fused(base) for base in bases]
    peft = [peft_layer(base, layer) for base, layer in zip(bases, ours, strict=True)]
    layers = {"ours": ours, "peft": peft}
    single = {name: step(of[0], x, gradient) for name, of in layers.items()}
    check(single, ours[0], peft[0], x)
    counts = {name: {"nodes": nodes(run()), "python_calls": python_calls(run)} for name, run in single.items()}
    sides = {name: step(nn.Sequential(*of), x, gradient) for name, of in layers.items()}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            begun = time.thread_time()
            for _ in range(given.steps):
                run()
            taken[name].append((time.thread_time() - begun) / given.steps / LAYERS * 1e6)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(theirs / mine for mine, theirs in zip(taken["ours"], taken["peft"], strict=True))
    line = {
        "benchmark": "lora_overhead", "unit": "µs a layer, forward and backward", "layers": LAYERS,
        "rounds": given.rounds, "steps": given.steps,
        **{name: round(value, 1) for name, value in medians.items()}, "ratio": round(ratio, 2), "target": TARGET,
        "met": ratio >= TARGET, "counts": counts,
        "versions": {"python": platform.python_version(), **{n: metadata.version(n) for n in ("torch", "peft")}},
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    print(json.dumps(line, ensure_ascii=False))


def check(sides: dict[str, Callable[[], Tensor]], ours: Fused, peft: Any, x: Tensor) -> None:
    """Both sides compute the same."""
    of_peft = [peft.lora_A["default"].weight, peft.lora_B["default"].weight]
    found = []
    for run, (a, b) in zip(sides.values(), ((ours.a, ours.b), of_peft), strict=True):
        x.grad = a.grad = b.grad = None
        found.append([run().detach(), x.grad, a.grad, b.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


if __name__ == "__main__":
    main()
