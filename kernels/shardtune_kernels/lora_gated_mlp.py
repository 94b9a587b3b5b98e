"""A gated feed-forward layer, all three of its linear layers with adapters or without, as one node of autograd."""

# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false, reportReturnType=false
# Options of a launch are no parameters of a kernel, and autograd's functions have parameters of their own.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardtune_kernels import _lora_products as products
from shardtune_kernels import reference
from shardtune_kernels.dropout import draw_seeds, dropped_steps
from shardtune_kernels.gated_activation import activated, overwrite_with_gradients
from shardtune_kernels.lora_linear import _cast, _check, _dropout, _layers, _Settings, _stacked_a
from shardtune_kernels.weights import FourBitWeight, LoraWeights

WEIGHT, BIAS, A, B = range(4)
"""Where a layer's tensors are among its four."""


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
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return lora_gated_mlp(x.to(torch.get_autocast_dtype(device)), gate, up, down, activation, dropout, seeds)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    _check(x, gate)
    _check(x, up)
    inner = gate.weight.shape[0]
    if up.weight.shape[0] != inner or down.weight.shape[1] != inner:
        raise ValueError(
            f"gate has {inner} outputs: up, with {up.weight.shape[0]}, must have as many, and down, with "
            f"{down.weight.shape[1]}, as many inputs"
        )
    _check(x.new_empty((0, inner)), down)
    if seeds is not None and len(seeds) != 3:
        raise ValueError(f"there must be a seed for each of gate, up and down, not {len(seeds)}")
    layers = (gate, up, down)
    quantized = [w.weight if isinstance(w.weight, FourBitWeight) else None for w in layers]
    tensors = [
        own for w in layers
        for own in (None if isinstance(w.weight, FourBitWeight) else w.weight, w.bias, w.a, w.b)
    ]  # fmt: skip
    steps = dropped_steps(dropout)
    drawn = None
    if steps:
        drawn = draw_seeds(3) if seeds is None else torch.tensor(seeds, device="cpu")
    settings = steps, dropout, [w.scale for w in layers], quantized
    return _LoraGatedMlp.apply(x, drawn, settings, activation, *tensors)


class _LoraGatedMlp(torch.autograd.Function):
    """Arguments after the fourth: weight (None if in four bits), bias, a and b of gate, up and down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, settings: _Settings, activation: str, *tensors: Tensor | None
    ) -> Tensor:
        layers = _layers(settings, tensors)
        x_md = products.unit_stride(x.reshape(-1, x.shape[-1]))
        (gate, up), xa = _outputs(x_md, layers[:2], _dropout_of(settings, seeds, layers, (0, 1)))
        h = activated(gate, up, activation)
        (y,), ha = _outputs(h, layers[2:], _dropout_of(settings, seeds, layers, (2,)))
        needs = ctx.needs_input_grad[4:]
        if not (needs[B] or needs[4 + B]):
            xa = None
        ctx.save_for_backward(x_md, gate, up, xa, ha if needs[8 + B] else None, seeds, *tensors)
        ctx.settings, ctx.activation, ctx.shape = settings, activation, x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate, up, xa, ha, seeds, *tensors = ctx.saved_tensors
        layers = _layers(ctx.settings, tensors)
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        needs_h = needs_x or any(needs[:8])
        found: list[Tensor | None] = [None] * len(needs)
        outer = _Gradients(layers[2:], needs[8:], found, 8, _dropout_of(ctx.settings, seeds, layers, (2,)))
        dys = [dy.reshape(-1, dy.shape[-1])]
        dyb = outer.of_b(dys, ha, needs_h)
        if needs_h:
            h = outer.of_x(dys, dyb, gate)  # its gradient, which h itself takes the place of; gate lends its shape
            overwrite_with_gradients(h, gate, up, ctx.activation)
        else:
            h = activated(gate, up, ctx.activation)
        outer.of_a_and_weight(dys, dyb, h)
        dx = None
        if needs_h:
            del h
            inner = _Gradients(layers[:2], needs[:8], found, 0, _dropout_of(ctx.settings, seeds, layers, (0, 1)))
            dyb = inner.of_b([gate, up], xa, needs_x)
            dx = inner.of_all([gate, up], dyb, x, needs_x)
        return None if dx is None else dx.view(ctx.shape), None, None, None, *found


class _Gradients:
    """Of layers that read one input: into `found`, from `first` on, what `needs` says, four of each layer."""

    def __init__(
        self, layers: Sequence[LoraWeights], needs: Sequence[bool], found: list[Tensor | None], first: int,
        dropout: products.Dropout | None,
    ) -> None:  # fmt: skip
        self._layers, self._needs, self._found, self._first, self._dropout = layers, needs, found, first, dropout
        self._a: Tensor | None = None
        self._rank = 0

    def of_b(self, dys: Sequence[Tensor], xa: Tensor | None, needs_x: bool) -> Tensor | None:
        """And, returned, of xa [m, p·r], if something before it needs one."""
        needs_dyb = needs_x or any(self._needs[A::4])
        self._a, self._rank = _stacked_a(self._layers, dys[0].dtype, self._dropout)
        parts: list[Tensor] = []
        column = 0
        for index, (w, dy) in enumerate(zip(self._layers, dys, strict=True)):
            if w.b is None:
                continue
            own = xa[:, column : column + w.b.shape[1]] if self._needs[4 * index + B] and xa is not None else None
            if needs_dyb or own is not None:
                dyb, db = products.up_gradients(dy, w.b, own, w.scale, needs_dyb)
                self._note(index, B, db, w.b)
                if dyb is not None:
                    parts.append(dyb)
            column += self._rank
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else products.side_by_side(parts, self._rank)

    def of_x(self, dys: Sequence[Tensor], dyb: Tensor | None, like: Tensor) -> Tensor:
        """[m, k], the shape of `like`."""
        dx = None
        if self._a is not None and dyb is not None:
            dx, _ = products.down_gradients(dyb, products.unit_stride(like), self._a, self._dropout, True, False)
        return self._of_base(dys, dx)

    def of_a_and_weight(self, dys: Sequence[Tensor], dyb: Tensor | None, x: Tensor) -> None:
        """And of biases."""
        if self._a is not None and dyb is not None and any(self._needs[A::4]):
            _, da = products.down_gradients(dyb, products.unit_stride(x), self._a, self._dropout, False, True)
            self._note_a(da)
        self._of_weights(dys, x)

    def of_all(self, dys: Sequence[Tensor], dyb: Tensor | None, x: Tensor, needs_x: bool) -> Tensor | None:
        """The two above at once: x is read once."""
        dx, needs_a = None, any(self._needs[A::4])
        if self._a is not None and dyb is not None and (needs_x or needs_a):
            own = products.unit_stride(x)
            dx, da = products.down_gradients(dyb, own, self._a, self._dropout, needs_x, needs_a)
            self._note_a(da)
        self._of_weights(dys, x)
        return self._of_base(dys, dx) if needs_x else None

    def _of_base(self, dys: Sequence[Tensor], dx: Tensor | None) -> Tensor:
        for w, dy in zip(self._layers, dys, strict=True):
            dx = products.base_product_backward(dy, w.weight, dx)
        assert dx is not None
        return dx

    def _of_weights(self, dys: Sequence[Tensor], x: Tensor) -> None:
        for index, (w, dy) in enumerate(zip(self._layers, dys, strict=True)):
            if self._needs[4 * index + WEIGHT]:
                self._note(index, WEIGHT, torch.mm(dy.t(), x), w.weight)
            if self._needs[4 * index + BIAS] and w.bias is not None:
                wide = torch.promote_types(dy.dtype, w.bias.dtype)
                self._note(index, BIAS, dy.sum(0, dtype=wide), w.bias)

    def _note_a(self, da: Tensor | None) -> None:
        row = 0
        for index, w in enumerate(self._layers):
            if w.a is None or da is None:
                continue
            if self._needs[4 * index + A]:
                self._note(index, A, da[row : row + len(w.a)], w.a)
            row += self._rank

    def _note(self, index: int, which: int, gradient: Tensor | None, of: Tensor | FourBitWeight) -> None:
        self._found[self._first + 4 * index + which] = _cast(gradient, of.dtype)


def _dropout_of(
    settings: _Settings, seeds: Tensor | None, layers: Sequence[LoraWeights], which: Sequence[int]
) -> products.Dropout | None:
    """Of those among the layers that have an adapter."""
    adapted = [index for index in which if layers[index].a is not None]
    return None if seeds is None or not adapted else _dropout(settings, seeds[adapted])


def _outputs(
    x: Tensor, layers: Sequence[LoraWeights], dropout: products.Dropout | None
) -> tuple[list[Tensor], Tensor | None]:
    """y [m, n] of each layer, and drop(x) Aᵀ [m, p·r] of those with adapters, side by side."""
    a, rank = _stacked_a(layers, x.dtype, dropout)
    xa = None if a is None else products.down(products.unit_stride(x), a, dropout)
    outputs, column = [], 0
    for w in layers:
        y = None
        if xa is not None and w.b is not None:
            y = products.up(xa[:, column : column + w.b.shape[1]], w.b, w.scale, w.bias)
            column += rank
        outputs.append(products.base_product(x, w.weight, y, w.bias))
    return outputs, xa
