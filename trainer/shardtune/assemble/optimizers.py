"""Which class each value of `optimizer.name` stands for."""

from __future__ import annotations

from torch import nn

from shardtune.layers import embedding_names, matrix_names
from shardtune.optim.adafactor import Adafactor
from shardtune.optim.adamw import AdamW, ScheduleFree
from shardtune.optim.eight_bit import BitsAdamW, BitsLion
from shardtune.optim.muon import Muon
from shardtune.optimizer_config import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    Lion8bitConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    PagedAdamw8bitConfig,
    PagedAdamwConfig,
    ScheduleFreeConfig,
)
from shardtune.protocols import MakeOptimizer, Tuning


def make_optimizer_recipe(config: OptimizerConfig, model: nn.Module, tuning: Tuning) -> MakeOptimizer:
    """The optimizer of `optimizer.name` for `model`, which `tuning` was applied to."""
    shared = config.lr, config.weight_decay, tuning.lr_scale
    match config:
        case AdamwConfig():
            return AdamW(*shared, _pair(config.betas), config.eps)
        case Adamw8bitConfig() | PagedAdamwConfig() | PagedAdamw8bitConfig():
            paged, eight_bit = "paged" in config.name, "8bit" in config.name
            is_embedding = embedding_names(model).__contains__
            return BitsAdamW(*shared, _pair(config.betas), eight_bit, is_embedding, config.eps, paged)
        case LionConfig() | Lion8bitConfig():
            is_embedding = embedding_names(model).__contains__
            return BitsLion(*shared, _pair(config.betas), isinstance(config, Lion8bitConfig), is_embedding)
        case AdafactorConfig():
            return Adafactor(*shared, config.scale_parameter, config.decay_rate, config.clip_threshold)
        case MuonConfig():
            is_matrix = matrix_names(model).__contains__
            return Muon(*shared, is_matrix, config.momentum, config.iterations, _pair(config.betas), config.eps)
        case ScheduleFreeConfig():
            return ScheduleFree(*shared, _pair(config.betas), config.eps)


def _pair(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]
