"""Which class each key of the config stands for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from shardtune.config import (
    BatchConfig,
    Config,
    StrategyConfig,
)
from shardtune.data.batching.grouped import Grouped
from shardtune.data.batching.packed import Packed
from shardtune.data.batching.padded import Padded
from shardtune.errors import ConfigError
from shardtune.examples import Budget
from shardtune.layers import layer_names
from shardtune.optimizer_config import PagedAdamw8bitConfig, PagedAdamwConfig
from shardtune.protocols import Batching, Strategy, Task
from shardtune.strategy.disk import check_disk
from shardtune.strategy.replicated import Replicated
from shardtune.strategy.zero import Zero
from shardtune.task.multitask import Multitask
from shardtune.task.section import TaskSection
from shardtune.tuning_config import MultitaskPromptConfig
from shardtune.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHINGS: dict[str, type[Batching]] = {"padded": Padded, "grouped": Grouped, "packed": Packed}
JUDGED_AT_ONCE = 8
"""Where the config gives tokens, not examples."""
USABLE_SHARE = 0.7
"""Of a device's memory, what parameters, gradients and optimizer may take under ddp; the rest is for activations."""


def of_tasks(config: Config, task: Task) -> Task:
    """The same task; told which of several an example is of, where the method has something for each."""
    return Multitask(task) if isinstance(config.tuning, MultitaskPromptConfig) else task


def task_notes(config: Config) -> list[str]:
    """What is to be said of examples whose task is not known."""
    data, several = config.data, isinstance(config.tuning, MultitaskPromptConfig) and len(config.data.sources) > 1
    if not several or (data.validation is None and data.test is None):
        return []
    return [f"data.validation and data.test are of no source, and judged as task 0, {data.sources[0].path}"]


def saved_labels(folder: Path) -> list[str]:
    """The labels of a classifier's result; empty for other results."""
    path = folder / "labels.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def is_chat(config: TaskSection) -> bool:
    """Whether the examples are conversations."""
    return getattr(config, "messages", None) is not None


def choose_strategy(config: StrategyConfig, model: nn.Module, world: World, compute_dtype: torch.dtype) -> str:
    """What `strategy.kind: auto` means for this model on these ranks.

    Trained parameters take 16 bytes each (float32 weight, gradient and two moments), frozen ones their own dtype.
    """
    if config.kind != "auto":
        return config.kind
    if config.offload != "none":
        return {"cpu": "fsdp2", "nvme": "zero3"}[config.offload]
    if world.size == 1:
        return "single"
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        # All ranks of a machine share its memory.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.size
    needed = sum(p.numel() * (16 if p.requires_grad else compute_dtype.itemsize) for p in model.parameters())
    return "ddp" if needed <= USABLE_SHARE * memory else "fsdp2"


def make_strategy(
    kind: str,
    model: nn.Module,
    world: World,
    compute_dtype: torch.dtype,
    offload: str = "none",
    nvme: str | None = None,
) -> Strategy:
    """The strategy `kind`, which is not auto, for a model on the meta device."""
    if kind in ("single", "ddp"):
        return Replicated(world, compute_dtype)
    if kind == "fsdp2":
        from shardtune.strategy.fsdp2 import Fsdp2  # takes half a second to import

        return Fsdp2(world, compute_dtype, layer_names(model), offload == "cpu")
    return Zero(world, compute_dtype, int(kind.removeprefix("zero")), layer_names(model), offload, nvme)


def make_budget(config: BatchConfig) -> Budget:
    """What one rank computes at once."""
    return Budget(config.micro_examples, config.micro_tokens)


def judged_at_once(config: BatchConfig) -> int:
    """How many examples one rank judges at once."""
    return config.micro_examples or JUDGED_AT_ONCE


def metric_names(config: Config) -> list[str]:
    """The metrics of `evaluation.metrics`, or those that suit the task."""
    if config.evaluation.metrics is not None:
        return list(config.evaluation.metrics)
    return config.task.usual_scores


def check_device(config: Config, world: World) -> None:
    """Refuses what this device cannot do.

    Raises ConfigError.
    """
    if config.strategy.nvme is not None:
        folder = config.strategy.nvme
        world.first_does("disk", lambda: check_disk(folder))
    paged = isinstance(config.optimizer, PagedAdamwConfig | PagedAdamw8bitConfig)
    if world.device.type == "cpu" and paged:
        unpaged = config.optimizer.name.removeprefix("paged_")
        raise ConfigError(
            f"optimizer.name: {config.optimizer.name} moves pages between a GPU and the host's memory, and there is no "
            f"GPU here; use {unpaged}"
        )
    if world.device.type == "cpu" and config.model.attention == "flex_attention":
        raise ConfigError("model.attention: flex_attention has no backward pass on a CPU; use sdpa or auto")
    if world.device.type == "cuda" and config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(world.device)
        raise ConfigError(f"model.dtype: {name} has no bfloat16; use model.dtype=float32")
