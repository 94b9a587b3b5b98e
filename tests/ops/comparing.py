"""An op beside its reference in float64: values and every gradient, as relative norms of what differs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardtune_kernels._launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT32_LIMIT = 1e-5
WORSE = 1.5
"""In 16 bits an op's error may be so many times that of the reference computed in the same dtype."""
DRAWS = 7
"""More draws, where the first is beyond that."""
Outputs = Tensor | tuple[Tensor, ...]


def seed_everything(seed: int) -> random.Random:
    """Seeds torch, and a generator for shapes."""
    torch.manual_seed(seed)
    return random.Random(seed)


def agree(
    op: Callable[..., Outputs],
    truth: Callable[..., Outputs],
    tensors: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    said: object = "",
    dtypes: Mapping[str, torch.dtype] | None = None,
    trained: Mapping[str, bool] | None = None,
) -> None:
    """Fails unless `op(**tensors)` in `dtype` is as near to `truth(**tensors)` in float64 as it should be.

    `tensors`: float64, or integer ones that stay what they are; `dtypes`: of those that have another dtype than
    `dtype`; `trained`: which floating ones need no gradient. Both functions get all by name. `said` is printed on
    failure: shapes and seed.
    """
    found = errors(op, truth, tensors, dtype, said, dtypes, trained)
    if any(off > limit(plain) and plain is not None for off, plain in found.values()):
        # In 16 bits a few numbers may be rounded luckily by the reference: the mean of several draws is not luck.
        draws = [errors(op, truth, _drawn_again(tensors), dtype, said, dtypes, trained) for _ in range(DRAWS)]
        found = {name: _mean([found[name], *(draw[name] for draw in draws)]) for name in found}
    for name, (off, plain) in found.items():
        allowed = limit(plain)
        assert off <= allowed, f"{said}: {name} in {dtype} is off by {off:.3g}, allowed are {allowed:.3g}"


def _drawn_again(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Other floating values of the same shapes, strides and size: half as large to one and a half times."""
    again: dict[str, Tensor | None] = {}
    for name, value in tensors.items():
        if value is None or not value.is_floating_point():
            again[name] = value
            continue
        again[name] = _like(value, value.dtype)
        again[name].mul_(torch.rand(value.shape, dtype=value.dtype).to(value.device) + 0.5)  # pyright: ignore
    return again


def _mean(pairs: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Root mean squares of the op's errors and of the reference's."""
    offs, plains = zip(*pairs, strict=True)
    if None in plains:
        return offs[0], None
    return tuple((sum(x**2 for x in column) / len(column)) ** 0.5 for column in (offs, plains))  # pyright: ignore


def limit(plain: float | None) -> float:
    """The error that is allowed where the reference's, in the same 16 bits, is `plain`; None: in float32."""
    return FLOAT32_LIMIT if plain is None else max(WORSE * plain, FLOAT32_LIMIT)


def errors(
    op: Callable[..., Outputs],
    truth: Callable[..., Outputs],
    tensors: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    said: object = "",
    dtypes: Mapping[str, torch.dtype] | None = None,
    trained: Mapping[str, bool] | None = None,
) -> dict[str, tuple[float, float | None]]:
    """Of each output and gradient the error, and in 16 bits that of the reference in the same dtype; see `agree`."""
    rounded: dict[str, Tensor | None] = {}
    for name, value in tensors.items():
        if value is None or not value.is_floating_point():
            rounded[name] = None if value is None else value.to(DEVICE)
        else:
            rounded[name] = _like(value, (dtypes or {}).get(name, dtype))
    needed = [
        name for name, value in rounded.items()
        if value is not None and value.is_floating_point() and (trained or {}).get(name, True)
    ]  # fmt: skip
    own = _run(op, rounded, needed, None)
    exact = _run(truth, {n: v.double() if n in needed or _floats(v) else v for n, v in rounded.items()}, needed, None)
    plain = _run(truth, rounded, needed, None) if dtype.itemsize < 4 else None
    assert own.keys() == exact.keys(), (said, own.keys(), exact.keys())
    found: dict[str, tuple[float, float | None]] = {}
    for name, wanted in exact.items():
        got = own[name]
        assert got.shape == wanted.shape, f"{said}: {name} is {tuple(got.shape)}, not {tuple(wanted.shape)}"
        found[name] = distance(got, wanted), None if plain is None else distance(plain[name], wanted)
    return found


def distance(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, 2-norms; |got| where nothing but zeros is wanted."""
    if wanted.numel() == 0:
        return 0.0
    norm = wanted.double().norm()
    return float((got.double() - wanted.double()).norm() / (norm if norm > 0 else 1.0))


def _floats(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


def _run(function: Callable[..., Outputs], given: Mapping[str, Any], needed: list[str], _: None) -> dict[str, Tensor]:
    """Outputs and gradients by name; the gradients of the outputs are the same random numbers each time."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in needed}
    if given and any(not t.is_contiguous() for t in given.values() if isinstance(t, Tensor)):
        leaves = {name: _like(given[name]).requires_grad_() for name in needed}
    outputs = function(**{**given, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]
    moving = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    if moving and leaves:
        torch.autograd.backward([o for o, _ in moving], [g for _, g in moving])
    for name, leaf in leaves.items():
        found[f"gradient of {name}"] = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return found


def _like(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with the same strides, so that what was not contiguous stays so; `Tensor.to` closes gaps."""
    dtype = value.dtype if dtype is None else dtype
    if value.is_contiguous() or 0 in value.stride():
        return value.detach().to(DEVICE, dtype, copy=True)
    copy = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=DEVICE)
    return copy.copy_(value.detach())
