"""Gated feed-forward layers: one operation for gate, up, activation and down."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardtune.fused.linears import Layer, base_of, refusal
from shardtune_kernels import gated_activation, lora_gated_mlp, lora_linear, lora_qkv

NAMES = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
"""Gate, up and down, as architectures call them."""
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def fuse_mlps(model: nn.Module, done: set[nn.Module], device: torch.device) -> tuple[int, dict[str, int]]:
    """Fuses gated feed-forward layers; their linear layers are added to `done`. How many, and why others were not."""
    count, reasons = 0, {}
    for module in model.modules():
        children = dict(module.named_children())
        names = next((names for names in NAMES if all(name in children for name in names)), None)
        if names is None:
            continue
        linears = [children[name] for name in names]
        activation = _activation(module)
        reason = next((r for r in (refusal(linear, device) for linear in linears) if r is not None), None)
        if activation is None:
            reason = reason or "unknown activation"
        elif reason is None and not _computes(module, names, activation):
            reason = "computes otherwise"
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        module.forward = _forward_of(module, names, str(activation), module.forward)
        done.update(linears, map(base_of, linears))
        count += 1
    return count, reasons


def _forward_of(
    mlp: Any, names: tuple[str, str, str], activation: str, original: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    gate, up, down = layers = [Layer(getattr(mlp, name)) for name in names]
    between = getattr(mlp, "dropout", None)

    def forward(x: Tensor) -> Tensor:
        if not all(layer.is_plain() for layer in layers):
            return original(x)
        rate = max(layer.dropout() for layer in layers)
        if between is None or not (between.training and between.p):
            return lora_gated_mlp(gate.cast(x), gate.weights(), up.weights(), down.weights(), activation, rate)
        of_gate, of_up = lora_qkv(gate.cast(x), [gate.weights(), up.weights()], rate)
        inner = between(gated_activation(of_gate, of_up, activation))
        return lora_linear(down.cast(inner), down.weights(), rate)

    return forward


def _activation(module: nn.Module) -> str | None:
    """Which of the known functions the layer's activation is, tried on a few numbers."""
    children = [child for name, child in module.named_children() if name.startswith("act")]
    found: list[Any] = [*children, getattr(module, "act_fn", None), getattr(module, "activation_fn", None)]
    own: Any = next((function for function in found if callable(function)), None)
    if own is None:
        return None
    x = torch.linspace(-6, 6, 101)
    return next((name for name, known in KNOWN.items() if torch.allclose(own(x), known(x), atol=1e-6)), None)


def _computes(module: nn.Module, names: tuple[str, str, str], activation: str) -> bool:
    """Whether the layer's class computes down(act(gate(x)) · up(x)), with numbers in the place of its layers."""
    steps = (lambda x: 0.5 * x + 0.25, lambda x: x - 1.0, lambda x: 3.0 * x)
    stand_in = types.SimpleNamespace(**{k: v for k, v in vars(module).items() if not k.startswith("_")})
    for name, child in module.named_children():
        setattr(stand_in, name, child)
    for name, step in zip((*names, "dropout"), (*steps, lambda x: x), strict=True):
        setattr(stand_in, name, _Step(step))
    x = torch.linspace(-2, 2, 12).view(1, 3, 4)
    wanted = steps[2](KNOWN[activation](steps[0](x)) * steps[1](x))
    try:
        forward: Any = type(module).forward
        return torch.allclose(forward(stand_in, x), wanted, atol=1e-5)
    except Exception:  # whatever it wants, a plain gated layer does not
        return False


class _Step(nn.Module):
    """A linear layer's place, with a number for a weight."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._step = step
        self.weight = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """What stands for the product."""
        return self._step(x)
