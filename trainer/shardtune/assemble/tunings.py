"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

from shardtune.assemble.parts import DTYPES
from shardtune.protocols import Tuning
from shardtune.quantization import Quantization
from shardtune.tuning.dora import Dora
from shardtune.tuning.eva import Eva
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.loftq import Loftq
from shardtune.tuning.lora import Lora, LoraPlus
from shardtune.tuning.pissa import Pissa
from shardtune.tuning_config import (
    DoraConfig,
    EvaConfig,
    FourBitSection,
    FreezeConfig,
    FullConfig,
    LoftqConfig,
    LoraConfig,
    LoraPlusConfig,
    LowRankSection,
    PissaConfig,
    QdoraConfig,
    QloraConfig,
    QuantizedSection,
    RsloraConfig,
    TuningConfig,
)


def quantization_of(config: TuningConfig) -> Quantization | None:
    """What the method stores the base's linear layers as."""
    if isinstance(config, FourBitSection | QuantizedSection):
        return Quantization(config.quantization, config.double_quant)
    return None


def make_tuning(config: TuningConfig, task: str) -> Tuning:
    """The method of `tuning.method`."""
    match config:
        case FullConfig():
            return Full()
        case FreezeConfig():
            return Freeze(config.layers, config.embeddings, config.patterns)
        case LowRankSection():
            return _low_rank(config, task)
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
