"""The values that a model's parameters start from: read from files or drawn, any range of any parameter."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from shardtune.errors import ConfigError
from shardtune.layers import layer_stacks
from shardtune.model.initialization import Recipe, Recorder
from shardtune.model.safetensors_files import Entry


class InitialWeights:
    """Implements the Weights protocol for a skeleton that tuning has been applied to."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        entries: dict[str, Entry],
        seed: int,
        compute_dtype: torch.dtype,
        trained_dtype: torch.dtype,
    ) -> None:
        self._seed = seed
        self._entries = entries
        self._recipes: dict[str, Recipe] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._tails: dict[str, int] = {}
        self._elements: dict[str, int] = {}
        embeddings, beside_trained = _embeddings(model), _vectors_beside_trained(model)
        for name, parameter in model.named_parameters():
            recipe = recorder.recipe(parameter)
            recipe.name = recipe.name or name
            self._recipes[name] = recipe
            # A quantized parameter is read here as the values it stands for.
            shape: torch.Size = getattr(parameter, "unpacked_shape", parameter.shape)
            self._elements[name] = shape.numel()
            as_trained = parameter.requires_grad or id(parameter) in beside_trained
            self._dtypes[name] = trained_dtype if as_trained else compute_dtype
            entry = entries.get(recipe.name)
            if entry is not None:
                stored = math.prod(entry.shape)
                vocabulary = any(parameter is embedding for embedding in embeddings)
                grown = vocabulary and entry.shape[1:] == shape[1:] and stored < shape.numel()
                if entry.shape != shape and not grown:
                    raise ConfigError(
                        f"{entry.file}: {recipe.name} has shape {list(entry.shape)}, "
                        f"the model's config says {list(shape)}"
                    )
                self._tails[name] = stored
            if self._tails.get(name, 0) < shape.numel() and not recipe.covers(shape.numel()):
                raise ConfigError(f"model.weights: {recipe.name} is in no file and has no known initialization")

    @property
    def grown(self) -> list[str]:
        """Parameters of which the files hold only the first rows."""
        return [name for name, stored in self._tails.items() if stored < self._elements[name]]

    def dtype(self, name: str) -> torch.dtype:
        """The method's for trained parameters and vectors beside them, the compute dtype for other frozen ones."""
        return self._dtypes[name]

    def buffers(self, name: str) -> dict[str, Tensor]:
        """None: every buffer has its value."""
        raise KeyError(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter, 1-D, on the CPU.

        Rows beyond those in the file (a vocabulary that has grown) are drawn.
        """
        recipe = self._recipes[name]
        entry = self._entries.get(recipe.name or name)
        stored = self._tails[name] if entry is not None else 0
        if entry is None or start >= stored:
            return recipe.draw(self._seed, start, stop)
        if stop <= stored:
            return entry.read(start, stop)
        return torch.cat([entry.read(start, stored).float(), recipe.draw(self._seed, stored, stop)])


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with a row for each token of the vocabulary."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if isinstance(m, nn.Module)]  # pyright: ignore
    return [parameter for module in modules for parameter in module.parameters()]


def _vectors_beside_trained(model: nn.Module) -> set[int]:
    """Vectors in modules of which another parameter is trained: a normalization layer's weight and bias have one
    dtype."""
    own = [list(module.parameters(recurse=False)) for module in model.modules()]
    return {id(p) for some in own if any(p.requires_grad for p in some) for p in some if p.dim() < 2}


def entries_by_parameter(
    model: PreTrainedModel, entries: dict[str, Entry], layers: list[int] | None, where: str
) -> dict[str, Entry]:
    """The files' tensors under the model's own parameter and buffer names.

    Uses the renamings that transformers knows for an architecture, and adds or drops the base model's prefix as it
    does. Raises ConfigError where the files need more than renaming.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted = _names_in_files(model, layers)
    shapes = dict.fromkeys([*wanted.values(), *wanted], 0)  # which names exist; the rest is of no interest here
    found: dict[str, Entry] = {}
    for key, entry in entries.items():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if converter is not None:
            raise ConfigError(
                f"{where}: `{key}` must be rearranged for {type(model).__name__}, which this version cannot do "
                "tensor by tensor; load it with transformers, save it again with save_original_format=False, "
                "and use that folder"
            )
        found[name] = entry
    tied = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        # Files may hold a tied tensor under any of its names; the model has it under one.
        if source not in found and target in found:
            found[source] = found[target]
    return {name: found[old] for name, old in wanted.items() if old in found}


def _names_in_files(model: PreTrainedModel, layers: list[int] | None) -> dict[str, str]:
    """Present name of each parameter and buffer -> its name before layers were left out."""
    names = list(model.state_dict())
    if layers is None:
        return {name: name for name in names}

    stacks = tuple(f"{name}." for name in layer_stacks(model))

    def old(name: str) -> str:
        if not name.startswith(stacks):
            return name
        return re.sub(r"\.(\d+)\.", lambda match: f".{layers[int(match[1])]}.", name, count=1)

    return {name: old(name) for name in names}


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or those that its index names.

    Raises ConfigError where there is none (weights in pickles are not read).
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = any(Path(name).name != name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: is damaged: {type(error).__name__}: {error}") from None
        if outside:
            raise ConfigError(f"{index}: names files outside its own folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{index}: {', '.join(missing)} missing in {folder}")
        return [folder / name for name in names]
    pickles = [p.name for p in folder.glob("*.bin")]
    reason = (
        f"only {', '.join(sorted(pickles))}, a pickle, which is never read; convert it to safetensors"
        if pickles
        else "no model.safetensors"
    )
    raise ConfigError(f"model.path {folder}: {reason} (or set model.weights: random)")
