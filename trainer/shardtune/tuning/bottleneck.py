"""Bottleneck adapters between frozen layers (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020,
arXiv:2005.00247)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune import bottleneck
from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.layers import layer_names
from shardtune.tuning.method import Method
from shardtune.tuning.targets import ATTENTION, describe, head


class BottleneckAdapters(Method):
    """Implements the Tuning protocol: an adapter behind the last linear layer of each part of a layer, before the
    residual connection; the base is frozen, normalizations included, and a classification head trained in full.

    `placement` pfeiffer: of the feed-forward part; houlsby: of each attention, too, also of the one over the encoder's
    states. The result is a whole model: transformers loads it with a small file of code that lies beside it.
    """

    def __init__(self, task: str, placement: str, size: int, activation: str, dropout: float) -> None:
        self._task = task
        self._placement = placement
        self._options = {"size": size, "activation": activation, "dropout": dropout}
        self._places: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Puts the adapters in place; those that `model` has already are trained further.

        Raises ConfigError where they cannot be placed, and where the present ones are others than the options say.
        """
        model = cast(PreTrainedModel, model)
        name = type(model).__name__
        if getattr(transformers, name, None) is not type(model):
            raise ConfigError(
                f"tuning.method: the code of {name} comes with its weights, and a model with adapters has code of its "
                "own; use lora"
            )
        self._places = output_layers(model, attention=self._placement == "houlsby")
        settings: dict[str, Any] = {"modules": self._places, **self._options}
        present: dict[str, Any] | None = getattr(model.config, bottleneck.SETTINGS, None)
        model.requires_grad_(False)
        if present is None:
            bottleneck.attach(model, settings)
        else:
            _check_same(present, settings)
        setattr(model.config, bottleneck.SETTINGS, settings)
        file = Path(bottleneck.__file__).stem
        model.config.auto_map = {HEADS[self._task].auto_class: f"{file}.{bottleneck.PREFIX}{name}"}
        for module in model.modules():
            if isinstance(module, bottleneck.Bottleneck):
                module.requires_grad_(True)
                module.dropout.p = settings["dropout"]
        for part in head(model, self._task) or []:
            model.get_submodule(part).requires_grad_(True)
        return model

    def notes(self) -> list[str]:
        """Where adapters are."""
        return [describe(self._places)]


def _check_same(present: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ConfigError where the adapters of a model are not those that the options describe."""
    if present["modules"] != wanted["modules"]:
        raise ConfigError(
            f"tuning.placement: the model has {len(present['modules'])} adapters in other places already; to train "
            "them further, give the placement that they have"
        )
    for key in ("size", "activation"):
        if present[key] != wanted[key]:
            raise ConfigError(f"tuning.{key}: the model has adapters already, whose {key} is {present[key]}")


def output_layers(model: PreTrainedModel, attention: bool) -> list[str]:
    """Names of the linear layers that end the feed-forward part of each layer and, with `attention`, each attention.

    They are found by their place: the last linear layer of its part, as wide as the model. Raises ConfigError where a
    layer has none such.
    """
    width = model.config.get_text_config().hidden_size
    names = layer_names(model)
    found = [place for name in names for place in _ends(model, name, width, attention)]
    if not found:
        raise ConfigError(f"tuning.method: a {model.config.model_type} model has no layers that adapters fit into")
    return found


def _ends(model: PreTrainedModel, layer: str, width: int, attention: bool) -> list[str]:
    """The output layers of one layer of the model."""
    block = model.get_submodule(layer)
    parts: dict[str, list[str]] = {"": []}
    for name, module in block.named_modules():
        if name.endswith((".adapter.down", ".adapter.up")):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            parts.setdefault(_attention_part(name), []).append(name)
    problem = None
    if attention and len(parts) == 1:
        problem = "no attention"
    elif any(parameter.dim() > 2 for parameter in block.parameters()):
        problem = "weights of more than two dimensions, as a mixture of experts has"
    ends = []
    for part, linear in parts.items():
        if part and not attention:
            continue
        last = block.get_submodule(linear[-1]) if linear else None
        if last is None or (last.out_features if isinstance(last, nn.Linear) else last.nf) != width:
            problem = problem or f"no linear layer of width {width} at the end of its {part or 'feed-forward'} part"
        else:
            ends.append(f"{layer}.{linear[-1]}")
    if problem:
        raise ConfigError(
            f"tuning.method: adapters find no place in a {model.config.model_type} model: {layer} has {problem}; use "
            "lora"
        )
    order = [f"{layer}.{name}" for name, _ in block.named_modules()]
    return sorted(ends, key=order.index)


def _attention_part(name: str) -> str:
    """The outermost attention module that `name` is in: all of a name up to it; empty for the feed-forward part."""
    pieces = name.split(".")
    for count, piece in enumerate(pieces, 1):
        if ATTENTION.search(piece):
            return ".".join(pieces[:count])
    return ""
