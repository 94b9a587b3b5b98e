"""A gated feed-forward layer, all three of its linear layers with adapters or without, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardtune_kernels import _lora_layers as shared
from shardtune_kernels import reference
from shardtune_kernels._autograd import Function, once
from shardtune_kernels._rows import flattened, rows_of
from shardtune_kernels.gated_activation import activated, overwrite_with_gradients
from shardtune_kernels.weights import LoraWeights


@shared.in_autocasts_dtype
def lora_gated_mlp(
    x: Tensor,
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    activation: str = "silu",
    dropout: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """x [..., d] -> down(act(gate(x)) · up(x)) [..., d], each layer as `lora_linear`, the activation as
    `gated_activation`.

    Saved for backward are x, the outputs of gate and up [..., f], and the adapters' x Aᵀ and h Aᵀ [..., r]. Backward
    computes h = act(gate) · up again and writes the gradients over what was saved, so it can run only once: a second
    one, of a graph that was retained, is an error of autograd's. A gradient of the size of a weight is made only for
    one that is trained.

    `dropout` is of the inputs of the adapters, each with its own mask, drawn from the three `seeds`, or from torch's
    random stream of the CPU; x of gate and up, h [m, f] of down. Adapters may be missing. Computed in the dtype of x,
    or of autocast.

    Raises:
        ValueError: an unknown activation, shapes that do not fit, or not 0 <= dropout < 1.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    for w in (gate, up):
        shared.check(x.shape[-1], w)
    inner = gate.weight.shape[0]
    if up.weight.shape[0] != inner or down.weight.shape[1] != inner:
        raise ValueError(
            f"gate has {inner} outputs: up, with {up.weight.shape[0]}, must have as many, and down, with "
            f"{down.weight.shape[1]}, as many inputs"
        )
    shared.check(inner, down)
    drawn, settings, tensors = shared.of_autograd((gate, up, down), dropout, seeds)
    return _LoraGatedMlp.apply(x, drawn, settings, activation, *tensors)


class _LoraGatedMlp(Function):
    """Arguments after the fourth: weight (None if in four bits), bias, a and b of gate, up and down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, settings: shared.Settings, activation: str, *tensors: Tensor | None
    ) -> Tensor:
        layers = shared.layers_of(settings, tensors)
        first, second = layers[:2], layers[2:]
        x_md = rows_of(x)
        (gate, up), xa = shared.outputs_of(x_md, first, shared.dropout_of(settings, seeds, first))
        h = activated(gate, up, activation)
        (y,), ha = shared.outputs_of(h, second, shared.dropout_of(settings, seeds, second, 2))
        of_gate_b, of_up_b, of_down_b = ctx.needs_input_grad[4 + shared.B :: 4]
        ctx.save_for_backward(
            x_md, gate, up, xa if of_gate_b or of_up_b else None, ha if of_down_b else None, seeds, *tensors
        )
        ctx.settings, ctx.activation, ctx.shape = settings, activation, x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, xa, ha, seeds, *tensors = ctx.saved_tensors
        layers = shared.layers_of(ctx.settings, tensors)
        first, second = layers[:2], layers[2:]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        needs_h = needs_x or any(needs[:8])
        found: list[Tensor | None] = [None] * len(needs)
        dropout = shared.dropout_of(ctx.settings, seeds, second, 2)
        outer = shared.Gradients(second, [flattened(dy)], needs[8:], found, 8, dropout)
        dyb = outer.of_b(ha, needs_h)
        if needs_h:
            h = outer.of_x(dyb, gate)  # its gradient, which h itself takes the place of; gate lends its shape
            overwrite_with_gradients(h, gate, up, ctx.activation)
        else:
            h = activated(gate, up, ctx.activation)
        outer.of_a_and_weight(dyb, h)
        dx = None
        if needs_h:
            del h
            dropout = shared.dropout_of(ctx.settings, seeds, first)
            inner = shared.Gradients(first, [gate, up], needs[:8], found, 0, dropout)
            dx = inner.of_all(inner.of_b(xa, needs_x), x, needs_x)
        return None if dx is None else dx.view(ctx.shape), None, None, None, *found
