"""The model of a run with its tuning method, on the meta device, and the values it starts from."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from shardtune import bottleneck
from shardtune.assemble.begin_with import begin_with
from shardtune.assemble.earlier import folder_of
from shardtune.assemble.eva import observe_inputs
from shardtune.assemble.parts import DTYPES, of_tasks, task_notes
from shardtune.assemble.positions import longest_row, micro_batch_rows
from shardtune.assemble.prepared import Prepared
from shardtune.assemble.tunings import make_tuning
from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.fused.plan import fuse
from shardtune.model.dropout import quicken_dropout
from shardtune.model.packed_attention import keep_apart
from shardtune.model.quantized import quantize_layers
from shardtune.model.quantized_weights import QuantizedWeights
from shardtune.model.skeleton import Skeleton, build_skeleton
from shardtune.protocols import Saved, Tuning, Weights
from shardtune.task.chat import Chat
from shardtune.tuning.eva import Eva
from shardtune.world import World

if TYPE_CHECKING:
    from shardtune.fused.head import After

MEASURED_ROWS = 8192
"""At most so many tokens at once are operations measured on: beyond, times grow alike."""


class Tuned(NamedTuple):
    """All that a strategy needs to place and fill the model, and what is to be said of it."""

    skeleton: Skeleton
    tuning: Tuning
    model: nn.Module
    """The skeleton's model after the method was applied."""
    weights: Weights
    shapes: dict[str, torch.Size]
    """Of the trained parameters, before they are split."""
    notes: list[str]
    fused: dict[str, int | str]
    """Of each fused operation in how many modules it is, or why in none."""


def tuned_model(config: Config, world: World, prepared: Prepared, saved: Saved | None = None) -> Tuned:
    """Builds the model and applies `tuning.method`; all ranks call it.

    `saved`: the checkpoint of a run that is gone on with, whose values for the trained parameters the caller puts over
    `weights`: then what these began as is not sought anew, and `tuning.from` is not read.
    Raises ConfigError where the method does not fit the model.
    """
    sources = [source.path for source in config.data.sources]
    tuning = make_tuning(config.tuning, config.task.head, prepared.tokenizer, sources, config.seed)
    build = functools.partial(make_skeleton, config, prepared, config.model.path, config.model.weights == "pretrained")
    if saved is not None:
        tuning.recall(saved)
    elif isinstance(tuning, Eva):
        observe_inputs(tuning, config, world, build, prepared.task, prepared.tables["train"], prepared.train_counts)
    skeleton = build()
    if isinstance(prepared.task, Chat):
        prepared.task.stop_at_turns_end(skeleton.model)
    prepared.task = of_tasks(config, prepared.task)
    dtype = DTYPES[config.model.dtype]
    wanted = config.kernels.fused
    after: After | str = ""
    if wanted != "off":
        from shardtune.fused.head import after_head  # with it the kernels, which take half a second

        after = after_head(skeleton.model)  # while its layers are those of transformers
    if hasattr(prepared.architecture, bottleneck.SETTINGS) and (tuning.makes_adapter or tuning.quantization):
        raise ConfigError(
            f"tuning.method: {config.model.path} has bottleneck adapters, beside which PEFT's do not work; tune it by "
            "adapter, bitfit, freeze or full"
        )
    if tuning.quantization is not None:
        quantize_layers(
            skeleton.model, config.task.head, skeleton.recorder, tuning.quantization, dtype, config.model.path
        )
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    if config.model.recompute == "full":
        skeleton.model.gradient_checkpointing_enable({"use_reentrant": False})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    initial = skeleton.weights(model, config.seed, dtype, tuning.trained_dtype)
    if tuning.makes_adapter and initial.grown:
        raise ConfigError(
            f"model.tokenizer: has {len(prepared.tokenizer):,} tokens, more than {config.model.path}; an adapter would "
            "not hold the new ones. Use tuning.method: full, or the model's own tokenizer"
        )
    weights, notes = tuning.initial(model, initial, world), [*tuning.notes(), *task_notes(config)]
    if saved is None and (earlier := folder_of(config)) is not None:
        weights, taken = begin_with(earlier, config.tuning.method, tuning, model, weights, prepared.labels)
        notes += taken
    if tuning.quantization is not None:
        weights = QuantizedWeights(model, weights, world.device, world.largest)
    slower: dict[str, str] = {}
    if wanted == "auto" and world.device.type == "cuda":  # one rank measures: all must compute alike
        from shardtune.fused.measured import slower_ops

        rows = min(micro_batch_rows(config), MEASURED_ROWS)
        slower = world.first_does("calibration", lambda: slower_ops(model, rows, dtype, world.device))
    fused = fuse(model, skeleton.model, wanted, world.device, config.model.attention, after, slower)
    if config.model.attention == "fused" and not isinstance(fused["attention"], int):
        raise ConfigError(
            f"model.attention: fused is for models with T5's relative positions; {config.model.path} has none"
        )
    return Tuned(skeleton, tuning, model, weights, shapes, notes, fused)


def make_skeleton(config: Config, prepared: Prepared, path: str, pretrained: bool) -> Skeleton:
    """The model on the meta device."""
    model = config.model
    skeleton = build_skeleton(
        prepared.architecture, path, config.task.head, pretrained,
        "auto" if model.attention == "fused" else model.attention, model.layers,
        model.trust_remote_code,
    )  # fmt: skip
    quicken_dropout(skeleton.model)
    if config.data.batching == "packed":
        keep_apart(skeleton.model, path, longest_row(config), flash=model.attention == "flash_attention_2")
    return skeleton
