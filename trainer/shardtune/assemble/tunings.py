"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardtune.assemble.parts import DTYPES
from shardtune.protocols import Tuning
from shardtune.quantization import Quantization
from shardtune.tuning.adalora import Adalora
from shardtune.tuning.bitfit import Bitfit
from shardtune.tuning.bottleneck import BottleneckAdapters
from shardtune.tuning.dora import Dora
from shardtune.tuning.eva import Eva
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.ia3 import Ia3
from shardtune.tuning.ln_tuning import LnTuning
from shardtune.tuning.loftq import Loftq
from shardtune.tuning.loha import Loha
from shardtune.tuning.lokr import Lokr
from shardtune.tuning.lora import Lora, LoraPlus
from shardtune.tuning.oft import Oft
from shardtune.tuning.pissa import Pissa
from shardtune.tuning.vera import Vera
from shardtune.tuning.virtual_tokens import MultitaskPrompt, Prefix, Prompt, PTuning
from shardtune.tuning_config import (
    AdaloraConfig,
    AdapterSection,
    BitfitConfig,
    BottleneckConfig,
    DoraConfig,
    EvaConfig,
    FourBitSection,
    FreezeConfig,
    FullConfig,
    Ia3Config,
    LnTuningConfig,
    LoftqConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    LoraPlusConfig,
    LowRankSection,
    MultitaskPromptConfig,
    OftConfig,
    PissaConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QdoraConfig,
    QloraConfig,
    QuantizedSection,
    RsloraConfig,
    TuningConfig,
    VeraConfig,
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
    tuning = _method(config, task, tokenizer, sources, seed)
    if isinstance(config, AdapterSection):
        tuning.trained_dtype = DTYPES[config.dtype]
    return tuning


def _method(
    config: TuningConfig, task: str, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], seed: int
) -> Tuning:
    match config:
        case FullConfig():
            return Full()
        case FreezeConfig():
            return Freeze(config.layers, config.embeddings, config.patterns)
        case LowRankSection():
            return _low_rank(config, task)
        case PrefixConfig():
            return Prefix(task, config.virtual_tokens, config.projection, config.hidden_size)
        case PromptConfig():
            return Prompt(task, config.virtual_tokens, _prompt_ids(config, tokenizer, seed))
        case PTuningConfig():
            return PTuning(task, config.virtual_tokens, config.encoder, config.hidden_size, config.dropout)
        case MultitaskPromptConfig():
            return MultitaskPrompt(task, config.virtual_tokens, config.rank, sources)
        case Ia3Config():
            return Ia3(task, config.targets, config.feedforward)
        case VeraConfig():
            return Vera(task, config.rank, config.dropout, config.targets)
        case LohaConfig():
            return Loha(task, config.rank, config.alpha, config.dropout, config.targets)
        case LokrConfig():
            return Lokr(task, config.rank, config.alpha, config.factor, config.dropout, config.targets)
        case OftConfig():
            return Oft(task, config.block_size, config.dropout, config.targets)
        case LnTuningConfig():
            return LnTuning(task)
        case AdaloraConfig():
            return Adalora(
                task, config.rank, config.initial_rank, config.alpha, config.dropout, config.targets, config.begin,
                config.end, config.interval, (config.beta1, config.beta2), config.orthogonality,
            )  # fmt: skip
        case BitfitConfig():
            return Bitfit(task)
        case BottleneckConfig():
            return BottleneckAdapters(task, config.placement, config.size, config.activation, config.dropout)
        case _:
            raise NotImplementedError(config.method)


def _low_rank(config: LowRankSection, task: str) -> Tuning:
    shape = task, config.rank, config.alpha
    shared = *shape, config.dropout, config.targets, DTYPES[config.dtype]
    match config:
        case LoraConfig():
            return Lora(*shared)
        case RsloraConfig():
            return Lora(*shared, rank_stabilized=True)
        case LoraPlusConfig():
            return LoraPlus(*shared, ratio=config.ratio)
        case QloraConfig():
            return Lora(*shared, quantization=quantization_of(config))
        case LoftqConfig():
            return Loftq(*shared, quantization=quantization_of(config))
        case DoraConfig() | QdoraConfig():
            return Dora(*shared, quantization=quantization_of(config))
        case PissaConfig():
            return Pissa(*shape, config.targets, DTYPES[config.dtype], config.iterations)
        case EvaConfig():
            return Eva(*shared, rho=config.rho, examples=config.examples)
        case _:
            raise NotImplementedError(config)


def _prompt_ids(config: PromptConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
    """The tokens whose embeddings a prompt begins as: those of its text, or random ones."""
    if config.text is None:
        generator = np.random.Generator(np.random.PCG64(seed))
        return generator.integers(len(tokenizer), size=config.virtual_tokens).tolist()
    return tokenizer(config.text, truncation=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
