"""G5: a gated feed-forward layer of an 8B model with LoRA on its three layers, in bfloat16: one JSON line.

Beside transformers' LlamaMLP with peft's adapters (in bfloat16, and in float32 as peft makes them), the same with
Liger's activation, and Unsloth's fused layer. Forward and backward; what autograd saves in between is counted, on any
machine, each storage once and without parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _gpu_line import Absent, Benchmark, Check, Sides, Target, errors, normal, peer
from _gpu_timing import DEVICE, Work, peak_bytes
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from shardtune_kernels import LoraWeights, lora_gated_mlp, reference

FASTER, SAVED = 1.3, 0.6
"""Targets against peft: of time, and of saved bytes."""
NAMES = ("gate_proj", "up_proj", "down_proj")
Call = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    tokens: int
    d: int
    f: int
    rank: int


class Model(NamedTuple):
    """A module, and what is called with x."""

    module: Any
    call: Call


def models(shape: Shape, dropout: float) -> dict[str, Callable[[], Model]]:
    """The same weights in all."""
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
    weights = [lora_weights(getattr(narrow, name)) for name in NAMES]

    def wide() -> Model:
        """A copy with adapters in float32 that shares the frozen weights."""
        copied = copy.deepcopy(narrow, {id(p): p for p in narrow.parameters() if not p.requires_grad})
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return Model(copied, copied.forward)

    def liger() -> Model:
        """Its activation between peft's layers, as its patch of a model does."""
        product = peer("liger-kernel", "liger_kernel.ops", "LigerSiLUMulFunction")
        return Model(narrow, lambda x: narrow.down_proj(product.apply(narrow.gate_proj(x), narrow.up_proj(x))))

    def unsloth() -> Model:
        """Its fused layer wants [b, s, d], and not to write over x."""
        if dropout:
            raise Absent("its fused layer has no dropout")
        fused = peer("unsloth", "unsloth.kernels.fast_lora", "apply_lora_mlp_swiglu")
        return Model(narrow, lambda x: fused(narrow, x.unsqueeze(0), inplace=False)[0])

    return {
        "ours": lambda: Model(narrow, lambda x: lora_gated_mlp(x, *weights, dropout=dropout)),
        "peft": lambda: Model(narrow, narrow.forward), "peft, float32 adapters": wide, "liger": liger,
        "unsloth": unsloth,
    }  # fmt: skip


def lora_weights(layer: Any) -> LoraWeights:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return LoraWeights(layer.base_layer.weight, layer.base_layer.bias, a, b, layer.scaling["default"])


def step(model: Model, shape: Shape) -> Work:
    """Forward and backward: gradients of x and of the adapters."""
    x, dy = normal(shape.tokens, shape.d, trained=True), normal(shape.tokens, shape.d)
    wanted = [x, *(p for p in model.module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model.call(x), wanted, dy)


def saved_bytes(model: Model, shape: Shape) -> int:
    """What autograd keeps between forward and backward: each storage once, no parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in weights:
            kept[where] = tensor  # held, so that no later one gets its place
        return tensor

    x = normal(shape.tokens, shape.d, trained=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.call(x)
    bytes_ = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del y
    return bytes_


def check(shape: Shape) -> Check:
    """Beside the reference, the weights frozen."""
    layers = (shape.f, shape.d), (shape.f, shape.d), (shape.d, shape.f)
    shapes = {"x": (shape.tokens, shape.d)}
    for name, (n, k) in zip(NAMES, layers, strict=True):
        shapes |= {f"{name}.weight": (n, k), f"{name}.a": (shape.rank, k), f"{name}.b": (n, shape.rank)}

    def run(mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**given: Tensor) -> Tensor:
            parts = [[given[f"{name}.{part}"] for part in ("weight", "a", "b")] for name in NAMES]
            return mlp(given["x"], *(LoraWeights(weight, None, a, b, 0.5) for weight, a, b in parts))

        return call

    return Check(
        "lora_gated_mlp", run(lora_gated_mlp), run(reference.lora_gated_mlp),
        lambda: {n: torch.randn(s).double() / (1.0 if n == "x" else s[1] ** 0.5) for n, s in shapes.items()},
        trained={f"{name}.weight": False for name in NAMES},
    )  # fmt: skip


def case(bench: Benchmark, shape: Shape, dropout: float) -> dict[str, Any]:
    made: dict[str, Model] = {}

    def maker(name: str, make: Callable[[], Model]) -> Callable[[], Work]:
        def work() -> Work:
            made[name] = make()
            return step(made[name], shape)

        return work

    sides = Sides({name: maker(name, make) for name, make in models(shape, dropout).items()})
    saved = {name: saved_bytes(made[name], shape) for name in sides.work}
    share = Target(saved["ours"] / saved["peft"], SAVED, at_most=True)
    return bench.case(
        sides, {"peft": FASTER}, lambda _: {"saved bytes, of peft's": share}, shape=shape._asdict(), dropout=dropout,
        saved_bytes=saved, peak_bytes=sides.each(peak_bytes),
    )  # fmt: skip


def main() -> None:
    bench = Benchmark("G5", __doc__, ["transformers", "peft", "liger-kernel", "unsloth"])
    bench.correct(errors([check(Shape(24, 64, 96, 4) if bench.small else Shape(700, 1000, 2200, 16))]))
    shape = Shape(24, 64, 224, 4) if bench.small else Shape(8192, 4096, 14_336, 16)
    bench.report([case(bench, shape, dropout) for dropout in (0.0, 0.05)])


if __name__ == "__main__":
    main()
