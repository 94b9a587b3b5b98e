"""The repeated layers of a model."""

from __future__ import annotations

from torch import nn


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules by name: the layers of the encoder, of the decoder, or of the only stack.

    What is listed inside a layer (T5's blocks are lists of sublayers) is no stack.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            stacks[name] = module
    return stacks


def layer_names(model: nn.Module) -> list[str]:
    """Names of all layers."""
    return [f"{name}.{index}" for name, stack in layer_stacks(model).items() for index in range(len(stack))]


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the parameters of embedding layers, and of output layers that share them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in embeddings}


def matrix_names(model: nn.Module) -> set[str]:
    """Names of the 2-D parameters inside layers that are no embeddings."""
    inside = tuple(f"{name}." for name in layer_stacks(model))
    embeddings = embedding_names(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and name.startswith(inside) and name not in embeddings
    }
