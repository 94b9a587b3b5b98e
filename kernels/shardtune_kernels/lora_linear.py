"""Linear layers with a low-rank adapter, each or several that read one input as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardtune_kernels import _lora_products as products
from shardtune_kernels._lora_flat import is_flat, lora_linear_flat
from shardtune_kernels._lora_kernels import BUILDS as BUILDS
from shardtune_kernels.dropout import draw_seed as draw_seed
from shardtune_kernels.dropout import draw_seeds, dropped_steps
from shardtune_kernels.weights import FourBitWeight, LoraWeights

_Settings = tuple[int, float, list[float], list[FourBitWeight | None]]
"""Dropout in steps and as it was given; each layer's scale and weight, if that is in four bits."""


def lora_linear(x: Tensor, w: LoraWeights, dropout: float = 0.0, seed: int | None = None) -> Tensor:
    """x [..., k] -> [..., n]: x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ (Hu et al. 2021, arXiv:2106.09685).

    Dropout (Srivastava et al. 2014) is drawn from `seed`, or from one of torch's random stream of the CPU, and once
    more in the backward: `dropout.dropout_mask(seed, dropout, x.shape, x.device)` is what was kept. Computed in the
    dtype of x, or of autocast; the gradients of x and of what is trained of `w` have the dtypes of these. Saved for
    backward are x and drop(x) Aᵀ [..., r]; weights are looked at again. Without an adapter (`w.a` is None) it is a
    plain linear layer. Raises ValueError for shapes that do not fit, and unless 0 <= dropout < 1.
    """
    if is_flat(x, w, dropout):
        try:
            return lora_linear_flat(x, w)
        except RuntimeError:
            _check(x, w)
            raise
    (y,) = lora_qkv(x, (w,), dropout, None if seed is None else (seed,))
    return y


def lora_qkv(
    x: Tensor, weights: Sequence[LoraWeights], dropout: float = 0.0, seeds: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """x [..., k] -> [..., n] for each of any number of layers that read the same x, as `lora_linear` of each.

    The adapters' A are applied together, x read once; each has a mask of its own, of `seeds[i]`, and the gradients of
    x are summed in one buffer.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return lora_qkv(x.to(torch.get_autocast_dtype(device)), weights, dropout, seeds)
    scales, quantized, tensors = [], [], []
    for w in weights:
        _check(x, w)
        weight = w.weight
        scales.append(w.scale)
        if isinstance(weight, FourBitWeight):
            quantized.append(weight)
            tensors += (None, w.bias, w.a, w.b)
        else:
            quantized.append(None)
            tensors += (weight, w.bias, w.a, w.b)
    steps = dropped_steps(dropout)
    drawn = None
    if steps:
        adapted = [index for index, w in enumerate(weights) if w.a is not None]
        drawn = (draw_seeds(len(scales)) if seeds is None else torch.tensor(seeds, device="cpu"))[adapted]
    return _LoraLinears.apply(x, drawn, (steps, dropout, scales, quantized), *tensors)


def _check(x: Tensor, w: LoraWeights) -> None:
    n, k = w.weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {n} outputs and {k} inputs")
    if w.bias is not None and w.bias.shape != (n,):
        raise ValueError(f"a bias {tuple(w.bias.shape)} does not fit a weight of {n} outputs")
    if w.a is None or w.b is None:
        if w.a is not w.b:
            raise ValueError("an adapter has both a and b, or neither")
        return
    r = len(w.a)
    if w.a.shape != (r, k) or w.b.shape != (n, r):
        raise ValueError(f"a {tuple(w.a.shape)} and b {tuple(w.b.shape)} do not fit a weight ({n}, {k})")


class _LoraLinears(torch.autograd.Function):
    """Arguments after the third: weight (None if in four bits), bias, a and b of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor | None, settings: _Settings, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        layers = _layers(settings, tensors)
        x_mk = products.unit_stride(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
        dropout = _dropout(settings, seeds)
        a, rank = _stacked_a(layers, x.dtype, dropout)
        xa = None if a is None else products.down(x_mk, a, dropout)
        outputs, column = [], 0
        for w in layers:
            y = None
            if xa is not None and w.b is not None:
                own = xa if len(layers) == 1 else xa[:, column : column + w.b.shape[1]]
                y = products.up(own, w.b, w.scale, w.bias)
                column += rank
            y = products.base_product(x_mk, w.weight, y, w.bias)
            outputs.append(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]))
        of_weights, of_b = ctx.needs_input_grad[3::4], ctx.needs_input_grad[6::4]
        needs_x = dropout is not None or any(of_weights) or any(ctx.needs_input_grad[5::4])
        ctx.save_for_backward(x_mk if needs_x else None, xa if any(of_b) else None, seeds, *tensors)
        ctx.settings, ctx.shape = settings, x.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, xa, seeds, *tensors = ctx.saved_tensors
        layers = _layers(ctx.settings, tensors)
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needs)
        dys = [dy if dy is None or dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return tuple(found)
        dropout = _dropout(ctx.settings, seeds)
        a, rank = _stacked_a(layers, given.dtype, dropout)
        needs_da = any(needs[5::4])
        dx, da, dybs = None, None, []
        for index, (w, dy) in enumerate(zip(layers, dys, strict=True)):
            if w.b is None:
                continue
            if dy is None:
                dybs.append(given.new_zeros(given.shape[0], rank))
                continue
            own = None
            if needs[6 + 4 * index]:
                column = len(dybs) * rank
                own = xa if len(layers) == 1 else xa[:, column : column + w.b.shape[1]]
            dyb, db = products.up_gradients(dy, w.b, own, w.scale, needs[0] or needs_da)
            found[6 + 4 * index] = _cast(db, w.b.dtype)
            dybs.append(dyb)
        if a is not None and (needs[0] or needs_da):
            dyb = dybs[0] if len(dybs) == 1 else products.side_by_side(dybs, rank)
            dx, da = products.down_gradients(dyb, x, a, dropout, needs[0], needs_da)
        row = 0
        for index, (w, dy) in enumerate(zip(layers, dys, strict=True)):
            if da is not None and w.a is not None:
                if needs[5 + 4 * index]:
                    found[5 + 4 * index] = _cast(da[row : row + len(w.a)], w.a.dtype)
                row += rank
            if dy is None:
                continue
            if needs[0]:
                dx = products.base_product_backward(dy, w.weight, dx)
            if needs[3 + 4 * index]:
                found[3 + 4 * index] = _cast(torch.mm(dy.t(), x), w.weight.dtype)
            if needs[4 + 4 * index] and w.bias is not None:
                wide = torch.promote_types(dy.dtype, w.bias.dtype)
                found[4 + 4 * index] = _cast(dy.sum(0, dtype=wide), w.bias.dtype)
        if dx is not None:
            found[0] = dx if len(ctx.shape) == 2 else dx.view(ctx.shape)
        return tuple(found)


def _layers(settings: _Settings, tensors: Sequence[Any]) -> list[LoraWeights]:
    """The layers, of tensors as they are now: weights may have been gathered anew."""
    layers = []
    for index, (scale, quantized) in enumerate(zip(settings[2], settings[3], strict=True)):
        weight, bias, a, b = tensors[4 * index : 4 * index + 4]
        layers.append(LoraWeights(weight if quantized is None else quantized, bias, a, b, scale))
    return layers


def _dropout(settings: _Settings, seeds: Tensor | None) -> products.Dropout | None:
    return None if seeds is None else products.Dropout(seeds, settings[0], 1.0 / (1.0 - settings[1]))


def _stacked_a(
    layers: Sequence[LoraWeights], dtype: torch.dtype, dropout: products.Dropout | None
) -> tuple[Tensor | None, int]:
    """What `products.down` takes, and the rank of each layer in it."""
    matrices = [w.a for w in layers if w.a is not None]
    if not matrices:
        return None, 0
    rank = products.padded_rank([len(a) for a in matrices], dropout is not None)
    return products.stacked(matrices, dtype, rank), rank


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)
