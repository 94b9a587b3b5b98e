"""What tasks ask of a model's config."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from shardtune.errors import ConfigError


def decoder_start(config: PreTrainedConfig, path: str) -> int:
    """The token that an encoder-decoder begins to write after.

    Raises ConfigError where the config does not say.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(f"model.path {path}: its config has no decoder_start_token_id, so it cannot learn to write")
    return start


def keeps_logits(config: PreTrainedConfig) -> bool:
    """Whether the decoder of this architecture computes logits of chosen positions only, by `logits_to_keep`."""
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:  # code that comes with the weights
        return False
    chosen = mapping[type(config)]
    return "logits_to_keep" in inspect.signature(chosen.forward).parameters
