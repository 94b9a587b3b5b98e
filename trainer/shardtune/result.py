"""`final/`: the tuned model or adapter as a Hugging Face folder, written one parameter at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardtune import bottleneck
from shardtune.errors import NumbersError, StorageError
from shardtune.model.tokenizer import save_tokenizer
from shardtune.protocols import BESIDE, Adapter, Strategy, Tuning, Weights
from shardtune.result_checks import check_changes, check_finite, held_values, whole
from shardtune.world import World

SHARD_BYTES = 5_000_000_000
"""Largest file of a model, and about what the first rank holds of it at once."""


def write_result(
    folder: Path,
    model: nn.Module,
    strategy: Strategy,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    stored_dtype: torch.dtype,
    tuning: Tuning,
    shapes: Mapping[str, torch.Size],
    updated: bool,
    world: World,
) -> list[str]:
    """Writes the result of tuning `model`, which has been prepared by `strategy`; all ranks call it.

    An adapter is float32; a model has `stored_dtype`, that of the weights it began from, and what was not trained is
    taken from them unrounded. `shapes` are those of the trained parameters on the meta device; `updated`: there were
    steps with a learning rate above 0. Returns lines to say. Raises on the first rank StorageError, or NumbersError
    where `result_checks` find the trained tensors not whole; the folder is whole or absent.
    """
    held = held_values(strategy, shapes, world)
    trained = strategy.full_trained()
    if not world.is_first:
        for _ in trained:
            pass
        return []
    partial, notes = folder.with_name(folder.name + ".partial"), list[str]()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        present = whole(((name, cast(Tensor, tensor)) for name, tensor in trained), shapes, held)
        if tuning.makes_adapter:
            tensors = dict(present)
            notes = check_changes(tensors, weights, updated)
            _write_adapter(partial, tuning.result(model, tensors, weights))
        else:
            base = cast(PreTrainedModel, model)
            _write_model(partial, base, _all_tensors(base, present, weights), stored_dtype)
        save_tokenizer(tokenizer, partial)
        if labels:  # an adapter's folder has no config to name them
            (partial / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
        _flush(partial)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # so that a full disk has room again
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{folder}: the result cannot be written: {reason}") from error
    except NumbersError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return notes


def _flush(folder: Path) -> None:
    """Returns when the disk has all files of a folder: whatever is called final is whole."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _all_tensors(
    model: PreTrainedModel, trained: Iterable[tuple[str, Tensor]], weights: Weights
) -> Iterator[tuple[str, Tensor]]:
    yield from trained
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield name, weights.read(name, 0, shape.numel()).view(shape)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters:  # a persistent buffer
            yield name, tensor.detach().cpu()


def _write_model(
    folder: Path, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        shards.append(list(held))
        save_file(held, str(folder / f"shard-{len(shards)}"), metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if held and size + stored.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = stored.contiguous()
        size += stored.nbytes
        total += stored.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
    else:
        places = {}
        for index, names in enumerate(shards, 1):
            file = f"model-{index:05}-of-{len(shards):05}.safetensors"
            (folder / f"shard-{index}").rename(folder / file)
            places |= dict.fromkeys(names, file)
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = dtype
    model.config.save_pretrained(str(folder))
    if hasattr(model.config, bottleneck.SETTINGS):
        shutil.copy(bottleneck.__file__, folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))


def _write_adapter(folder: Path, adapter: Adapter) -> None:
    for name, tensor in adapter.tensors.items():
        check_finite(name, tensor)
    save_file({name: t.contiguous() for name, t in adapter.tensors.items()}, str(folder / "adapter_model.safetensors"))
    if adapter.beside:
        save_file({name: t.contiguous() for name, t in adapter.beside.items()}, str(folder / BESIDE))
    settings = adapter.settings
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
