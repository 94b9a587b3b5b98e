"""Trained factors of activations (IA3, Liu et al. 2022, arXiv:2205.05638), by PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from shardtune.errors import ConfigError
from shardtune.layers import layer_names
from shardtune.tuning.peft_adapter import PeftAdapter, has_transposed
from shardtune.tuning.targets import describe, matching

if TYPE_CHECKING:
    from peft import IA3Config

KEYS_AND_VALUES = (
    "k", "key", "k_proj", "key_proj", "k_lin", "v", "value", "v_proj", "value_proj", "v_lin", "qkv", "qkv_proj",
    "query_key_value", "c_attn",
)  # fmt: skip
"""What the linear layers that compute keys and values are called."""


class Ia3(PeftAdapter):
    """Implements the Tuning protocol: y = f ∘ (W x), f [d_out] trained; of feed-forward layers y = W (f ∘ x), f [d_in].

    `targets` as in `targets.matching`; None: the layers that PEFT names for the architecture, or for one that it does
    not know those of the keys, the values, and the last feed-forward layer of each layer. `feedforward`: name endings
    or a regular expression for those of them that have a factor for each input; None: as PEFT names them, or the last
    feed-forward layer of each layer.
    """

    def __init__(self, task: str, targets: str | Sequence[str] | None, feedforward: str | Sequence[str] | None) -> None:
        super().__init__(task)
        self._targets = targets
        self._feedforward = feedforward

    def peft_config(self, model: PreTrainedModel) -> IA3Config:
        """PEFT's settings. Raises ConfigError where nothing matches."""
        from peft import IA3Config
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
        )
        from peft.utils.constants import (
            TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
        )

        kind = model.config.model_type
        known = TARGETS.get(kind)
        if self._targets is not None:
            matched = matching(model, self._task, self._targets)
        elif known is not None:
            matched = matching(model, self._task, known, each=False)
        else:
            matched = [*matching(model, self._task, KEYS_AND_VALUES, each=False), *_last_feedforward(model, self._task)]
        if self._feedforward is not None:
            feedforward = _chosen(matched, self._feedforward)
        elif self._targets is None and known is not None:
            feedforward = _ending(matched, FEEDFORWARD.get(kind, []))
        else:
            last = set(_last_feedforward(model, self._task))
            feedforward = [name for name in matched if name in last]
        self._notes = [describe(matched), f"a factor for each input of {len(feedforward):,} of them, for each output "
                       f"of the other {len(matched) - len(feedforward):,}"]  # fmt: skip
        return IA3Config(
            target_modules=matched,
            feedforward_modules=feedforward,
            fan_in_fan_out=has_transposed(model, matched),
        )


def _last_feedforward(model: PreTrainedModel, task: str) -> list[str]:
    """The last linear layer outside of attention of each of the model's layers."""
    inside = matching(model, task, "mlp")
    of_layers = [[name for name in inside if name.startswith(f"{layer}.")] for layer in layer_names(model)]
    return [names[-1] for names in of_layers if names]


def _chosen(matched: list[str], feedforward: str | Sequence[str]) -> list[str]:
    """Those of the layers `matched` that `feedforward` means."""
    if isinstance(feedforward, str):
        try:
            chosen = [name for name in matched if re.fullmatch(feedforward, name)]
        except re.error as error:
            raise ConfigError(f"tuning.feedforward: {feedforward!r} is no regular expression: {error}") from None
    else:
        chosen = _ending(matched, feedforward)
    if not chosen:
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in matched}))
        raise ConfigError(f"tuning.feedforward: {feedforward!r} matches none of the target layers, which are {endings}")
    return chosen


def _ending(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    ends = tuple(f".{ending}" for ending in endings)
    return [name for name in names if f".{name}".endswith(ends)]
