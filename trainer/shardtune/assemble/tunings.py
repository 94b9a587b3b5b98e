"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardtune.protocols import Tuning
from shardtune.quantization import Quantization
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.lora import Lora
from shardtune.tuning.virtual_tokens import MultitaskPrompt, Prefix, Prompt, PTuning
from shardtune.tuning_config import (
    FourBitSection,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MultitaskPromptConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
    QuantizedSection,
    TuningConfig,
)


def quantization_of(config: TuningConfig) -> Quantization | None:
    """What the method stores the base's linear layers as."""
    if isinstance(config, FourBitSection | QuantizedSection):
        return Quantization(config.quantization, config.double_quant)
    return None


def make_tuning(
    config: TuningConfig, task: str, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], seed: int
) -> Tuning:
    """The method of `tuning.method`; `sources`: names of those of the training data."""
    match config:
        case FullConfig():
            return Full()
        case FreezeConfig():
            return Freeze(config.layers, config.embeddings, config.patterns)
        case LoraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets)
        case QloraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets, quantization_of(config))
        case PrefixConfig():
            return Prefix(task, config.virtual_tokens, config.projection, config.hidden_size)
        case PromptConfig():
            return Prompt(task, config.virtual_tokens, _prompt_ids(config, tokenizer, seed))
        case PTuningConfig():
            return PTuning(task, config.virtual_tokens, config.encoder, config.hidden_size, config.dropout)
        case MultitaskPromptConfig():
            return MultitaskPrompt(task, config.virtual_tokens, config.rank, sources)
        case _:
            raise NotImplementedError(config.method)


def _prompt_ids(config: PromptConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
    """The tokens whose embeddings a prompt begins as: those of its text, or random ones."""
    if config.text is None:
        generator = np.random.Generator(np.random.PCG64(seed))
        return generator.integers(len(tokenizer), size=config.virtual_tokens).tolist()
    return tokenizer(config.text, truncation=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
