"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

from shardtune.protocols import Tuning
from shardtune.quantization import Quantization
from shardtune.tuning.bitfit import Bitfit
from shardtune.tuning.bottleneck import BottleneckAdapters
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.lora import Lora
from shardtune.tuning_config import (
    BitfitConfig,
    BottleneckConfig,
    FourBitSection,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    QloraConfig,
    QuantizedSection,
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
        case LoraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets)
        case QloraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets, quantization_of(config))
        case BitfitConfig():
            return Bitfit(task)
        case BottleneckConfig():
            return BottleneckAdapters(task, config.placement, config.size, config.activation, config.dropout)
        case _:
            raise NotImplementedError(config.method)
