"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardtune.config import Config
from shardtune.protocols import Tuning
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.lora import Lora
from shardtune.tuning.virtual_tokens import MultitaskPrompt, Prefix, Prompt, PTuning
from shardtune.tuning_config import (
    FreezeConfig,
    FullConfig,
    LoraConfig,
    MultitaskPromptConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
)


def make_tuning(config: Config, tokenizer: PreTrainedTokenizerBase) -> Tuning:
    """The method of `tuning.method`."""
    task, tuning = config.task.kind, config.tuning
    match tuning:
        case FullConfig():
            return Full()
        case FreezeConfig():
            return Freeze(tuning.layers, tuning.embeddings, tuning.patterns)
        case LoraConfig():
            return Lora(task, tuning.rank, tuning.alpha, tuning.dropout, tuning.targets)
        case PrefixConfig():
            return Prefix(task, tuning.virtual_tokens, tuning.projection, tuning.hidden_size)
        case PromptConfig():
            return Prompt(task, tuning.virtual_tokens, prompt_ids(tuning, tokenizer, config.seed))
        case PTuningConfig():
            return PTuning(task, tuning.virtual_tokens, tuning.encoder, tuning.hidden_size, tuning.dropout)
        case MultitaskPromptConfig():
            return MultitaskPrompt(
                task, tuning.virtual_tokens, tuning.rank, [source.path for source in config.data.sources]
            )
        case _:
            raise NotImplementedError(tuning.method)


def prompt_ids(tuning: PromptConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
    """The tokens whose embeddings a prompt begins as: those of its text, or random ones."""
    if tuning.text is None:
        generator = np.random.Generator(np.random.PCG64(seed))
        return generator.integers(len(tokenizer), size=tuning.virtual_tokens).tolist()
    ids: list[int] = tokenizer(tuning.text, truncation=False, verbose=False)["input_ids"]  # pyright: ignore
    return ids
