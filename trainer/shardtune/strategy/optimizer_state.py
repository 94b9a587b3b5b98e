"""What an optimizer keeps of the parameters, as pieces of a checkpoint, and back.

It is kept by the parameters' names and ranges, whatever the optimizer itself has them in: the parameters, this rank's
rows of them, or many of them joined and split anywhere, as under ZeRO.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from shardtune.protocols import VALUE, Piece, Saved
from shardtune.strategy.parameters import read_into

GROUP = "group."
"""Before what is a number of the parameter's group, not of its state. No key of a state has a dot in it, so that a
tuning method can keep what it wants under names with one."""

COUNTED = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""Numbers of a group that steps change: those of schedule-free optimizers."""


class Part(NamedTuple):
    """Elements of a trained parameter that this rank's optimizer has."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Where the elements begin in the flattened parameter."""
    held: Tensor
    """What the optimizer has them in: the key of its state."""
    offset: int
    """Where they begin in `held`, flattened."""
    elements: int
    """How many they are."""

    def values(self, tensor: Tensor | None = None) -> Tensor:
        """Them in `held`, or what belongs to them in a tensor of the same shape: 1-D, the memory itself."""
        whole = self.held if tensor is None else tensor
        return whole.detach().view(-1)[self.offset : self.offset + self.elements]


def whole_part(name: str, shape: Iterable[int], start: int, held: Tensor) -> Part:
    """Of an optimizer that has nothing else in `held`."""
    return Part(name, tuple(shape), start, held, 0, held.numel())


def state_pieces(optimizer: torch.optim.Optimizer | None, parts: Iterable[Part]) -> Iterator[Piece]:
    """What `optimizer` keeps of `parts`; None: nothing.

    What has the shape of `held` is kept by the parameter's ranges; anything else (a number, the rows and columns of
    a factored moment, scales of 8-bit blocks) whole, by who has the parameter's first element.
    """
    if optimizer is None:
        return
    groups = {id(held): group for group in optimizer.param_groups for held in group["params"]}
    for part in parts:
        for what, value in optimizer.state.get(part.held, {}).items():
            if isinstance(value, Tensor) and value.shape == part.held.shape:
                yield Piece(part.name, what, part.shape, part.start, part.values(value))
            elif part.start == 0:
                yield _whole(part.name, what, value)
        if part.start == 0:
            group = groups.get(id(part.held), {})
            yield from (_whole(part.name, GROUP + key, group[key]) for key in COUNTED if key in group)


def restore_state(optimizer: torch.optim.Optimizer | None, parts: Iterable[Part], saved: Saved) -> None:
    """Gives `optimizer` what is saved of `parts`, in the dtypes in which it is saved; what is not saved begins anew."""
    if optimizer is None:
        return
    own: dict[Tensor, list[Part]] = {}
    for part in parts:
        own.setdefault(part.held, []).append(part)
    for index, group in enumerate(optimizer.param_groups):
        for position, held in enumerate(group["params"]):
            kept = _kept(own.get(held, []), saved)
            for what in [what for what in kept if what.startswith(GROUP)]:
                group[what.removeprefix(GROUP)] = _number(kept.pop(what), what, saved).item()
            if not kept:
                continue
            if hasattr(optimizer, "init_state"):  # bitsandbytes has its own memory for states: paged, or of 8 bits
                cast(Any, optimizer).init_state(group, held, index, position)
            state = optimizer.state[held]
            on_device = group.get("fused") or group.get("capturable")  # as torch's own optimizers have their step
            numbers = held.device if on_device else torch.device("cpu")
            for what, of in kept.items():
                _restore(state, what, held, of, saved, numbers)


def _kept(parts: Iterable[Part], saved: Saved) -> dict[str, list[Part]]:
    """What is saved for an optimizer, each with the parts that it is saved of."""
    kept: dict[str, list[Part]] = {}
    for part in parts:
        for what in saved.whats(part.name):
            if what != VALUE and ("." not in what or what.startswith(GROUP)):
                kept.setdefault(what, []).append(part)
    return kept


def _restore(
    state: dict[str, Any], what: str, held: Tensor, parts: list[Part], saved: Saved, numbers: torch.device
) -> None:
    first, *_ = parts
    shape = saved.whats(first.name)[what]
    if shape == () != first.shape:
        number = _number(parts, what, saved)
        in_python = number.dtype in (torch.int64, torch.float64)
        state[what] = number.item() if in_python else number.to(numbers)
        return
    if shape != first.shape:  # there is one part, and it is all that the optimizer has here
        flat = saved.read(first.name, what, 0, torch.Size(shape).numel())
        if what in state:
            state[what].view(-1).copy_(flat)
        else:
            state[what] = flat.view(shape).to(held.device)
        return
    if what not in state:
        dtype = saved.read(first.name, what, 0, 1).dtype
        state[what] = torch.zeros(held.shape, dtype=dtype, device=held.device)
    for part in parts:
        read_into(part.values(state[what]), functools.partial(saved.read, part.name, what), part.start)


def _number(parts: list[Part], what: str, saved: Saved) -> Tensor:
    """Of what is joined, the largest: a parameter that was not used in some steps may have counted fewer of them."""
    return torch.stack([saved.read(part.name, what, 0, 1)[0] for part in parts]).max()


def _whole(name: str, what: str, value: Tensor | float) -> Piece:
    """Of a tensor, or of a number of Python's, which has twice the bits that torch would give it."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    return Piece(name, what, tuple(value.shape), 0, value.detach().view(-1))
