"""Whether trained tensors are whole when they are saved: what was gathered from many ranks may lack parts.

Refused are a tensor of another shape than the model has, values that are not finite, zeros in the place of values that
some rank holds, and an adapter none of which has changed in steps that should have changed it. A single tensor that has
not changed is only named: a part of the model that no example reaches gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from shardtune.errors import NumbersError
from shardtune.protocols import Strategy, Weights
from shardtune.world import World

LOST_SHARE = 0.01
"""Of the values that ranks hold: some may differ, as an optimizer that averages saves other values than it trains."""
NAMED = 5


def held_values(strategy: Strategy, shapes: Mapping[str, torch.Size], world: World) -> dict[str, int]:
    """How many values other than zero all ranks hold of each trained parameter. All ranks call it."""
    counts = dict.fromkeys(shapes, 0)
    for shard in strategy.shards():
        counts[shard.name] += int(shard.value.count_nonzero())
    return dict(zip(counts, map(int, world.sum([float(count) for count in counts.values()])), strict=True))


def whole(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size], held: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The same trained tensors, gathered from all ranks; `shapes` are those that the model had before it was spread
    over ranks, `held` how many values of each are not zero there.

    Raises NumbersError where one is missing, has another shape, is not finite, or has lost values.
    """
    missing = dict(shapes)
    for name, tensor in tensors:
        expected = missing.pop(name)
        if tensor.shape != expected:
            raise _wrong(f"{name} has shape {list(tensor.shape)}, not {list(expected)}")
        check_finite(name, tensor)
        lost = held[name] - int(tensor.count_nonzero())
        if lost > LOST_SHARE * held[name]:
            raise _wrong(f"{lost:,} of the {held[name]:,} values of {name} that the ranks hold are zero in it")
        yield name, tensor
    if missing:
        raise _wrong(f"{len(missing)} trained tensors are missing, such as {next(iter(missing))}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NumbersError where `tensor` has values that are not finite; it may be empty, as AdaLoRA's of rank 0."""
    finite = tensor.isfinite()
    if not finite.all():
        count = int((~finite).sum())
        raise _wrong(
            f"{count:,} of the {tensor.numel():,} values of {name} are not finite", "a lower optimizer.lr may help"
        )


def check_changes(trained: Mapping[str, Tensor], initial: Weights, updated: bool) -> list[str]:
    """Compares an adapter with what it began as; `updated`: there were steps with a learning rate above 0.

    Returns lines that name what has not changed. Raises NumbersError where nothing has.
    """
    unchanged = []
    for name, tensor in trained.items() if updated else ():
        start = initial.read(name, 0, tensor.numel()).to(initial.dtype(name)).float().view(tensor.shape)
        if torch.equal(tensor.float(), start):
            unchanged.append(name)
    if not unchanged:
        return []
    if len(unchanged) == len(trained):
        raise _wrong(
            "none of the trained tensors has changed",
            "see grad_norm in metrics.jsonl; a higher optimizer.lr, or tuning.dtype: float32, may help",
        )
    names = ", ".join(unchanged[:NAMED]) + (", …" if len(unchanged) > NAMED else "")
    return [
        f"{len(unchanged):,} of the {len(trained):,} trained tensors are as they began, so no example reached them: "
        + names
    ]


def _wrong(what: str, hint: str = "train with strategy.kind: single or ddp, and please report this") -> NumbersError:
    return NumbersError(f"final: the result is not whole, and was not written: {what}; {hint}")
