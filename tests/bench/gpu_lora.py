"""G1: a LoRA linear layer, forward and backward, beside PEFT, Unsloth and the bare frozen layer: one JSON line.

[8192, 4096 -> 4096] in bfloat16 with rank 16; dropout 0 and 0.05; adapters in bfloat16, and in float32 as PEFT makes
them; the gradients of x, A and B are computed. A ratio is a peer's time over ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _gpu_line import Benchmark, Check, Sides, Target, errors, normal, peer
from _gpu_timing import DEVICE, Work, peak_bytes
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from shardtune_kernels import LoraWeights, lora_linear, reference
from shardtune_kernels.dropout import dropout_mask

ALPHA = 32
FASTER = {torch.bfloat16: {"peft": 1.22, "unsloth": 1.08}, torch.float32: {"peft": 1.6}}
"""Than peers with adapters of the same dtype."""
SLOWER_THAN_FROZEN = 1.10
"""At most, without dropout, with adapters in bfloat16."""


class Layer(NamedTuple):
    """One layer's tensors, drawn at random."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def draw(cls, m: int, k: int, n: int, rank: int, adapters: torch.dtype) -> Layer:
        a, b = normal(rank, k) / k**0.5, normal(n, rank) / rank**0.5
        weight = normal(n, k) / k**0.5
        return cls(normal(m, k, trained=True), normal(m, n), weight, *(t.to(adapters).requires_grad_() for t in (a, b)))


def makers(of: Layer, rate: float) -> dict[str, Callable[[], Work]]:
    """Of ours, each peer, and the layer without an adapter."""

    def passes(layer: Callable[[Tensor], Tensor], *leaves: Tensor) -> Work:
        return lambda: torch.autograd.grad(layer(of.x), [of.x, *leaves], of.dy)

    def peft() -> Work:
        rank = len(of.a)
        base = nn.Linear(of.weight.shape[1], of.weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(of.weight, requires_grad=False)
        layer: Any = Linear(base, "default", LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=rate), rank, ALPHA)
        held = layer.lora_A["default"], layer.lora_B["default"]
        for adapter, values in zip(held, (of.a, of.b), strict=True):
            adapter.weight = nn.Parameter(values.detach().clone())
        return passes(layer.train(), held[0].weight, held[1].weight)

    def unsloth() -> Work:
        """Its function for an output projection, which has no dropout."""
        function = peer("unsloth", "unsloth.kernels.fast_lora", "LoRA_W")
        scale = ALPHA / len(of.a)
        return passes(lambda x: function.apply(x.unsqueeze(0), of.weight, None, of.a, of.b, scale)[0], of.a, of.b)

    weights = LoraWeights(of.weight, None, of.a, of.b, ALPHA / len(of.a))
    found = {
        "ours": lambda: passes(partial(lora_linear, w=weights, dropout=rate), of.a, of.b),
        "peft": peft,
        "frozen": lambda: passes(lambda x: nn.functional.linear(x, of.weight)),
    }
    return found if rate else {**found, "unsloth": unsloth}


def check(size: tuple[int, int, int, int], rate: float) -> Check:
    m, k, n, rank = size
    shapes = {"x": (m, k), "weight": (n, k), "a": (rank, k), "b": (n, rank)}
    mask = dropout_mask(1, rate, (m, k), DEVICE) if rate else None

    def layer(given: dict[str, Tensor]) -> LoraWeights:
        return LoraWeights(given["weight"], None, given["a"], given["b"], ALPHA / rank)

    return Check(
        f"dropout {rate}",
        lambda **given: lora_linear(given["x"], layer(given), rate, 1 if rate else None),
        lambda **given: reference.lora_linear(given["x"], layer(given), mask, rate),
        lambda: {n: torch.randn(s).double() / (s[1] ** 0.5 if n != "x" else 1.0) for n, s in shapes.items()},
        trained={"weight": False},
    )


def main() -> None:
    bench = Benchmark("G1", __doc__, ["peft", "unsloth"])
    bench.correct(errors(check((48, 40, 72, 4) if bench.small else (1000, 1100, 1200, 16), r) for r in (0.0, 0.05)))
    size = (48, 40, 72, 4) if bench.small else (8192, 4096, 4096, 16)
    cases = []
    for adapters, faster in FASTER.items():
        for rate in (0.0, 0.05):
            sides = Sides(makers(Layer.draw(*size, adapters), rate))
            if rate:
                faster = {"peft": faster["peft"]}

            def beside_frozen(times: Any, with_target: bool = not rate and adapters == torch.bfloat16) -> Any:
                slower = times["ours"] / times["frozen"]
                return {"time over the frozen layer's": Target(slower, SLOWER_THAN_FROZEN, True)} if with_target else {}

            cases.append(bench.case(
                sides, faster, beside_frozen, shape=size, dropout=rate, adapters=str(adapters).removeprefix("torch."),
                peak_bytes=sides.each(peak_bytes),
            ))  # fmt: skip
    bench.report(cases)


if __name__ == "__main__":
    main()
