"""Which class each value of `tuning.method` stands for."""

from __future__ import annotations

from shardtune.assemble.parts import DTYPES
from shardtune.protocols import Tuning
from shardtune.quantization import Quantization
from shardtune.tuning.adalora import Adalora
from shardtune.tuning.freeze import Freeze
from shardtune.tuning.full import Full
from shardtune.tuning.ia3 import Ia3
from shardtune.tuning.ln_tuning import LnTuning
from shardtune.tuning.loha import Loha
from shardtune.tuning.lokr import Lokr
from shardtune.tuning.lora import Lora
from shardtune.tuning.oft import Oft
from shardtune.tuning.vera import Vera
from shardtune.tuning_config import (
    AdaloraConfig,
    AdapterSection,
    FourBitSection,
    FreezeConfig,
    FullConfig,
    Ia3Config,
    LnTuningConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    OftConfig,
    QloraConfig,
    QuantizedSection,
    TuningConfig,
    VeraConfig,
)


def quantization_of(config: TuningConfig) -> Quantization | None:
    """What the method stores the base's linear layers as."""
    if isinstance(config, FourBitSection | QuantizedSection):
        return Quantization(config.quantization, config.double_quant)
    return None


def make_tuning(config: TuningConfig, task: str) -> Tuning:
    """The method of `tuning.method`."""
    tuning = _method(config, task)
    if isinstance(config, AdapterSection):
        tuning.trained_dtype = DTYPES[config.dtype]
    return tuning


def _method(config: TuningConfig, task: str) -> Tuning:
    match config:
        case FullConfig():
            return Full()
        case FreezeConfig():
            return Freeze(config.layers, config.embeddings, config.patterns)
        case LoraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets)
        case QloraConfig():
            return Lora(task, config.rank, config.alpha, config.dropout, config.targets, quantization_of(config))
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
        case _:
            raise NotImplementedError(config.method)
