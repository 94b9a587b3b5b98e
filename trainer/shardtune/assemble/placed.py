"""The strategy with the model in it."""

from __future__ import annotations

import torch

from shardtune.assemble.isolation import check_isolation
from shardtune.assemble.optimizers import make_optimizer_recipe
from shardtune.assemble.parts import DTYPES, make_strategy
from shardtune.assemble.prepared import Prepared
from shardtune.assemble.saving import saved_weights
from shardtune.assemble.tuned import Tuned
from shardtune.checkpoint.reading import Checkpoint
from shardtune.config import Config
from shardtune.protocols import Strategy
from shardtune.world import World


def placed(
    config: Config, world: World, prepared: Prepared, tuned: Tuned, kind: str, saved: Checkpoint | None
) -> Strategy:
    """The strategy `kind` with the model and its values, in training mode."""
    model, dtype = tuned.model, DTYPES[config.model.dtype]
    weights = saved_weights(saved, model, tuned.weights) if saved is not None else tuned.weights
    strategy = make_strategy(kind, model, world, dtype, config.strategy.offload, config.strategy.nvme)
    strategy.prepare(model, weights, make_optimizer_recipe(config.optimizer, model, tuned.tuning))
    if config.data.batching == "packed":
        vocabulary = prepared.architecture.get_text_config().vocab_size
        check_isolation(prepared.task, strategy, vocabulary, world.device, dtype != torch.float32, config.model.path)
    model.train()
    return strategy
