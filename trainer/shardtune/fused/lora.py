"""Linear layers with adapters: one operation for each, and one for all that read the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardtune.fused.linears import Layer, base_of, has_adapter, is_four_bit, refusal
from shardtune_kernels import four_bit_linear, lora_linear, lora_qkv

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"), ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)  # fmt: skip
"""Children of one module that read the same input, as architectures call them."""
OTHER_INPUT = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
"""In the names of attention whose keys and values are read from elsewhere."""


def fuse_lora(model: nn.Module, done: set[nn.Module], device: torch.device) -> tuple[int, dict[str, int]]:
    """Fuses layers with adapters that are not in `done`, to which they are added, and groups those that read the same
    input, plain ones among them. How many have become fused, and why others were not, counted."""
    reasons: dict[str, int] = {}
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        if has_adapter(module) and module not in done:
            reason = refusal(module, device)
            if reason is not None:
                reasons[reason] = reasons.get(reason, 0) + 1
                continue
            module.forward = _alone(Layer(module), module.forward)
            fused.add(module)
        group = _group(name, module, done, device)
        if group:
            together = _Together([Layer(member) for member in group])
            for index, member in enumerate(group):
                member.forward = together.forward_of(index, member.forward)
                fused.add(member)
                done.update((member, base_of(member)))
    done |= fused | {base_of(module) for module in fused}
    return len(fused), reasons


def fuse_four_bit(model: nn.Module, done: set[nn.Module], device: torch.device) -> tuple[int, dict[str, int]]:
    """Fuses layers in four bits that no other operation reads."""
    count, reasons = 0, {}
    for module in model.modules():
        if not hasattr(module, "four_bit") or module in done:
            continue
        reason = refusal(module, device)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        module.forward = _four_bit(Layer(module))
        done.add(module)
        count += 1
    return count, reasons


def _four_bit(layer: Layer) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        return four_bit_linear(layer.cast(x), layer.base.four_bit(), layer.base.bias).to(x.dtype)

    return forward


def _alone(layer: Layer, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not layer.is_plain():
            return original(x, *args, **kwargs)
        return lora_linear(layer.cast(x), layer.weights(), layer.dropout())

    return forward


def _group(name: str, module: nn.Module, done: set[nn.Module], device: torch.device) -> list[nn.Module]:
    """The children of `module` that read the same input, if one has an adapter and all can be fused."""
    if any(part in name.lower() for part in OTHER_INPUT):
        return []
    children = dict(module.named_children())
    for names in SAME_INPUT:
        members = [children[child] for child in names if child in children]
        fit = len(members) == len(names) and not any(m in done or refusal(m, device) is not None for m in members)
        if fit and any(has_adapter(m) for m in members) and len({is_four_bit(m) for m in members}) == 1:
            return members
    return []


class _Together:
    """Layers that are called one after the other with the same input: the first call computes all of them."""

    def __init__(self, members: Sequence[Layer]) -> None:
        self._members = members
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def forward_of(self, index: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The forward of member `index`. Called with another input than the first member was, it is computed alone."""
        alone, member = _alone(self._members[index], original), self._members[index]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._input is x and index in self._waiting:
                out = self._waiting.pop(index)
                if not self._waiting:
                    self._input = None
                return out
            self._input, self._waiting = None, {}
            plain = not (args or kwargs) and all(other.is_plain() for other in self._members)
            if index or not plain or torch.compiler.is_compiling():
                return alone(x, *args, **kwargs)
            rate = max(other.dropout() for other in self._members)
            first, *others = lora_qkv(member.cast(x), [other.weights() for other in self._members], rate)
            self._input, self._waiting = x, dict(enumerate(others, start=1))
            return first

        return forward
