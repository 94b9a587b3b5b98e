"""Which linear layers of a model a method works on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shardtune.errors import ConfigError
from shardtune.heads import HEADS
from shardtune.layers import layer_names

ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
"""Found in the names of attention modules of all architectures: self_attn, SelfAttention, attention.output, attn."""


def matching(model: PreTrainedModel, task: str, targets: str | Sequence[str], each: bool = True) -> list[str]:
    """Names of the linear layers (nn.Linear, or GPT-2's Conv1D) that `targets` means.

    all-linear: every one but the output layer and a classification head; attention: those of them in attention
    modules; mlp: the others in the model's layers; a list: those with such name endings; else a regular expression
    over whole names. A classification head, which is trained in full, is none of them. Raises ConfigError where nothing
    matches, listing what could, or, unless `each` is false, where one name ending of several does not.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    output = model.get_output_embeddings()
    base = model.base_model_prefix + "."
    candidates = [
        name
        for name in linear
        if model.get_submodule(name) is not output and (not HEADS[task].is_new or name.startswith(base))
    ]
    named = candidates if HEADS[task].is_new else linear  # an output layer can be asked for, by its name
    layers = tuple(f"{name}." for name in layer_names(model))
    inside = [name for name in candidates if name.startswith(layers)]
    if targets == "all-linear":
        matched = candidates
    elif targets == "attention":
        matched = [name for name in inside if ATTENTION.search(name)]
    elif targets == "mlp":
        matched = [name for name in inside if not ATTENTION.search(name)]
    elif isinstance(targets, str):
        try:
            matched = [name for name in named if re.fullmatch(targets, name)]
        except re.error as error:
            raise ConfigError(f"tuning.targets: {targets!r} is no regular expression: {error}") from None
    else:
        endings = tuple(f".{target}" for target in targets)
        matched = [name for name in named if f".{name}".endswith(endings)]
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in named)]
        if matched and missing and each:
            near = get_close_matches(missing[0], _endings(candidates), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"tuning.targets: {missing[0]!r} matches no linear layer{hint}")
    if not matched:
        there_are = ", ".join(sorted(_endings(candidates)))
        raise ConfigError(
            f"tuning.targets: {targets!r} matches no linear layer; there are {there_are}, or all-linear, attention, mlp"
        )
    return matched


def head(model: PreTrainedModel, task: str) -> list[str] | None:
    """What stands beside the base model of a classifier and is trained in full; PEFT by itself knows only some of the
    names that heads have."""
    if not HEADS[task].is_new:
        return None
    beside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name, child in beside if any(True for _ in child.parameters())]


def describe(matched: Sequence[str]) -> str:
    """A line about the layers that were matched."""
    kinds = ", ".join(f"{count} {name}" for name, count in _endings(matched).items())
    return f"on {len(matched):,} linear layers: {kinds}"


def _endings(names: Sequence[str]) -> Counter[str]:
    return Counter(name.rpartition(".")[2] for name in names)
