"""A gated feed-forward layer of an 8B model with LoRA on its three layers, in bfloat16: one JSON line.

Beside transformers' LlamaMLP with peft's adapters (in bfloat16, and in float32 as peft makes them), the same with
Liger's activation, and Unsloth's fused layer. Forward and backward; what autograd saves in between is counted, on any
machine, each storage once and without parameters.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _gpu_timing import DEVICE, ON_GPU, error, header, in_turn, installed, met, parser, peak_bytes, ratio, report
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import shardtune_kernels
from shardtune_kernels import reference
from shardtune_kernels.weights import LoraWeights

FASTER, SAVED = 1.3, 0.6
"""Targets against peft: of time, and of saved bytes."""
NAMES = ("gate_proj", "up_proj", "down_proj")
Call = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    tokens: int
    d: int
    f: int
    rank: int


WHOLE, SMALL = Shape(8192, 4096, 14_336, 16), Shape(24, 64, 224, 4)


def main() -> None:
    given = parser(__doc__).parse_args()
    shape = SMALL if given.small else WHOLE
    line = header("gpu_mlp", ["transformers", "peft", "liger-kernel", "unsloth"])
    errors = check(SMALL)
    cases: list[dict[str, Any]] = []
    for dropout in (0.0, 0.05):
        made = sides(shape, dropout)
        work = {name: None if side is None else step(side, shape) for name, side in made.items()}
        times = in_turn(work, *((2, 1) if given.small else (given.rounds, 5)))
        saved = {name: None if side is None else saved_bytes(side, shape) for name, side in made.items()}
        share = saved["ours"] / saved["peft"]
        faster = ratio(times, "peft")
        cases.append({
            "dropout": dropout, "shape": shape._asdict(), "milliseconds": times,
            "ratio": {name: ratio(times, name) for name in times if name != "ours"}, "target": FASTER,
            "met": met(faster, FASTER), "saved_bytes": saved, "saved_share_of_peft": share,
            "saved_share_of_peft_float32": saved["ours"] / saved["peft, float32 adapters"],
            "saved_target": SAVED, "saved_met": share <= SAVED,
            "peak_bytes": {name: None if call is None else peak_bytes(call) for name, call in work.items()},
        })  # fmt: skip
        del made, work
    report({**line, "largest_error_over_allowed": errors, "cases": cases})


def sides(shape: Shape, dropout: float) -> dict[str, Any]:
    """Each a module and what is called with x; the same weights in all."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=shape.d, intermediate_size=shape.f)
    plain = LlamaMLP(config).to(DEVICE, torch.bfloat16)
    lora = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=dropout, target_modules=list(NAMES))
    narrow: Any = inject_adapter_in_model(lora, plain).train()
    for name, parameter in narrow.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    wide = with_own_adapters(narrow, torch.float32)
    return {
        "ours": (narrow, ours(narrow, dropout)),
        "peft": (narrow, narrow.forward),
        "peft, float32 adapters": (wide, wide.forward),
        "liger": liger(narrow),
        "unsloth": unsloth(narrow, dropout),
    }


def with_own_adapters(module: Any, dtype: torch.dtype) -> Any:
    """A copy that shares the frozen weights."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    copied = copy.deepcopy(module, dict(frozen))
    for parameter in copied.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return copied


def lora_weights(layer: Any) -> LoraWeights:
    return LoraWeights(
        layer.base_layer.weight, layer.base_layer.bias, layer.lora_A["default"].weight,
        layer.lora_B["default"].weight, layer.scaling["default"],
    )  # fmt: skip


def ours(module: Any, dropout: float) -> Call:
    weights = [lora_weights(getattr(module, name)) for name in NAMES]
    return lambda x: shardtune_kernels.lora_gated_mlp(x, *weights, dropout=dropout)


def liger(module: Any) -> tuple[Any, Call] | None:
    """Its activation between peft's layers, as its patch of a model does."""
    if not ON_GPU or installed("liger-kernel") is None:
        return None
    product: Any = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return module, lambda x: module.down_proj(product.apply(module.gate_proj(x), module.up_proj(x)))


def unsloth(module: Any, dropout: float) -> tuple[Any, Call] | None:
    """Its fused layer, which has no dropout; it wants [b, s, d], and not to write over x."""
    if not ON_GPU or dropout or installed("unsloth") is None:
        return None
    fused: Any = importlib.import_module("unsloth.kernels.fast_lora").apply_lora_mlp_swiglu
    return module, lambda x: fused(module, x.unsqueeze(0), inplace=False)[0]


def step(side: tuple[Any, Call], shape: Shape) -> Callable[[], None]:
    """Forward and backward: gradients of x and of the adapters."""
    module, call = side
    x = torch.randn(shape.tokens, shape.d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(shape.tokens, shape.d, device=DEVICE, dtype=torch.bfloat16)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def once() -> None:
        torch.autograd.grad(call(x), wanted, dy)

    return once


def saved_bytes(side: tuple[Any, Call], shape: Shape) -> int:
    """What autograd keeps between forward and backward: each storage once, no parameters."""
    module, call = side
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = tensor  # held, so that no later one gets its place
        return tensor

    x = torch.randn(shape.tokens, shape.d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(x)
    bytes_ = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del y
    return bytes_


def check(shape: Shape) -> dict[str, float]:
    """Of the output and each gradient in every dtype: the error over that of plain torch in the same dtype, or in
    float32 over 1e-5. Ends the run if one is over what is allowed, 1.5 and 1."""
    worst: dict[str, float] = {}
    torch.manual_seed(0)
    exact = [torch.randn(64, shape.d, dtype=torch.float64, device=DEVICE)]
    for n, k in ((shape.f, shape.d), (shape.f, shape.d), (shape.d, shape.f)):
        for rows, columns in ((n, k), (16, k), (n, 16)):
            exact.append(torch.randn(rows, columns, dtype=torch.float64, device=DEVICE) / columns**0.5)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = [tensor.to(dtype) for tensor in exact]
        got = results(shardtune_kernels.lora_gated_mlp, rounded)
        wanted = results(reference.lora_gated_mlp, [tensor.double() for tensor in rounded])
        plain = results(reference.lora_gated_mlp, rounded)
        off = [
            error(g, w) / (1e-5 if dtype == torch.float32 else 1.5 * max(error(p, w), 1e-6))
            for g, w, p in zip(got, wanted, plain, strict=True)
        ]
        worst[str(dtype)] = max(off)
        if max(off) > 1.0:
            raise SystemExit(f"gpu_mlp: in {dtype} an error is {max(off):.2f} of what is allowed")
    return worst


def results(mlp: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output, and gradients of x and of the adapters."""
    leaves = [tensor.detach().clone().requires_grad_(index % 3 != 1) for index, tensor in enumerate(tensors)]
    layers = [LoraWeights(leaves[i], None, leaves[i + 1], leaves[i + 2], 0.5) for i in (1, 4, 7)]
    y = mlp(leaves[0], *layers)
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)]


if __name__ == "__main__":
    main()
