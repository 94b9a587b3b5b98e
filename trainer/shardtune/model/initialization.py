"""Random weights without ever holding the model: initialization is recorded on the meta device and replayed.

An architecture says in its own code how its parameters are initialized. `Recorder` watches that code run on meta
tensors and keeps, for each parameter, the operations that would have filled it. `Recipe.draw` repeats them for any
range of elements, with random numbers seeded by (seed, parameter name, operation, chunk): each rank draws just what
it keeps, and every layout draws the same values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CHUNK = 1 << 16
"""Elements drawn with one seed; part of what makes a seed's weights, so it never changes."""

RANDOM = {"normal_", "uniform_", "bernoulli_", "exponential_"}
ELEMENTWISE = {"fill_", "zero_", "mul_", "add_", "sub_", "div_", "clamp_", "clamp_min_", "clamp_max_", "erfinv_"}


@dataclass(frozen=True)
class Operation:
    """One in-place operation on the elements `start` to `stop` of a flattened parameter."""

    name: str
    start: int
    stop: int
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    values: Tensor | None = None
    """What `copy_` copies."""

    def apply(self, out: Tensor, begin: int, seed: str) -> None:
        """Fills `out`, which holds the elements of this operation's region from `begin` on."""
        if self.values is not None:
            out.copy_(self.values[begin : begin + out.numel()])
        elif self.name in RANDOM:
            self._draw(out, begin, seed)
        else:
            getattr(out, self.name)(*self.arguments, **self.keywords)

    def _draw(self, out: Tensor, begin: int, seed: str) -> None:
        end = begin + out.numel()
        for chunk in range(begin // CHUNK, -(-end // CHUNK)):
            digest = hashlib.sha256(f"{seed}:{chunk}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            drawn = torch.empty(CHUNK)
            getattr(drawn, self.name)(*self.arguments, generator=generator)
            first = chunk * CHUNK
            low, high = max(begin, first), min(end, first + CHUNK)
            out[low - begin : high - begin].copy_(drawn[low - first : high - first])


@dataclass
class Recipe:
    """How one parameter is filled."""

    name: str | None = None
    """The parameter's name in the model as transformers builds it; seeds the random numbers."""
    operations: list[Operation] = field(default_factory=list)

    def covers(self, elements: int) -> bool:
        """Whether some operation fills the whole parameter."""
        return any(op.start == 0 and op.stop == elements for op in self.operations)

    def draw(self, seed: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`, float32, 1-D."""
        out = torch.empty(stop - start)
        for index, op in enumerate(self.operations):
            low, high = max(start, op.start), min(stop, op.stop)
            if low < high:
                op.apply(out[low - start : high - start], low - op.start, f"{seed}:{self.name}:{index}")
        return out


class Recorder(TorchDispatchMode):
    """Records what is done to meta tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, Recipe] = {}
        self._alive: list[Any] = []  # a storage's address identifies it only while the storage lives

    def recipe(self, tensor: Tensor) -> Recipe:
        """The recipe of the whole storage that `tensor` is a view of."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._recipes:
            self._recipes[storage._cdata] = Recipe()
            self._alive.append(storage)
        return self._recipes[storage._cdata]

    def replaced(self, old: Tensor, new: Tensor) -> None:
        """What was recorded of one parameter is that of another: the same values, stored in another way."""
        self._recipes[new.untyped_storage()._cdata] = self.recipe(old)
        self._alive.append(new.untyped_storage())

    def name_parameters(self, model: nn.Module) -> None:
        """Gives each recipe its parameter's present name."""
        for name, parameter in model.named_parameters():
            self.recipe(parameter).name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and notes it where it fills or copies a meta tensor."""
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not target.is_meta:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "clone":
            result = func(*args, **kwargs)
            copied = self.recipe(target)
            fresh = self.recipe(result)
            fresh.name, fresh.operations = copied.name, list(copied.operations)
            return result
        if name == "copy_" and not args[1].is_meta:
            self._note(target, name, (), {}, args[1].detach().float().flatten().clone())
            return target
        if name in RANDOM | ELEMENTWISE:
            keywords = {k: v for k, v in kwargs.items() if k != "generator"}
            self._note(target, name, args[1:], keywords, None)
            return target
        result = func(*args, **kwargs)
        if name.endswith("_") and not name.endswith("__"):
            raise NotImplementedError(f"weights initialized with `{name}` cannot be drawn piece by piece")
        return result

    def _note(
        self, target: Tensor, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], values: Tensor | None
    ) -> None:
        if not target.is_contiguous() or any(isinstance(a, Tensor) for a in arguments):
            raise NotImplementedError(f"`{name}` on a strided view cannot be drawn piece by piece")
        start = int(target.storage_offset())
        self.recipe(target).operations.append(
            Operation(name, start, start + target.numel(), arguments, keywords, values)
        )
