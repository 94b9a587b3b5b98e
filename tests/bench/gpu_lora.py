"""A LoRA linear layer on one GPU, forward and backward, beside PEFT, Unsloth and the bare frozen layer: one JSON line.

[8192, 4096 -> 4096] in bfloat16 with rank 16; dropout 0 and 0.05; the gradients of x, A and B are computed.
Milliseconds are medians; a ratio is a peer's over ours. Before that, ours is compared with the reference in all dtypes.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import torch
from _gpu_timing import DEVICE, Work, error, header, in_turn, installed, met, parser, peak_bytes, ratio, report
from torch import Tensor, nn

from shardtune_kernels import LoraWeights, lora_linear, reference
from shardtune_kernels.dropout import dropout_mask

ALPHA = 32
DROPOUTS = (0.0, 0.05)
TARGETS = {"peft_float32": 1.6, "peft_bfloat16": 1.22, "unsloth": 1.08}
SLOWER_THAN_FROZEN = 1.10
"""At most, without dropout."""
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Size(NamedTuple):
    m: int
    k: int
    n: int
    rank: int


class Tensors(NamedTuple):
    """One layer's, drawn at random."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def draw(cls, size: Size, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Tensors:
        drawn = partial(torch.randn, device=DEVICE)
        return cls(
            drawn(size.m, size.k).to(dtype).requires_grad_(),
            drawn(size.m, size.n).to(dtype),
            (drawn(size.n, size.k) / size.k**0.5).to(dtype),
            (drawn(size.rank, size.k) / size.k**0.5).to(adapter_dtype).requires_grad_(),
            (drawn(size.n, size.rank) / size.rank**0.5).to(adapter_dtype).requires_grad_(),
        )

    def layer(self) -> LoraWeights:
        return LoraWeights(self.weight, None, self.a, self.b, ALPHA / len(self.a))


def forward_and_backward(layer: Any, of: Tensors, leaves: tuple[Tensor, ...]) -> Work:
    """Gradients are returned, not summed anywhere."""
    return lambda: torch.autograd.grad(layer(of.x), leaves, of.dy)


def peft_layer(of: Tensors, rate: float, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer; it holds adapters in float32 unless told otherwise."""
    peft: Any = importlib.import_module("peft")
    lora: Any = importlib.import_module("peft.tuners.lora")
    rank = len(of.a)
    base = nn.Linear(of.weight.shape[1], of.weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(of.weight, requires_grad=False)
    layer = lora.Linear(base, "default", peft.LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=rate), rank, ALPHA)
    layer.lora_A["default"].weight = nn.Parameter(of.a.detach().to(dtype, copy=True))
    layer.lora_B["default"].weight = nn.Parameter(of.b.detach().to(dtype, copy=True))
    return layer.train()


def unsloth_layer(of: Tensors) -> Any:
    """Unsloth's function for an output projection, which has no dropout."""
    kernels: Any = importlib.import_module("unsloth.kernels.fast_lora")
    return lambda x: kernels.LoRA_W.apply(x.unsqueeze(0), of.weight, None, of.a, of.b, ALPHA / len(of.a)).squeeze(0)


def sides(of: Tensors, rate: float) -> dict[str, Work | None]:
    """Ours with adapters in bfloat16 and in float32, each peer, and the layer without an adapter."""
    leaves = of.x, of.a, of.b
    wide = of._replace(a=of.a.detach().float().requires_grad_(), b=of.b.detach().float().requires_grad_())
    found: dict[str, Work | None] = {
        "ours": forward_and_backward(partial(lora_linear, w=of.layer(), dropout=rate), of, leaves),
        "ours_float32": forward_and_backward(
            partial(lora_linear, w=wide.layer(), dropout=rate), of, (of.x, wide.a, wide.b)
        ),
        "frozen": forward_and_backward(lambda x: nn.functional.linear(x, of.weight), of, (of.x,)),
        **dict.fromkeys(TARGETS),
    }
    if installed("peft"):
        for name, dtype in (("peft_float32", torch.float32), ("peft_bfloat16", of.x.dtype)):
            layer: Any = peft_layer(of, rate, dtype)
            adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            found[name] = forward_and_backward(layer, of, (of.x, *adapters))
    if installed("unsloth") and not rate:
        found["unsloth"] = forward_and_backward(unsloth_layer(of), of, leaves)
    return found


def errors(size: Size) -> dict[str, float]:
    """The largest of the output and the gradients, per dtype and dropout, beside the reference in float64."""
    found = {}
    for dtype, limit in LIMITS.items():
        of = Tensors.draw(size, dtype, dtype)
        exact = Tensors(*(t.detach().double().requires_grad_(t.requires_grad) for t in of))
        for rate in DROPOUTS:
            mask = dropout_mask(1, rate, of.x.shape, DEVICE) if rate else None
            y = lora_linear(of.x, of.layer(), rate, 1)
            wanted = reference.lora_linear(exact.x, exact.layer(), mask, rate)
            mine = (y, *torch.autograd.grad(y, [of.x, of.a, of.b], of.dy))
            theirs = (wanted, *torch.autograd.grad(wanted, [exact.x, exact.a, exact.b], exact.dy))
            off = max(error(one, other) for one, other in zip(mine, theirs, strict=True))
            if off > limit:
                raise SystemExit(f"gpu_lora: {dtype}, dropout {rate}: off by {off:.3g}, allowed are {limit}")
            found[f"{dtype}, dropout {rate}".removeprefix("torch.")] = off
    return found


def measure(of: Tensors, rate: float, rounds: int) -> dict[str, Any]:
    """One case of the result."""
    work = sides(of, rate)
    taken = in_turn(work, rounds)
    # PEFT in float32 is what a user of float32 adapters has: ours then has them, too.
    ratios = {name: ratio(taken, name, "ours_float32" if name == "peft_float32" else "ours") for name in TARGETS}
    beside_frozen = ratio(taken, "ours", "frozen")
    return {
        "dropout": rate, "milliseconds": taken, "ratio": ratios, "target": TARGETS,
        "met": {name: met(ratios[name], target) for name, target in TARGETS.items()},
        "ours_over_frozen": beside_frozen,
        "ours_over_frozen_target": None if rate else SLOWER_THAN_FROZEN,
        "ours_over_frozen_met": None if rate else met(beside_frozen, SLOWER_THAN_FROZEN, at_most=True),
        "peak_bytes": {name: None if run is None else peak_bytes(run) for name, run in work.items()},
    }  # fmt: skip


def main() -> None:
    given = parser(__doc__).parse_args()
    size = Size(48, 40, 72, 4) if given.small else Size(8192, 4096, 4096, 16)
    torch.manual_seed(0)
    checked = Size(48, 40, 72, 4) if given.small else Size(1000, 1100, 1200, 16)
    line = {**header("gpu_lora", ["peft", "unsloth"]), "size": size._asdict(), "errors": errors(checked)}
    of = Tensors.draw(size, torch.bfloat16, torch.bfloat16)
    rounds = 1 if given.small else given.rounds
    report({**line, "rounds": rounds, "cases": [measure(of, rate, rounds) for rate in DROPOUTS]})


if __name__ == "__main__":
    main()
