"""What layers with adapters that read one input share: their outputs, their gradients, and what autograd is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from shardtune_kernels import _lora_products as products
from shardtune_kernels._rows import unit_stride
from shardtune_kernels.dropout import draw_seeds, dropped_steps
from shardtune_kernels.weights import FourBitWeight, LoraWeights

WEIGHT, BIAS, A, B = range(4)
"""Where a layer's tensors are among its four."""
Op = TypeVar("Op", bound=Callable[..., Any])


class Settings(NamedTuple):
    """Of layers: what is no tensor of autograd's."""

    steps: int
    """Dropout as `dropped_steps` says, and as it was given."""
    rate: float
    scales: list[float]
    """Of each layer; and its weight, if that is in four bits."""
    quantized: list[FourBitWeight | None]


def in_autocasts_dtype(op: Op) -> Op:
    """Of an op whose first argument is x: computed in the dtype of autocast, where that is on."""

    @wraps(op)
    def run(x: Tensor, *given: Any, **named: Any) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return op(x, *given, **named)
        with torch.autocast(device, enabled=False):
            return op(x.to(torch.get_autocast_dtype(device)), *given, **named)

    return cast(Op, run)


def check(width: int, w: LoraWeights) -> None:
    """ValueError unless the layer is one for an x [..., width]."""
    n, k = w.weight.shape
    if width != k:
        raise ValueError(f"x [..., {width}] does not fit a weight of {n} outputs and {k} inputs")
    if w.bias is not None and w.bias.shape != (n,):
        raise ValueError(f"a bias {tuple(w.bias.shape)} does not fit a weight of {n} outputs")
    if w.a is None or w.b is None:
        if w.a is not w.b:
            raise ValueError("an adapter has both a and b, or neither")
        return
    r = len(w.a)
    if w.a.shape != (r, k) or w.b.shape != (n, r):
        raise ValueError(f"a {tuple(w.a.shape)} and b {tuple(w.b.shape)} do not fit a weight ({n}, {k})")


def of_autograd(
    layers: Sequence[LoraWeights], rate: float, seeds: Sequence[int] | None
) -> tuple[Tensor | None, Settings, list[Tensor | None]]:
    """A seed for each layer, if anything is dropped, drawn if not given; settings; and four tensors of each layer:
    weight (None if in four bits), bias, a and b. ValueError unless 0 <= rate < 1."""
    steps = dropped_steps(rate)
    if seeds is not None and len(seeds) != len(layers):
        raise ValueError(f"there must be a seed for each of {len(layers)} layers, not {len(seeds)}")
    drawn = None
    if steps:
        drawn = draw_seeds(len(layers)) if seeds is None else torch.tensor(seeds)
    quantized, tensors = [], []
    for w in layers:
        in_four_bits = isinstance(w.weight, FourBitWeight)
        quantized.append(w.weight if in_four_bits else None)
        tensors += (None if in_four_bits else w.weight, w.bias, w.a, w.b)
    return drawn, Settings(steps, rate, [w.scale for w in layers], quantized), tensors


def layers_of(settings: Settings, tensors: Sequence[Any]) -> list[LoraWeights]:
    """The layers, of tensors as they are now: weights may have been gathered anew."""
    layers = []
    for index, (scale, quantized) in enumerate(zip(settings.scales, settings.quantized, strict=True)):
        weight, bias, a, b = tensors[4 * index : 4 * index + 4]
        layers.append(LoraWeights(weight if quantized is None else quantized, bias, a, b, scale))
    return layers


def dropout_of(
    settings: Settings, seeds: Tensor | None, layers: Sequence[LoraWeights], first: int = 0
) -> products.Dropout | None:
    """Of those among the layers that have an adapter; `first`: where the layers' seeds begin."""
    adapted = [first + index for index, w in enumerate(layers) if w.a is not None]
    if seeds is None or not adapted:
        return None
    own = seeds if len(adapted) == len(seeds) else seeds[adapted]
    return products.Dropout(own, settings.steps, 1.0 / (1.0 - settings.rate))


def outputs_of(
    x: Tensor, layers: Sequence[LoraWeights], dropout: products.Dropout | None
) -> tuple[list[Tensor], Tensor | None]:
    """y [m, n] of each layer, and drop(x) Aᵀ [m, p·r] of those with adapters, side by side."""
    a, rank = _stacked_a(layers, x.dtype, dropout)
    xa = None if a is None else products.down(unit_stride(x), a, dropout)
    outputs, column = [], 0
    for w in layers:
        y = None
        if xa is not None and w.b is not None:
            y = products.up(_columns(xa, column, w.b), w.b, w.scale, w.bias)
            column += rank
        outputs.append(products.base_product(x, w.weight, y, w.bias))
    return outputs, xa


class Gradients:
    """Of layers that read one input: into `found`, from `first` on, what `needs` says, four of each layer.

    `dys`: gradients of the outputs [m, n], None of an output that nobody used; there is at least one.
    """

    def __init__(
        self, layers: Sequence[LoraWeights], dys: Sequence[Tensor | None], needs: Sequence[bool],
        found: list[Tensor | None], first: int, dropout: products.Dropout | None,
    ) -> None:  # fmt: skip
        self._layers, self._dys, self._needs, self._found, self._first = layers, dys, needs, found, first
        self._dropout, self._some_dy = dropout, next(dy for dy in dys if dy is not None)
        self._a, self._rank = _stacked_a(layers, self._some_dy.dtype, dropout)

    def of_b(self, xa: Tensor | None, needs_x: bool) -> Tensor | None:
        """And, returned, of xa [m, p·r], if something before it needs one."""
        needs_dyb = needs_x or any(self._needs[A::4])
        parts: list[Tensor] = []
        column = 0
        for index, (w, dy) in enumerate(zip(self._layers, self._dys, strict=True)):
            if w.b is None:
                continue
            own = _columns(xa, column, w.b) if self._needs[4 * index + B] and xa is not None else None
            column += self._rank
            if dy is None:
                dyb = self._some_dy.new_zeros(len(self._some_dy), self._rank) if needs_dyb else None
            elif needs_dyb or own is not None:
                dyb, db = products.up_gradients(dy, w.b, own, w.scale, needs_dyb)
                self._note(index, B, db, w.b)
            else:
                continue
            if dyb is not None:
                parts.append(dyb)
        if not parts:
            return None
        return products.side_by_side(parts, self._rank)

    def of_x(self, dyb: Tensor | None, like: Tensor) -> Tensor:
        """[m, k], the shape of `like`."""
        dx, _ = self._of_down(dyb, like, True, False)
        return self._of_base(dx)

    def of_a_and_weight(self, dyb: Tensor | None, x: Tensor) -> None:
        """And of biases."""
        _, da = self._of_down(dyb, x, False, any(self._needs[A::4]))
        self._note_a(da)
        self._of_weights(x)

    def of_all(self, dyb: Tensor | None, x: Tensor | None, needs_x: bool) -> Tensor | None:
        """The two above at once: x is read once, if at all; None where no gradient looks at it."""
        dx, da = self._of_down(dyb, x, needs_x, any(self._needs[A::4]))
        self._note_a(da)
        self._of_weights(x)
        return self._of_base(dx) if needs_x else None

    def _of_down(
        self, dyb: Tensor | None, x: Tensor | None, needs_dx: bool, needs_da: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if self._a is None or dyb is None or not (needs_dx or needs_da):
            return None, None
        own = None if x is None else unit_stride(x)
        return products.down_gradients(dyb, own, self._a, self._dropout, needs_dx, needs_da)

    def _of_base(self, dx: Tensor | None) -> Tensor:
        for w, dy in zip(self._layers, self._dys, strict=True):
            if dy is not None:
                dx = products.base_product_backward(dy, w.weight, dx)
        assert dx is not None
        return dx

    def _of_weights(self, x: Tensor | None) -> None:
        for index, (w, dy) in enumerate(zip(self._layers, self._dys, strict=True)):
            if dy is None:
                continue
            if self._needs[4 * index + WEIGHT] and x is not None:
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
        if gradient is not None:
            self._found[self._first + 4 * index + which] = gradient.to(of.dtype)


def _stacked_a(
    layers: Sequence[LoraWeights], dtype: torch.dtype, dropout: products.Dropout | None
) -> tuple[Tensor | None, int]:
    """What `products.down` takes, and the rank of each layer in it."""
    matrices = [w.a for w in layers if w.a is not None]
    if not matrices:
        return None, 0
    rank = products.padded_rank([len(a) for a in matrices], dropout is not None)
    return products.stacked(matrices, dtype, rank), rank


def _columns(xa: Tensor, first: int, b: Tensor) -> Tensor:
    """Of a layer's own, without what it is padded with."""
    width = b.shape[1]
    return xa if xa.shape[1] == width else xa[:, first : first + width]
