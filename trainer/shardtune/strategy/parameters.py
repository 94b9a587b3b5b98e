"""From a model on the meta device to one with values, parameter by parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from shardtune.memory import pages_of_their_own
from shardtune.protocols import Weights

READ_AT_ONCE = 1 << 24
"""Elements read at once: bounds what loading holds beside the parameters themselves."""


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Puts `make(name, parameter)` in the place of every parameter, everywhere it is shared.

    `make` is called once for each parameter, in the order of `named_parameters`.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, key))
    with pages_of_their_own():
        for name, parameter in list(model.named_parameters()):
            fresh = make(name, parameter)
            for module, key in places[parameter]:
                setattr(module, key, fresh)  # an LSTM keeps a list of its parameters, which this updates


def fill(out: Tensor, weights: Weights, name: str, start: int = 0) -> None:
    """Copies the elements of parameter `name` from `start` on into `out`, which is contiguous."""
    read_into(out, functools.partial(weights.read, name), start)


def read_into(out: Tensor, read: Callable[[int, int], Tensor], start: int) -> None:
    """Copies what `read` gives from element `start` on into `out`, which is contiguous."""
    flat = out.detach().view(-1)
    for low in range(0, flat.numel(), READ_AT_ONCE):
        high = min(low + READ_AT_ONCE, flat.numel())
        flat[low:high].copy_(read(start + low, start + high))


def materialize(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Gives every parameter its values, whole, on `device`; buffers move there too."""

    def make(name: str, parameter: nn.Parameter) -> nn.Parameter:
        data = torch.empty(parameter.shape, dtype=weights.dtype(name), device=device)
        fill(data, weights, name)
        return nn.Parameter(data, requires_grad=parameter.requires_grad)

    replace_parameters(model, make)
    fill_buffers(model, weights, device)


def fill_buffers(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Puts buffers, which every rank holds whole, on `device`; those on the meta device get their values."""
    for name, module in model.named_modules():
        buffers = {key: buffer for key, buffer in module._buffers.items() if buffer is not None}
        if any(buffer.is_meta for buffer in buffers.values()):
            buffers |= weights.buffers(name)
        for key, buffer in buffers.items():
            module._buffers[key] = buffer.to(device)


def held_bytes(parameter: nn.Parameter) -> int:
    """What this rank holds of a parameter between steps: all of it, its part of a DTensor, or its part under ZeRO-3
    (and all of it, too, where DeepSpeed keeps it whole because it is small)."""
    to_local = getattr(parameter.data, "to_local", None)
    if to_local is not None:
        return to_local().nbytes
    partition = getattr(parameter, "ds_tensor", None)
    return parameter.nbytes + (partition.nbytes if partition is not None else 0)


def parts(model: nn.Module, blocks: Collection[str]) -> list[nn.Module]:
    """The largest modules that hold no more than one of `blocks`, the names of the model's layers: these themselves,
    and those with none in them. Every parameter is in one of them, but for those that a module around layers has
    itself."""
    around = {"", *(name.rpartition(".")[0] for name in blocks)}
    for name in list(around):
        pieces = name.split(".")
        around |= {".".join(pieces[:length]) for length in range(len(pieces))}
    modules = dict(model.named_modules())
    return [
        module for name, module in modules.items()
        if name not in around and name.rpartition(".")[0] in around and any(True for _ in module.parameters())
    ]  # fmt: skip


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that gradients are computed for."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
