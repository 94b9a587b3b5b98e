"""`tuning.from`: the values of an earlier run's adapter, or of one that PEFT made, in place of the initial ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardtune.assemble.earlier import Earlier, open_earlier
from shardtune.assemble.parts import saved_labels
from shardtune.errors import ConfigError
from shardtune.model.overlay import MeanRepeated, Overlay, Readable
from shardtune.model.safetensors_files import Entry, open_files
from shardtune.protocols import BESIDE, Tuning, Weights

MEANINGS = (
    "use_dora", "use_rslora", "bias", "lora_bias", "layer_replication", "projection_prng_key", "decompose_both", "coft",
    "eps", "block_share", "use_cayley_neumann",
)  # fmt: skip
"""Settings of PEFT's that say what the tensors mean, and follow from the method."""
FACTORS = ("prefix_task_cols", "prefix_task_rows")
"""What a multitask prompt has of each task."""


def begin_with(
    folder: Path, method: str, tuning: Tuning, model: nn.Module, weights: Weights, labels: Sequence[str]
) -> tuple[Weights, list[str]]:
    """The initial values of the applied `model`, which is on the meta device, with those of the adapter in `folder`;
    and what is to be said of them. `labels`: of this run.

    All tensors of the adapter are used, and every trained parameter is found; only a classification head begins anew
    where the labels are others. Raises ConfigError.
    """
    earlier = open_earlier(folder)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {id(parameter): name for name, parameter in trained.items()}
    adapter = tuning.result(model, dict(trained), weights)
    _same_meaning(earlier, method, adapter.settings)
    file, beside = folder / "adapter_model.safetensors", folder / BESIDE
    if not file.exists():
        raise ConfigError(f"{earlier.name}: there is no adapter_model.safetensors in it (pickles are never read)")
    entries = open_files([file])
    unknown = [key for key in entries if key not in adapter.tensors]
    if unknown:
        raise ConfigError(
            f"{earlier.name}: {len(unknown)} of its tensors have no place in this model, such as {unknown[0]}; "
            "are model.path and tuning.targets those that it was trained with?"
        )
    if adapter.beside and not beside.exists():
        raise ConfigError(
            f"{earlier.name}: does not hold {BESIDE}, the network that its vectors were computed by, which PEFT leaves "
            "out; so it cannot be trained further"
        )
    kept = {**adapter.tensors, **adapter.beside}
    found = {**entries, **(open_files([beside]) if adapter.beside else {})}
    others: dict[str, Readable] = {}
    notes: list[str] = []
    known = saved_labels(folder)
    for key, tensor in kept.items():
        name = names.get(id(tensor))
        if name is None or key not in found:  # computed from the others, or missing
            continue
        if ".modules_to_save." in name and (found[key].shape != tensor.shape or (known and known != list(labels))):
            continue
        others[name] = _readable(earlier, key, found[key], tuple(tensor.shape), notes)
    missing = [name for name in trained if name not in others]
    lacking = [name for name in missing if ".modules_to_save." not in name]
    if lacking:
        raise ConfigError(
            f"{earlier.name}: has nothing for {len(lacking)} of {len(trained)} trained parameters, such as "
            f"{lacking[0]}; are model.path and tuning.targets those that it was trained with?"
        )
    if missing:
        notes.append("the classification head begins anew: the adapter has none for these labels")
    return Overlay(weights, others), [f"begins as the adapter in {folder}", *notes]


def _same_meaning(earlier: Earlier, method: str, settings: Any) -> None:
    if earlier.settings.get("rank_pattern") or earlier.settings.get("alpha_pattern"):
        raise ConfigError(
            f"{earlier.name}: its layers have ranks of their own (its rank_pattern, as adalora and eva give them), "
            "which no method here goes on from; begin from an adapter with one rank, or export --merge this one and "
            "give the merged model as model.path"
        )
    ours = json.loads(json.dumps(settings.to_dict(), default=str))
    for key in MEANINGS:
        if key in earlier.settings and key in ours and (earlier.settings[key] or None) != (ours[key] or None):
            raise ConfigError(
                f"{earlier.name}: its {key} is {earlier.settings[key]}, but that of tuning.method: {method} is "
                f"{ours[key]}"
            )


def _readable(earlier: Earlier, key: str, entry: Entry, shape: tuple[int, ...], notes: list[str]) -> Readable:
    """The values of a parameter of this shape. Raises ConfigError where the adapter's do not fit."""
    if entry.shape == shape:
        return entry
    if entry.shape[1:] == shape[1:] and key in FACTORS:
        notes.append(f"{key} of each task begins as the mean of those of the adapter's {entry.shape[0]} tasks")
        return MeanRepeated(entry)
    stacks = earlier.settings.get("num_transformer_submodules")
    if key == "prompt_embeddings" and entry.shape == (shape[0] * (stacks or 1), *shape[1:]):
        return entry  # PEFT also makes vectors for a decoder, after the others, and never reads them
    raise ConfigError(f"{earlier.name}: {key} has shape {list(entry.shape)}, but this model needs {list(shape)}")
